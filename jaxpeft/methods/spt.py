"""SPT: each query reads the keys that share most codes with it, each token the blocks of the MLP that a router chooses.

    codes   z (D) of a query or key in M parts of D / M numbers; its code m is the codeword c of C_m (E, D / M) with the
            smallest |z_m - c|_1
    kept    of the keys that a query may see the L = ceil(keep K) with the most codes equal to its own, ties to the
            latest; all where there are no more than L
    scores  clip(<q, k> / sqrt(D), -10, 10), a softmax over the kept keys alone, and their values
    router  p = sigmoid(x R), R (d, G); K the ceil(active G) blocks of f / G neurons with the largest p
    MLP     y = sum over b in K of (2 p_b h_b) W_d,b + s (sum over b in K of h_b A_d,b) B_d
            h_b = act(x W_b + s x A B_b)

W frozen; R, the LoRA factors A and B of each kernel (s = alpha / r) and the codebooks C trained. 2 p is 1 where the
router knows nothing, and the only way by which it learns. C follows the queries and keys, which it does not change, by

    mean (z - hard)^2 + mean (soft - hard)^2,    soft = sum over E of softmax(-|z_m - c|_1) c, hard the nearest c

in every `refresh`-th step; its value is no part of the loss that is reported ("pq" of the metrics). It begins with the
layer's own queries and keys of random vectors. Queries and keys are those after rotary positions; a codebook is that of
a key-value head, and the queries' that read it.

Attention is sparse in a training step. Evaluation and decoding read all keys, for there is no backward pass to spare:
what trains is the LoRA of a model that reads few keys, and the codebooks only say which. The router is part of the
model, in every pass. In a training step a block has room for ceil(capacity S |K| / G) of a row's S tokens, the first
that choose it; the rest go without it ("dropped" of the metrics, a share), and evaluation has room for all. Who is in
time depends on no later token. Padding takes no room.

Kept for the backward pass: of the MLP the gate and up of what the blocks have room for, capacity |K| / G of them, and
the router's x; of attention what the fused kernel keeps, and the codes, a byte each. Scores are made for a few queries
at a time, of all keys, and masked: a gathered key is D numbers for each query and head that reads it, where its score
is one. So the s x s scores, which the paper spares, are in neither, and attention costs more work than with the fused
kernel, not less. The MLP's products are of the blocks' room alone. A packed kernel is unpacked for them.

With active=1 there is no router and the MLP is the model's; keep=1: attention is. Merged, LoRA is folded into the
kernels and the codebooks are gone; a routed MLP has no merged form.

Paper: Gui et al. 2023, "SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification",
arXiv:2312.10365, and its code: L of an eighth of the keys, half of the blocks for OPT, a quarter for LLaMA. Deviations:
the room of blocks, as shapes are static; dense evaluation; its sizes of codewords and blocks are not known, and those
here are ours, as are the codebooks' start, the steps between their updates and that heads have their own. (`spt_lora`
is of another paper, with sensitivities.)
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import features, few_keys, sites, tree
from jaxpeft import targets as choices
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Leaves, Method, Moment, Spec, trains, unchanged
from jaxpeft.methods import lora as _lora
from jaxpeft.methods.mixlora import Factors, of_mlp
from jaxpeft.model import Batch, Context, Model
from jaxpeft.models.layers import MLP, Attention, GatedMLP
from jaxpeft.quant import dense

NAME = "spt"
_again = functools.partial(jax.checkpoint, prevent_cse=False)


class Sizes(NamedTuple):
    """What `spt` is told, by the same names, and `scale`, s of LoRA."""

    keep: float
    code_size: int
    codewords: int
    active: float
    blocks: int
    capacity: float
    scale: float

    @property
    def chosen(self) -> int:
        """|K|, blocks of a token."""
        return -int(-self.active * self.blocks // 1)

    def room(self, tokens: int) -> int:
        """Tokens of a row that a block takes in a training step."""
        return min(tokens, math.ceil(self.capacity * tokens * self.chosen / self.blocks))


def spt(
    rank: int = 8,
    alpha: float | None = None,
    targets: _lora.Targets = "all-linear",
    keep: float = 0.125,
    code_size: int = 8,
    codewords: int = 16,
    refresh: int = 10,
    active: float = 0.5,
    blocks: int = 8,
    capacity: float = 1.25,
) -> Method:
    """LoRA with attention to few keys, and MLPs of few blocks.

    Args:
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank.
      targets: of LoRA: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      keep: of the keys of a row, the share that a query reads in a training step; 1: attention is the model's own.
      code_size: D / M, numbers of a head that one code stands for; it divides the size of a head.
      codewords: E, of a codebook, 2 to 127.
      refresh: steps from one update of the codebooks to the next.
      active: of an MLP's blocks, the share that each token takes; 1: the MLP is the model's own.
      blocks: G, of an MLP; it divides the number of its neurons.
      capacity: of a block, how many times the tokens that it had if all blocks had as many.

    Returns:
      The method; it trains LoRA's `<site>/spt/a` (L, n, r) and `b` (L, r, m), `layers/self_attn/spt/codebooks`
      (L, key-value heads, M, E, D / M) and `layers/mlp/spt/router` (L, d, G).

    Raises:
      InputError: for a share outside (0, 1], another number out of range, sizes that do not divide the model's, targets
        that match nothing, or a model without attention or MLPs of the library. When it is traced: for a chain that
        runs the layers in a way that loses what they say, or that has adapters in a routed MLP.
    """
    config = dict(locals())
    _lora.check_rank(NAME, rank)
    _lora.check_alpha(NAME, alpha)
    for name, share in (("keep", keep), ("active", active)):
        if not 0 < share <= 1:
            raise InputError(f"spt: {name} {share} must be above 0 and at most 1")
    for name, count in (("code_size", code_size), ("refresh", refresh), ("blocks", blocks)):
        if count < 1:
            raise InputError(f"spt: {name} {count} must be at least 1")
    if not 2 <= codewords <= 127:
        raise InputError(f"spt: codewords {codewords} must be at least 2 and at most 127")
    if not 1 <= capacity < float("inf"):
        raise InputError(f"spt: capacity {capacity} must be a finite number of at least 1")
    scale = (alpha if alpha is not None else rank) / rank
    sizes = Sizes(keep, code_size, codewords, active, blocks, capacity, scale)
    choose = _lora.chosen_sites(NAME, targets, lambda site: rank)

    def adapter(site):
        return Factors(rank) if of_mlp(site) and active < 1 else _lora.LoRA(rank, scale)

    def forward(model, view):
        model = sites.attach(model, NAME, adapter, choose)
        return model if keep == active == 1 else sparse(model, sizes)

    def loss(inner, view):
        return functools.partial(_loss, inner)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        idle = moment.step % refresh != 0
        own = [path for path in leaves.trained if path.endswith(f"/{NAME}/codebooks")]
        back = {path: jnp.where(idle, moment.before[path], leaves.trained[path]) for path in own}
        return leaves._replace(trained={**leaves.trained, **back})

    return Method(
        forward=forward,
        roles=trains(lambda path: f"/{NAME}/" in path),
        loss=unchanged if keep == active == 1 else loss,
        move=unchanged if keep == 1 or refresh == 1 else move,
        merge=functools.partial(_merge, scale),
        specs=(Spec(NAME, config),),
    )


def _merge(scale: float, params: tree.Params) -> tree.Params:
    flat = tree.flatten(params)
    if any(path.endswith(f"/{NAME}/router") for path in flat):
        raise InputError(f"{NAME}: has no merged form; each token chooses its blocks of the MLP (with active=1 it has)")
    left = {path: leaf for path, leaf in flat.items() if not path.endswith(f"/{NAME}/codebooks")}
    return _lora.fold(tree.unflatten(left), NAME, lambda site: scale, lambda leaves, n: (leaves["a"], leaves["b"]))


# The MLP.


def places(chosen: jax.Array, room: int) -> jax.Array:
    """(B, room) int32: the first tokens of each row (B, S) that have chosen a block, S where there are no more."""
    b, s = chosen.shape
    place = jnp.where(chosen, jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1, room)
    tokens = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
    return jax.vmap(lambda place, t: jnp.full(room, s, jnp.int32).at[place].set(t, mode="drop"))(place, tokens)


def _picked(x: jax.Array, at: jax.Array | None) -> jax.Array:
    """The tokens (B, C, ...) at places of x (B, S, ...), 0 where there is none; None: all."""
    return x if at is None else jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(x, at)


def _added(whole: jax.Array, part: jax.Array, at: jax.Array | None) -> jax.Array:
    part = part.astype(whole.dtype)
    return whole + part if at is None else jax.vmap(lambda y, p, at: y.at[at].add(p, mode="drop"))(whole, part, at)


class Sparse:
    """One layer as it runs: an interceptor of Flax modules.

    said: (B, 2) float32, what its codebooks lose, and the share of the blocks' tokens that went without.
    """

    def __init__(self, sizes: Sizes, ctx: Context, x: jax.Array):
        self.sizes, self.ctx = sizes, ctx
        self.said = jnp.zeros((x.shape[0], 2), jnp.float32)

    def __call__(self, next_function, args, kwargs, context):
        module, method = context.module, context.method_name
        own = module.variables.get("params", {}).get(NAME, {}) if module.scope is not None else {}
        if isinstance(module, Attention) and method == "attended" and "codebooks" in own and self.ctx.key is not None:
            q, k, v, where = args
            options = (self.sizes.keep, module.window, module.causal)
            out, lost = few_keys.attend(q, k, v, where, own["codebooks"], *options)
            self.said = self.said.at[:, 0].set(lost)
            return out
        if isinstance(module, MLP | GatedMLP) and method == "__call__" and "router" in own:
            return self.routed(module, *args)
        return next_function(*args, **kwargs)

    def routed(self, mlp: Any, x: jax.Array) -> jax.Array:
        """The MLP of x (B, S, d) in the blocks that its router chooses."""
        params, count, scale = mlp.variables["params"], self.sizes.blocks, self.sizes.scale
        _check_alone(mlp, params)
        segments = features.segments_in(NAME, self.ctx, x)
        logits = jnp.matmul(x, params[NAME]["router"].astype(x.dtype), preferred_element_type=jnp.float32)
        logits = checkpoint_name(logits, "router_logits")
        room = self.sizes.room(x.shape[1]) if self.ctx.key is not None else x.shape[1]
        which = jnp.any(jax.lax.top_k(logits, self.sizes.chosen)[1][..., None] == jnp.arange(count), axis=-2)
        which = which if segments is None else which & (segments > 0)[..., None]
        gates = jnp.where(which, 2 * jax.nn.sigmoid(logits), 0)
        opening = [name for name in ("gate_proj", "up_proj") if name in params]
        kernels = {name: (params[name]["kernel"], params[name].get("bias")) for name in (*opening, "down_proj")}
        factors = {
            name: [params[name][NAME][f].astype(x.dtype) for f in "ab"] for name in kernels if NAME in params[name]
        }
        lows = {name: x @ factors[name][0] for name in opening if name in factors}
        size = kernels["up_proj"][0].shape[-1] // count

        @functools.partial(_again, static_argnums=(0, 1))
        def opened(name, block, x, at, kernel, bias, low, b):
            part = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, block * size, size, leaf.ndim - 1)
            y = _picked(x, at) @ part(dense(kernel, x.dtype))
            y = y if bias is None else y + part(bias).astype(y.dtype)
            return y if low is None else y + scale * (_picked(low, at) @ part(b))

        @functools.partial(_again, static_argnums=0)
        def closed(block, base, at, gate, kernel, a):
            part = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, block * size, size, 0)
            h = mlp.activated(*base)
            gated = _picked(gate, at)[..., None]
            y = (gated.astype(h.dtype) * h) @ part(dense(kernel, h.dtype))
            return y, None if a is None else jnp.where(gated > 0, h, 0) @ part(a)

        down, a = kernels["down_proj"], factors.get("down_proj", [None])[0]
        zeros = lambda width: jnp.zeros((*x.shape[:2], width), jnp.float32)
        y, low = zeros(x.shape[-1]), zeros(0 if a is None else a.shape[-1])
        for block in range(count):
            at = None if room == x.shape[1] else checkpoint_name(places(which[..., block], room), "block_tokens")
            base = [
                checkpoint_name(
                    opened(name, block, x, at, *kernels[name], lows.get(name), factors.get(name, [None, None])[1]), name
                )
                for name in opening
            ]
            own, own_low = closed(block, base, at, gates[..., block], down[0], a)
            y = _added(y, own, at)
            low = low if own_low is None else _added(low, own_low, at)
        over = jnp.sum(jnp.maximum(jnp.sum(which, axis=1) - room, 0), axis=-1)
        self.said = self.said.at[:, 1].set(over / jnp.maximum(jnp.sum(which, axis=(1, 2)), 1))
        y = y.astype(x.dtype)
        y = y if a is None else y + scale * (low.astype(x.dtype) @ factors["down_proj"][1])
        return y if down[1] is None else y + down[1].astype(y.dtype)


def _check_alone(mlp: Any, params: Mapping[str, Any]) -> None:
    """Refuses a chain's other adapters in a routed MLP, whose blocks they would not see."""
    kernels = params.keys() & {"gate_proj", "up_proj", "down_proj"}
    others = params.keys() - kernels - {NAME}
    others |= {name for kernel in kernels for name in params[kernel]} - {"kernel", "bias", NAME}
    path = "/".join(mlp.path)
    for entry in sites.in_force():
        if entry.chosen is not None and any(f"/{path}/" in f"/{site}" for site in entry.chosen):
            others.add(entry.name)
    if gradient := sites.factor_gradient_of():
        others.add(gradient)
    if others:
        raise InputError(
            f"spt: {min(others)} is in {path}, of which each token takes some blocks; give it targets elsewhere, or "
            "active=1"
        )


