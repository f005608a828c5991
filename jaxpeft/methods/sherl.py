"""SHERL: what the early layers say, without what they repeat, becomes the input of the last ones.

    F_1, ..., F_N                               outputs (B, S, d) of the early layers, under stop_gradient
    t_i = LN(P_i F_i)                           P_i (d, k) with bias, k = d / reduction; S_i = t_i for i < N, deep = t_N
    rho_i = sum_j relu(cos(S_i, S_j))           how often S_i is said, at least 1; for each token by itself
    w_i = relu(u . (S_i * deep)) / rho_i        then divided by their sum over i
    guide = sum_i w_i S_i + deep
    x = drop(LN(Q relu(guide))) + tanh(g / 0.1) F_N         Q (k, d) with bias, g () starting at zero

x takes the place of F_N as the input of the last `late` layers, which run with gradients; their weights are frozen. So
gradients pass through these only, and no product with a transposed kernel of an early layer exists.

Kept for the backward pass are F_i, which P_i reads: d per token and early layer, and the inputs of the late layers.
The rest is computed again for a few rows at a time. No token sees another one outside of the layers, so a decoder
stays causal and its cache is the model's own.

The model does not start at the base: at g = 0 the last layers read a fresh map of the guide alone.

Paper: Diao et al. 2024, arXiv:2407.07523. Deviations: none known; `late` is 1 where the paper chooses by task.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import decoding, features, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import drop
from jaxpeft.model import Batch, Stack, takes_stacks

TEMPERATURE = 0.1
EPSILON = 1e-6  # of the weights' sum, and of a vector's length


def layer_bytes(config: Any, itemsize: int, **_) -> int:
    """Bytes per token that one more early layer keeps: its output."""
    return itemsize * config.hidden_size


def sherl(reduction: int = 2, late: int = 1, layers: Sequence[int] | None = None, dropout: float = 0.1) -> Method:
    """SHERL on any model with visible layers.

    Args:
      reduction: d over k.
      late: how many of the last layers run with gradients.
      layers: early layers whose outputs are read, ascending from 0, the last one being `deep`; None: all of them.
      dropout: rate, on what the late layers read from the guide.

    Returns:
      The method; it trains `sherl/...` and has no merged form. The layers come in two segments, early and late.

    Raises:
      InputError: for a reduction that does not divide the model's width, layers that it lacks, no early layer or no
        late one, or a rate outside [0, 1).
    """
    features.check_settings("sherl", reduction, layers)
    config = {"reduction": reduction, "late": late, "layers": layers, "dropout": dropout}
    if not 0 <= dropout < 1:
        raise InputError(f"sherl: dropout {dropout} must be at least 0 and below 1")

    def boundary(params):
        count = features.count_layers("sherl", params)
        if not 1 <= late < count:
            raise InputError(f"sherl: late {late} must be at least 1 and below the model's {count} layers")
        return count - late

    def chosen(params):
        return features.check_layers("sherl", layers, boundary(params))

    def forward(model, view):
        features.check_run("sherl", model)
        d = features.width("sherl", model)
        k = features.divided("sherl", "hidden size", d, reduction)

        def init(key, params):
            params = model.init(key, params)
            if "sherl" in params:
                return params
            keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"sherl")), 3)
            own = {
                **features.fresh_projections(keys[0], len(chosen(params)), d, k),
                "confidence": jax.random.normal(keys[1], (k,)) / k**0.5,
                "out": features.fresh_linear(keys[2], k, d),
                "out_norm": features.fresh_norm(d),
                "gate": jnp.zeros(()),
            }
            return {**params, "sherl": own}

        def run(stack, params, batch, key=None, cache=None):
            return _run(stack, params, batch, key, cache, boundary(params), chosen(params), dropout)

        return model._replace(init=init, stack=model.stack._replace(run=run, frozen_layers=True))

    return Method(
        prepare=lambda params, view: tree.cut_layers(params, boundary(params)),
        forward=forward,
        roles=trains(lambda path: path.startswith("sherl/")),
        merge=features.no_merge("sherl"),
        specs=(Spec("sherl", config),),
    )


def _run(stack: Stack, params: tree.Params, batch: Batch, key, cache, boundary: int, layers, dropout: float):
    own, params = params["sherl"], tree.cut_layers(params, boundary)
    found = features.frozen_pass(stack, params, batch, layers, cache, until=boundary)
    x = features.by_rows(lambda f: aggregate(own, f), found.kept, axes=(1,))
    if key is not None and dropout:
        x = drop(x, dropout, key)
    x = x + jnp.tanh(own["gate"] / TEMPERATURE).astype(x.dtype) * found.last
    x, cache = _late(stack, params, x, found.ctx, found.cache, boundary)
    return x, cache and decoding.advanced(cache, x.shape[1])


def _late(stack: Stack, params: tree.Params, x: jax.Array, ctx, cache, boundary: int):
    """The layers that gradients pass through: (x, the cache)."""
    for segment, first, end in tree.segments(params):
        if first < boundary:
            continue

        def step(x, layer, index, past, segment=segment):
            def block(x, rows):
                return stack.block(layer, x, ctx.at(index)._replace(rows=rows), past, segment)

            if past is not None:
                return block(x, ctx.rows)
            return features.by_rows(lambda *args: block(*args)[0], x, ctx.rows, axes=(0, 0), tokens=2048), None

        frozen, stacked = jax.lax.stop_gradient(params[segment]), takes_stacks(stack.block)
        x, cache = decoding.scan(step, x, frozen, range(first, end), cache, stacked)
    return x, cache


def aggregate(own: tree.Params, f: jax.Array) -> jax.Array:
    """LN(Q relu(guide)) (B, S, d) of features (N, B, S, d)."""
    t = features.project(own, f)
    shallow, deep = t[:-1], t[-1]
    wide = shallow.astype(jnp.float32)
    unit = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), EPSILON)
    redundancy = jax.nn.relu(jnp.einsum("ibsk,jbsk->ijbs", unit, unit)).sum(1)
    weights = jnp.einsum("k,ibsk,bsk->ibs", own["confidence"], wide, deep.astype(jnp.float32))
    weights = jax.nn.relu(weights) / redundancy
    weights = weights / (weights.sum(0) + EPSILON)
    guide = jnp.einsum("ibs,ibsk->bsk", weights.astype(t.dtype), shallow) + deep
    return features.layer_norm(features.linear(jax.nn.relu(guide), own["out"]), **own["out_norm"])


ABOUT = About(
    summary="early layers' outputs without repetition, as the input of the last layers",
    level="stack",
    trains="the guide and its gate",
    saves="the early layers' backward pass, and all their activations but d numbers per token and layer",
    reference="Diao et al. 2024, arXiv:2407.07523",
    example={"reduction": 4},
    promises=Promises(layer_bytes=layer_bytes, starts_at_base=False, merges=False),
)
