"""Ladder side-tuning: a small transformer climbs beside the frozen one and reads each of its layers.

    h_0, h_1, ..., h_L                              the frozen stream (B, S, d), through which nothing is differentiated
    g_0 = D_0 h_0                                   D_i (d, s) with bias, s = d / reduction
    g_i = side_i(mu_i g_{i-1} + (1 - mu_i) D_i h)   h after the i-th chosen layer; mu_i = sigmoid(alpha_i / T), T = 0.1
    out = U norm(g_K)                               U (s, d) with bias; then the model's own frozen head
    merge_last: out = mu U norm(g_K) + (1 - mu) h_L

A side block is a whole block of the model's own family, every width of it divided by `reduction`. Kept for the backward
pass are the arrays that D_i reads (d per token and chosen layer) and g_{i-1} (s); each rung is computed again from
them, which costs 1 / reduction^2 of a block and a product with D_i. Nothing of the backbone's insides is kept.

Side blocks start as the backbone's, pruned by structure (`init`): of each stacked kernel the rows and columns that
matter most stay, the same channels of the stream in all layers, and per layer the same heads and MLP units on both
sides. What matters is the sum over all kernels that touch a channel of |W| ("magnitude") or of Fisher information
("fisher", see `fisher_information`). D_i starts by picking the channels that stayed, U by putting them back.

The model does not start at the base: what the head reads is a small model's stream. With `merge_last` U starts at zero
and out at h_L / 2, which a head that begins with a norm (decoders, ViT) turns into the base's logits, up to epsilon.

Paper: Sung, Cho, Bansal 2022, arXiv:2206.06522. Deviations: U's result passes the whole head, its norm included; the
paper's D_i and U start at random. Where heads are narrowed, evenly spaced channels of each stay, so that rotary
frequencies are those that the kept channels had. The backbone's dropout is off. A decoder's side network is causal, as
its blocks are; the cross-attention of encoder-decoders has no counterpart here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import decoding, models, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.features import (
    check_layers,
    check_run,
    check_settings,
    count_layers,
    divided,
    frozen_pass,
    linear,
    no_merge,
    width,
)
from jaxpeft.method import Method, Spec, trains
from jaxpeft.model import Batch, Model, Stack
from jaxpeft.models.layers import RMSNorm
from jaxpeft.quant import dense
from jaxpeft.starts import probes
from jaxpeft.train.loss import completion_loss

TEMPERATURE = 0.1
INITS = ("magnitude", "fisher", "random")

# Parameters of a layer by path -> what their axes are: the stream, queries, keys, one head, the MLP's units.
_AXES = (
    (r"self_attn/q_proj/kernel", ("hidden", "query")),
    (r"self_attn/[kv]_proj/kernel", ("hidden", "key")),
    (r"self_attn/o_proj/kernel", ("query", "hidden")),
    (r"self_attn/q_proj/bias", ("query",)),
    (r"self_attn/[kv]_proj/bias", ("key",)),
    (r"self_attn/[qk]_norm/scale", ("head",)),
    (r"mlp/(gate|up)_proj/kernel", ("hidden", "mlp")),
    (r"mlp/(gate|up)_proj/bias", ("mlp",)),
    (r"mlp/down_proj/kernel", ("mlp", "hidden")),
    (r".*/(scale|bias)", ("hidden",)),
)

_NORM = RMSNorm(1e-6, name="norm")


def layer_bytes(config: Any, itemsize: int, reduction: int = 8, **_) -> int:
    """Bytes per token that one more chosen layer keeps: what D_i and the side block read."""
    return itemsize * (config.hidden_size + config.hidden_size // reduction)


def lst(
    reduction: int = 8,
    init: str = "magnitude",
    layers: Sequence[int] | None = None,
    merge_last: bool = False,
    information: Mapping[str, Any] | None = None,
) -> Method:
    """Ladder side-tuning of any model with visible layers.

    Args:
      reduction: by which the widths of the side network are smaller (r of the paper).
      init: how side blocks start: "magnitude", "fisher" (the backbone's, pruned) or "random".
      layers: those that have a rung, ascending from 0; None: all. (The paper leaves out 0, 4 and 8 of T5-base's 12.)
      merge_last: whether the backbone's last state is mixed into the result.
      information: for "fisher", what `fisher_information` returned; None: it is calculated from batches of the
        training data. It is read at initialisation only.

    Returns:
      The method; it trains `lst/...` and has no merged form.

    Raises:
      InputError: for a reduction that does not divide the model's widths, an unknown init, or layers it lacks.
    """
    if init not in INITS:
        raise InputError(f"lst: init {init!r} is not one of {', '.join(INITS)}")
    check_settings("lst", reduction, layers)
    if information is not None and not isinstance(information, Mapping):
        raise InputError("lst: information should be what jaxpeft.methods.lst.fisher_information returns")
    config = {"reduction": reduction, "init": init, "layers": layers, "merge_last": merge_last}

    def forward(model, view):
        check_run("lst", model)
        small = narrowed(model, reduction, layers)

        def start(key, params):
            params = model.init(key, params)
            if "lst" in params:
                return params
            own = jax.random.fold_in(key, zlib.crc32(b"lst"))
            chosen = check_layers("lst", layers, count_layers("lst", params))
            matter = information
            if init == "fisher" and matter is None and view.batches is not None:
                loss = view.loss or probes.by_content
                of_base = {path: leaf for path, leaf in tree.flatten(params).items() if path in view.shapes}
                # A plan has no batches and needs shapes alone, which the size of the parameters gives as well.
                matter = fisher_information(view.base, tree.unflatten(of_base), view.batches(), loss) or params
            return {**params, "lst": _start(model, small, params, chosen, own, init, merge_last, matter)}

        def run(stack, params, batch, key=None, cache=None):
            return _climb(stack, small, params, batch, key, cache, layers)

        caches = {"base": model.stack.init_cache, "side": small.stack.init_cache}

        def init_cache(rows, length):
            return {name: empty(rows, length) for name, empty in caches.items()}

        return model._replace(
            init=start,
            stack=model.stack._replace(
                run=run, init_cache=init_cache if model.stack.init_cache else None, frozen_layers=True
            ),
        )

    return Method(
        forward=forward,
        roles=trains(lambda path: path.startswith("lst/")),
        merge=no_merge("lst"),
        specs=(Spec("lst", config),),
    )


# The forward pass.


def _mix(alpha, a, b):
    mu = jax.nn.sigmoid(alpha / TEMPERATURE).astype(a.dtype)
    return mu * a + (1 - mu) * b


def _climb(stack: Stack, small: Model, params: tree.Params, batch: Batch, key, cache, layers):
    """`run` of the whole model: the frozen pass, then the side network's blocks on what it left."""
    own = params["lst"]
    chosen = check_layers("lst", layers, count_layers("lst", params))
    found = frozen_pass(stack, params, batch, chosen, cache and cache["base"])
    ctx = found.ctx
    if "rotary" in ctx.rows:  # narrower heads turn with the frequencies of the channels that they kept
        rotary = ctx.rows["rotary"]
        step = 2 * rotary["cos"].shape[-1] // small.config.head_dim
        ctx = ctx.add(rows={"rotary": jax.tree.map(lambda table: table[..., ::step], rotary)})

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def rung(g, per_rung, number, past):
        leaves, h, index = per_rung
        g = _mix(leaves["alpha"], g, linear(h, leaves["down"]))
        return small.stack.block(leaves["block"], g, ctx.at(index, key), past, "layers")

    g = linear(found.embedded, own["first"])
    rungs = (own["rungs"], found.kept, jnp.asarray(chosen, jnp.int32))
    g, side = decoding.scan(rung, g, rungs, range(len(chosen)), cache and cache["side"])
    out = linear(_NORM.apply({"params": own["norm"]}, g), own["up"])
    if "alpha" in own:
        out = _mix(own["alpha"], out, found.last)
    if found.cache is not None and side is not None:
        cache = {name: decoding.advanced(c, g.shape[1]) for name, c in (("base", found.cache), ("side", side))}
    return out, cache


# The side network's shape and start.


def narrowed(model: Model, reduction: int, layers: Sequence[int] | None = None) -> Model:
    """The model's own family at 1 / reduction of its widths, with a layer for every rung.

    As many heads as divide are left out; what remains of the reduction narrows them. The groups of grouped queries stay
    whole.
    """
    width("lst", model)
    c = model.config
    size = functools.partial(divided, "lst", factor=reduction)
    heads = c.num_attention_heads
    kv = getattr(c, "num_key_value_heads", heads)
    fewer = math.gcd(kv, reduction)
    changes = {
        "hidden_size": size("hidden size", c.hidden_size),
        "intermediate_size": size("MLP size", c.intermediate_size),
        "num_attention_heads": heads // fewer,
        "num_key_value_heads": kv // fewer,
        "head_dim": divided("lst", f"head size (times {fewer} heads left out)", _head_dim(c) * fewer, reduction),
        "num_hidden_layers": c.num_hidden_layers if layers is None else len(layers),
        "vocab_size": 1,
    }
    if changes["head_dim"] % 2 and hasattr(c, "rope_theta"):
        raise InputError(
            f"lst: reduction {reduction} leaves heads of {changes['head_dim']} channels; rotary needs pairs"
        )
    fields = {field.name for field in dataclasses.fields(c)}
    return models.model_of(dataclasses.replace(c, **{name: x for name, x in changes.items() if name in fields}))


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _start(model, small, params, chosen, key, init, merge_last, information) -> tree.Params:
    """The parameters under `lst`."""
    d, s, rungs = model.config.hidden_size, small.config.hidden_size, len(chosen)
    keys = jax.random.split(key, 4)
    if init == "random":
        blocks = small.init(keys[0], {})["layers"]
        first = jax.random.normal(keys[1], (d, s)) / d**0.5
        down = jax.random.normal(keys[2], (rungs, d, s)) / d**0.5
        up = jax.random.normal(keys[3], (s, d)) / s**0.5
    else:
        if init == "fisher" and information is None:
            raise InputError(
                "lst: init 'fisher' needs data: setup(..., batches=...), or `information` from fisher_information"
            )
        of_layers = _of_layers(params, chosen)
        weight = of_layers if information is None else _of_layers(information, chosen)
        blocks, picked = prune(of_layers, weight, model.config, small.config)
        first = jax.nn.one_hot(picked, d).T
        down = jnp.tile(first, (rungs, 1, 1))
        up = first.T
    own = {
        "first": {"kernel": first, "bias": jnp.zeros(s)},
        "rungs": {
            "down": {"kernel": down, "bias": jnp.zeros((rungs, s))},
            "alpha": jnp.zeros(rungs),
            "block": blocks,
        },
        "norm": {"scale": jnp.ones(s)},
        "up": {"kernel": jnp.zeros_like(up) if merge_last else up, "bias": jnp.zeros(d)},
    }
    return {**own, "alpha": jnp.zeros(())} if merge_last else own


def _of_layers(params: tree.Params, chosen: Sequence[int]) -> tree.Flat:
    """`{path below a layer: leaf}` of the chosen layers, adapters left out."""
    flat = tree.flatten(tree.join_layers(params)["layers"])
    index = jnp.asarray(chosen)
    return {path: dense(leaf)[index] for path, leaf in flat.items() if _axes(path)}


def _axes(path: str) -> tuple[str, ...]:
    return next((axes for pattern, axes in _AXES if re.fullmatch(pattern, path)), ())


def prune(layers: tree.Flat, weight: tree.Flat, big: Any, small: Any) -> tuple[tree.Params, jax.Array]:
    """Structured pruning: the channels, heads and units that matter most.

    Args:
      layers: `{path: leaf}` of stacked layers, (K, ...).
      weight: how much each entry matters, of the same shapes; the absolute value counts.
      big, small: configurations before and after.

    Returns:
      (nested parameters of `small`'s layers, the channels of the stream that stayed (s,) int32, ascending).
    """

    def matters(axis, path):
        """Sums of a kernel over all but the layer and one axis."""
        named = ("layer", *_axes(path))
        kept = {0, named.index(axis)}
        return jnp.abs(weight[path]).sum([i for i in range(len(named)) if i not in kept])

    def total(axis, paths):
        return sum(matters(axis, path) for path in paths)

    kernels = [path for path in layers if path.endswith("/kernel")]

    def touching(axis):
        return [path for path in kernels if axis in _axes(path)]

    heads, kv = big.num_attention_heads, getattr(big, "num_key_value_heads", big.num_attention_heads)
    dim, group, rungs = _head_dim(big), heads // kv, len(layers[kernels[0]])
    stream = _largest(total("hidden", touching("hidden")).sum(0), small.hidden_size)
    units = _largest(total("mlp", touching("mlp")), small.intermediate_size)
    of_heads = total("query", touching("query")).reshape(rungs, kv, -1).sum(-1)
    of_heads += total("key", touching("key")).reshape(rungs, kv, -1).sum(-1)
    chosen = _largest(of_heads, getattr(small, "num_key_value_heads", small.num_attention_heads))  # (K, kv')
    inside = jnp.arange(_head_dim(small)) * (dim // _head_dim(small))
    queries = (chosen[..., None] * group + jnp.arange(group)).reshape(rungs, -1)
    stays = {
        "hidden": jnp.tile(stream, (rungs, 1)),
        "head": jnp.tile(inside, (rungs, 1)),
        "key": (chosen[..., None] * dim + inside).reshape(rungs, -1),
        "query": (queries[..., None] * dim + inside).reshape(rungs, -1),
        "mlp": units,
    }

    def smaller(path):
        leaf = layers[path]
        for i, axis in enumerate(_axes(path)):
            leaf = jax.vmap(functools.partial(jnp.take, axis=i))(leaf, stays[axis])
        return leaf

    return tree.unflatten({path: smaller(path) for path in layers}), stream


def _largest(scores: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` largest along the last axis, ascending."""
    return jnp.sort(jax.lax.top_k(scores, count)[1], axis=-1)


def fisher_information(
    model: Model,
    params: tree.Params,
    batches: Iterable[Batch],
    loss: Callable[..., Any] = completion_loss,
) -> tree.Params:
    """The diagonal of the empirical Fisher information of a model's layers: the mean of squared gradients over batches.

    Args:
      model: the base.
      params: its parameters (nested).
      batches: a few; the fewer rows each has, the better the estimate.
      loss: (model, params, batch, key) -> (loss, aux).

    Returns:
      Nested float32 arrays like `params`, layers only; {} without batches.
    """
    layers, rest = tree.split(params, tree.stacked)

    @jax.jit
    def squared(batch):
        grads = jax.grad(lambda layers: loss(model, tree.combine(layers, rest), batch, None)[0])(layers)
        return {path: grad.astype(jnp.float32) ** 2 for path, grad in grads.items()}

    total, count = None, 0
    for batch in batches:
        found = squared(batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += 1
    return {} if total is None else tree.unflatten(jax.tree.map(lambda x: x / count, total))


ABOUT = About(
    summary="a small transformer beside the frozen one, reading each of its layers",
    level="stack",
    trains="the side network",
    saves="the backbone's backward pass, and all activations but d (1 + 1 / reduction) numbers per token and layer",
    reference="Sung et al. 2022, arXiv:2206.06522",
    example={"reduction": 4},
    promises=Promises(layer_bytes=layer_bytes, starts_at_base=False, merges=False),
)