# The model.


def sparse(model: Model, sizes: Sizes) -> Model:
    """The model with codebooks at its attention and routers at its MLPs, and with what they say beside the stream."""
    if not model.stack.layered:
        raise InputError("spt: this model shows no layers; use one of jaxpeft.models, or lora")
    inner = model.stack

    def init(key, params):
        flat = tree.flatten(model.init(key, params))
        if sizes.keep < 1:
            flat |= few_keys.start(NAME, model, tree.unflatten(flat), key, sizes.codewords, sizes.code_size)
        ends = lambda path: tree.stacked(path) and path.endswith("/up_proj/kernel")
        mlps = [path.removesuffix("/up_proj/kernel") for path in flat if ends(path)]
        if not mlps and sizes.active < 1:
            raise InputError("spt: this model shows no MLPs to route; give active=1")
        for mlp in mlps if sizes.active < 1 else ():
            layers, inputs, neurons = flat[f"{mlp}/up_proj/kernel"].shape
            if neurons % sizes.blocks:
                fits = next(count for count in range(sizes.blocks, 0, -1) if neurons % count == 0)
                raise InputError(f"spt: blocks {sizes.blocks} does not divide {mlp}'s {neurons} neurons; {fits} does")
            if (path := f"{mlp}/{NAME}/router") not in flat:
                own = jax.random.fold_in(key, zlib.crc32(path.encode()))
                flat[path] = 0.02 * jax.random.normal(own, (layers, inputs, sizes.blocks))
        return tree.unflatten(flat)

    def layer(function):
        def call(layer, x, ctx, cache, segment):
            running = Sparse(sizes, ctx, x)
            with nn.intercept_methods(running):
                y, past = function(layer, x, ctx, cache, segment)
            return (y, past) if cache is not None else (y, {**(past or {}), NAME: running.said})

        return call

    return model._replace(init=init, stack=inner.map_layers(layer)._replace(sums=(*inner.sums, (NAME, 2))))


