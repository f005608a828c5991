"""Arrays in 8 bits with a scale per row, rounded at random so that their mean is exact."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Compressed(NamedTuple):
    """x ~ codes * scale. codes int8 (..., n), from -127 to 127; scale float32 (..., 1)."""

    codes: jax.Array
    scale: jax.Array


def compress(x: jax.Array, seed: jax.Array) -> Compressed:
    """8-bit codes of x (..., n) with a scale per row of n, rounded up or down at random: the mean over seeds is x.

    Args:
      x: any floating dtype.
      seed: () uint32.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    codes = jnp.floor(wide / scale + _uniform(x.shape, seed))
    return Compressed(jnp.clip(codes, -127, 127).astype(jnp.int8), scale)


def decompress(stored: Compressed, dtype: Any) -> jax.Array:
    """The values that the codes stand for."""
    return (stored.codes.astype(jnp.float32) * stored.scale).astype(dtype)


def _uniform(shape, seed):
    """Numbers in (0, 1) by an integer hash of position and seed (lowbias32, C. Wellons 2018).

    It fuses into whatever reads it; jax.random would cost more than the rounding itself.
    """
    z = jnp.zeros(shape, jnp.uint32) + seed
    for axis in range(len(shape)):
        z = (z ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
    z = (z ^ (z >> 16)) * jnp.uint32(0x7FEB352D)
    z = (z ^ (z >> 15)) * jnp.uint32(0x846CA68B)
    z = z ^ (z >> 16)
    return ((z >> 8).astype(jnp.float32) + 0.5) * (1 / (1 << 24))
