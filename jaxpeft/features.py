"""What a frozen backbone's layers say, for a network beside it.

    h_0 = embed(tokens)        h_{i+1} = block_i(h_i), i = 0 .. L - 1        all under stop_gradient

The layers run in the ordinary scan, without dropout, and write the outputs of the layers that somebody reads into one
array. Nothing in here is differentiated, so nothing else is kept and no product with a transposed kernel exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Cache, Model, Stack


class Features(NamedTuple):
    """A frozen forward pass.

    embedded: h_0 (B, S, d).
    kept: (K, B, S, d), the outputs of the chosen layers in order.
    last: h_L (B, S, d).
    ctx: the context without a layer's own entries.
    cache: the backbone's, after the pass; None without.
    """

    embedded: jax.Array
    kept: jax.Array
    last: jax.Array
    ctx: dict[str, Any]
    cache: Cache | None


def frozen_pass(
    stack: Stack, params: tree.Params, batch: Batch, layers: Sequence[int], cache: Cache | None = None
) -> Features:
    """Runs a stack's embedding and layers, from which no gradient comes back.

    Args:
      stack: the functions; `run` is not called.
      params: nested parameters.
      batch: as the model takes it.
      layers: whose outputs are kept, ascending, counted from 0.
      cache: None, or the backbone's, with leading axis L.
    """
    x, ctx = jax.lax.stop_gradient(stack.embed(params, batch, None))
    embedded, slots = x, jnp.asarray(layers, jnp.int32)
    kept = jnp.zeros((len(layers), *x.shape), x.dtype)
    parts = []
    for segment, first, end in tree.segments(params):

        def body(carry, per_layer, segment=segment):
            x, kept = carry
            layer, index, past = per_layer
            x, past = jax.lax.stop_gradient(stack.block(layer, x, {**ctx, "layer": index}, past, segment))
            # Every layer writes where the next chosen one will; what comes after the last is written nowhere.
            kept = kept.at[jnp.searchsorted(slots, index)].set(x, mode="drop")
            return (x, kept), past

        part = jax.tree.map(lambda c: c[first:end], cache)  # noqa: B023
        frozen = jax.lax.stop_gradient(params[segment])
        (x, kept), part = jax.lax.scan(body, (x, kept), (frozen, jnp.arange(first, end), part))
        parts.append(part)
    if cache is not None:
        cache = jax.tree.map(lambda *c: jnp.concatenate(c), *parts)
    return Features(embedded, kept, x, ctx, cache)


def count_layers(name: str, params: tree.Params) -> int:
    """L of a model's parameters.

    Raises:
      InputError: for a model that shows no layers.
    """
    segments = tree.segments(params)
    if not segments:
        raise InputError(f"{name}: this model shows no layers; use one of jaxpeft.models")
    return segments[-1][2]


def width(name: str, model: Model) -> int:
    """d of a model.

    Raises:
      InputError: for a model without a configuration.
    """
    if model.config is None:
        raise InputError(f"{name}: this model shows no layers; use one of jaxpeft.models")
    return model.config.hidden_size


def divided(name: str, what: str, size: int, factor: int) -> int:
    """size / factor.

    Raises:
      InputError: if it is no whole number.
    """
    if factor < 1 or size % factor:
        raise InputError(f"{name}: reduction {factor} does not divide the model's {what}, {size}")
    return size // factor


def check_layers(name: str, layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The chosen layers, counted from 0; None: all.

    Raises:
      InputError: unless they ascend within 0 .. count - 1.
    """
    if layers is None:
        return tuple(range(count))
    chosen = tuple(layers)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= count:
        raise InputError(f"{name}: layers {list(chosen)} should ascend and lie in 0 to {count - 1}")
    return chosen


def no_merge(name: str):
    """`merge` of a method whose network stays beside the model."""

    def merge(params):
        del params
        raise InputError(f"{name}: has no merged form; its network runs beside the model")

    return merge