# The loss.


def _loss(inner: Callable[..., Any], model: Model, params: tree.Params, batch: Batch, key=None):
    """(loss, aux): its value is `inner`'s, its gradient that with the codebooks' own loss too."""
    if key is None:
        return inner(model, params, batch, key)
    ran, said = features.said_by_layers(NAME, "the codebooks", "keep=1 and active=1", model, params, batch, key)
    value, aux = inner(ran, params, batch, key)
    off, dropped = (features.mean_of_rows(jnp.mean(said[..., i], axis=0), batch) for i in range(2))
    return value + off - jax.lax.stop_gradient(off), {**aux, "pq": off, "dropped": dropped}


def block_bytes(
    config: Any,
    itemsize: int,
    rank: int = 8,
    targets: Any = "all-linear",
    keep: float = 0.125,
    code_size: int = 8,
    active: float = 0.5,
    blocks: int = 8,
    **_,
) -> float:
    """Bytes per token that one layer keeps beyond a frozen backbone's, with room for all tokens in all blocks."""
    d, heads = config.hidden_size, config.num_attention_heads
    has = lambda module, *names: sum(choices.chooses(targets, f"layers/{module}/{name}") for name in names)
    qkv, mlp = has("self_attn", "q_proj", "k_proj", "v_proj"), has("mlp", "gate_proj", "up_proj", "down_proj")
    read = d * bool(qkv) + has("self_attn", "o_proj") * heads * config.head_dim
    read += d * bool(mlp or active < 1) + rank * (qkv + has("self_attn", "o_proj") + mlp)
    if active == 1:
        read += has("mlp", "down_proj") * config.intermediate_size
    codes = (heads + config.num_key_value_heads) * config.head_dim // code_size if keep < 1 else 0
    router = 3 * 4 * blocks if active < 1 else 0  # logits, gates, whose turn it is
    return read * itemsize + codes + router


def row_bytes(config: Any, itemsize: int, **_) -> int:
    """Bytes per row of what all layers say, and of its gradient."""
    del itemsize
    return 2 * (2 * 4) * config.num_hidden_layers


ABOUT = About(
    summary="LoRA with attention to the keys of like codes, and MLPs of which a router chooses blocks for each token",
    level="module",
    trains="A and B, r(n+m) numbers per kernel, a router, d G numbers per MLP, and codebooks, a head's E words",
    saves="gradients and optimizer state of all but these; gate and up of the blocks that a token does not take",
    reference="Gui et al. 2023, arXiv:2312.10365",
    example={"rank": 4, "keep": 0.25, "code_size": 4, "codewords": 4, "blocks": 2},
    promises=Promises(block_bytes=block_bytes, row_bytes=row_bytes, starts_at_base=False, merges=False),
)
