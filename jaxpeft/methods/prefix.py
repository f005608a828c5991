"""Prefix tuning: trained keys and values in front of those of every layer.

    attention(q, [P_k; k], [P_v; v])        P_k, P_v (p, N, D) per layer, N key-value heads; k, v (S, N, D)

Every query sees the prefix, whatever its segment, its place and the layer's window. The prefix lies where a cache's
keys lie, behind the rotation of positions; tokens are at positions p, p + 1, ... The stream keeps its length.

    width     P_k, P_v of layer l = tanh(E D + c) U_l + e_l        E (p, d), D (d, w), U_l (w, 2 N D)

is the paper's reparametrisation, which `plain` turns into keys and values after training. Decoding puts the prefix into
the first slots of the cache. It cannot be merged into the base.

Kept for the backward pass: per row of the batch a copy of each layer's prefix beside its own keys and values. The
gradient still passes every layer of the frozen backbone.

Paper: Li & Liang 2021, "Prefix-Tuning", arXiv:2101.00190. Numbers and positions are those of Hugging Face PEFT.
`init="activations"`, what the model makes of p random tokens: Malladi et al. 2023, "MeZO", arXiv:2305.17333.

Deviations: the default start is not PEFT's, N(0, 1) (`init="random"`). The bias e_l (p, 2 N D) differs from token
to token, so that a reparametrised prefix can start at activations. In models with sliding windows PEFT lets them hide
the prefix from tokens further on; before these the numbers are the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.in_front import Front, heads_of, row_bytes
from jaxpeft.method import Method, Spec, trains
from jaxpeft.model import Context, Model, reads_stacks
from jaxpeft.peft import form

INITS = ("activations", "random", "zero")


def prefix(length: int = 30, init: str = "activations", width: int | None = None) -> Method:
    """Prefix tuning of every layer.

    Args:
      length: p.
      init: "activations": keys and values of p random tokens, of the model with the methods before this one; "random":
        N(0, 1); "zero".
      width: w of the reparametrisation; None: keys and values train themselves.

    Returns:
      The method. Where positions are counted the adapted model has room for p tokens fewer. What trains are
      `layers/prefix/k` and `layers/prefix/v` (L, p, N, D); with a width instead `prefix/embedding` (p, d),
      `prefix/down` (d, w), `prefix/down_bias` (w,), `layers/prefix/up` (L, w, 2 N D) and `layers/prefix/up_bias`
      (L, p, 2 N D).

    Raises:
      InputError: for a setting out of range. Of the model, when set up: if it shows no layers, or reads no tokens and
        starts from activations.
    """
    spec = (Spec("prefix", dict(locals())),)
    for name, value in (("length", length), ("width", width)):
        if value is not None and value < 1:
            raise InputError(f"prefix: {name} {value} must be at least 1")
    if init not in INITS:
        raise InputError(f"prefix: init {init!r} is not one of {', '.join(INITS)}")

    def forward(model: Model, view) -> Model:
        front = Front.of("prefix", model, length)
        if init == "activations" and not hasattr(model.config, "vocab_size"):
            raise InputError(f"prefix: {model.config.model_type} reads no tokens to start from; use init=random")

        def fresh(key, params):
            params = model.init(key, params)
            if all("prefix" in params[segment] for segment, _, _ in tree.segments(params)):
                return params
            keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"prefix")), 4)
            start = _start(model, params, length, init, keys[0])
            if width is not None:
                return _add_network(params, model.config, start, length, width, init == "random", keys[1:])
            for segment, first, end in tree.segments(params):
                own = {name: leaf[first:end] for name, leaf in start.items()}
                params = {**params, segment: {**params[segment], "prefix": own}}
            return params

        def embed(params, batch, key):
            x, ctx = model.stack.embed(params, front.batch(batch), key)
            return x, ctx.add(shared={"prefix": _hidden(params["prefix"])}) if "prefix" in params else ctx

        def with_prefix(function):
            def call(layer, x, ctx, cache, segment):
                own = _keys_values(layer["prefix"], ctx, model.config)
                layer = {name: leaf for name, leaf in layer.items() if name != "prefix"}
                return front.call(function, layer, x, ctx, cache, segment, own)

            return reads_stacks(call, like=function)

        stack = model.stack.map_layers(with_prefix)._replace(embed=embed, init_cache=front.cache(model.stack))
        return model._replace(init=fresh, stack=stack, config=front.config(model.config))

    def merge(params):
        raise InputError("prefix: has no merged form; serve it as the first entries of a cache")

    return Method(forward=forward, roles=trains(lambda path: "/prefix/" in f"/{path}"), merge=merge, specs=spec)


def plain(params: Mapping[str, Any], config: Any) -> tree.Params:
    """Nested parameters whose prefixes are keys and values: those of a reparametrised prefix, computed.

    Args:
      params: of a model with a prefix.
      config: the model's.
    """
    params = dict(params)
    if "prefix" not in params:
        return params
    ctx = Context(shared={"prefix": _hidden(params.pop("prefix"))})
    for segment, _, _ in tree.segments(params):
        own = jax.vmap(lambda leaves: _keys_values(leaves, ctx, config))(params[segment]["prefix"])
        params[segment] = {**params[segment], "prefix": own}
    return params


def _keys_values(own: Mapping[str, jax.Array], ctx: Context, config: Any) -> dict[str, jax.Array]:
    """k, v (p, N, D) of a layer."""
    if "k" in own:
        return {"k": own["k"], "v": own["v"]}
    both = ctx.shared["prefix"] @ own["up"] + own["up_bias"]
    k, v = both.reshape(len(both), 2, *heads_of(config)).swapaxes(0, 1)
    return {"k": k, "v": v}


def _hidden(own: Mapping[str, jax.Array]) -> jax.Array:
    """tanh(E D + c), (p, w): what the layers share."""
    return jnp.tanh(own["embedding"] @ own["down"] + own["down_bias"])


def _start(model: Model, params: tree.Params, length: int, init: str, key: jax.Array) -> dict[str, jax.Array]:
    """k, v (L, p, N, D), float32."""
    c = model.config
    if init != "activations":
        shape = (2, c.num_hidden_layers, length, *heads_of(c))
        k, v = jax.random.normal(key, shape) if init == "random" else jnp.zeros(shape)
        return {"k": k, "v": v}
    stack, parts = model.stack, []
    x, ctx = stack.embed(params, {"tokens": jax.random.randint(key, (1, length), 0, c.vocab_size)}, None)
    for segment, first, end in tree.segments(params):

        def body(x, per_layer, segment=segment):
            layer, index = per_layer
            x, seen = stack.block(layer, x, ctx.at(index), {}, segment)
            assert seen is not None
            return x, {name: seen[name][0].astype(jnp.float32) for name in ("k", "v")}

        x, part = jax.lax.scan(body, x, (params[segment], jnp.arange(first, end)))
        parts.append(part)
    return jax.tree.map(lambda *p: jnp.concatenate(p), *parts)


def _add_network(params, config, start, length, width, random, keys):
    """The parameters with a reparametrised prefix that starts at k, v; a random one at maps of random numbers."""
    d, outputs = config.hidden_size, 2 * heads_of(config)[0] * heads_of(config)[1]

    def uniform(key, *shape):
        return jax.random.uniform(key, shape, minval=-1, maxval=1) / shape[-2] ** 0.5

    own = {
        "embedding": jax.random.normal(keys[0], (length, d)),
        "down": uniform(keys[1], d, width),
        "down_bias": jnp.zeros(width),
    }
    layers = config.num_hidden_layers
    up = uniform(keys[2], layers, width, outputs) if random else jnp.zeros((layers, width, outputs))
    bias = jnp.stack([start["k"], start["v"]], axis=2).reshape(layers, length, outputs)
    params = {**params, "prefix": own}
    for segment, first, end in tree.segments(params):
        leaves = {"up": up[first:end], "up_bias": bias[first:end]}
        params = {**params, segment: {**params[segment], "prefix": leaves}}
    return params


# Hugging Face PEFT: keys and values of all layers in one tensor, whatever has made them.

_PROMPT = "prompt_embeddings"  # (p, L 2 N D)


def _prompt(config: Mapping[str, Any], leaves: tree.Flat, base: form.Base) -> dict[str, Any]:
    del config
    params = plain(tree.unflatten(leaves), base.config)
    parts = [params[segment]["prefix"] for segment, _, _ in tree.segments(params)]
    k, v = (jnp.concatenate([part[name] for part in parts]) for name in ("k", "v"))
    return {_PROMPT: form.from_keys_values(k.reshape(*k.shape[:2], -1), v.reshape(*v.shape[:2], -1))}


def _leaves(config: Mapping[str, Any], tensors: Mapping[str, Any], base: form.Base) -> tree.Flat:
    del config
    found = form.to_keys_values(tensors[_PROMPT], base.config.num_hidden_layers)
    heads = heads_of(base.config)
    return {f"layers/prefix/{name}": x.reshape(*x.shape[:2], *heads) for name, x in zip("kv", found, strict=True)}


def _fields(config: Mapping[str, Any], tensors: Mapping[str, Any], base: form.Base) -> dict[str, Any]:
    n, size = heads_of(base.config)
    return {
        "encoder_hidden_size": n * size,
        "num_attention_heads": n,
        "num_layers": base.config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config["length"],
        "prefix_projection": False,
        "token_dim": n * size,
    }


def _arguments(fields: Mapping[str, Any], tensors: Mapping[str, Any], base: form.Base) -> dict[str, Any]:
    del fields
    n, size = heads_of(base.config)
    length, width = tensors[_PROMPT].shape
    if width != 2 * base.config.num_hidden_layers * n * size:
        raise InputError(
            f"an adapter for another base: {width} numbers per token are not the keys and values of "
            f"{base.config.num_hidden_layers} layers of {n} heads of {size}"
        )
    return {"length": length}


PEFT = form.per_model(
    "PREFIX_TUNING",
    "prefix",
    (_PROMPT,),
    to_tensors=_prompt,
    from_tensors=_leaves,
    to_config=_fields,
    from_config=_arguments,
    fields="encoder_hidden_size init_weights num_attention_heads num_layers num_transformer_submodules "
    "num_virtual_tokens prefix_projection token_dim".split(),
)

ABOUT = About(
    summary="trained keys and values in front of those of every layer",
    level="input",
    trains="2 L p N D numbers: p keys and values per layer",
    saves="gradients and optimizer state of all but the prefix; no activations",
    reference="Li & Liang 2021, arXiv:2101.00190",
    example={"length": 4},
    promises=Promises(block_bytes=lambda *_, **__: 0, row_bytes=row_bytes, starts_at_base=False, merges=False),
    defaults=Defaults(lr=1e-2),
    peft=PEFT,
)
