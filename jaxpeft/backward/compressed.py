"""Arrays in 8 bits, rounded so that their mean over seeds is exact.

With u uniform in (0, 1), drawn again at decompression from the same seed (subtractive dither, Roberts 1962):

    y = (x - mean) / size              mean and root mean square per channel, over a row's tokens
    codes = floor(y / scale + u)       scale per token: max |y| / 127
    x ~ mean + size * scale * (codes - u + 1/2)

The error is uniform within half a step whatever x is: unbiased, at half the variance of rounding up or down at random
(ActNN, Chen et al. 2021, arXiv:2104.14129). Channels are shifted and scaled first because queries and keys have a few
large ones that are nearly the same for all tokens (KIVI, Liu et al. 2024, arXiv:2402.02750): they would decide every
token's step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft.backward.blocks import tokens_axis


class Compressed(NamedTuple):
    """An array (B, S, ..., n).

    codes: int8, of its shape.
    scale: float32 (B, S, ..., 1).
    mean, size: bfloat16 (B, 1, ..., n).
    seed: () uint32.
    """

    codes: jax.Array
    scale: jax.Array
    mean: jax.Array
    size: jax.Array
    seed: jax.Array


def compress(x: jax.Array, seed: jax.Array) -> Compressed:
    """8-bit codes of x; the mean of `decompress` over seeds is x.

    Args:
      x: (B, S, ..., n) of any floating dtype, below 1e30 in magnitude.
      seed: () uint32.
    """
    tokens = tokens_axis(x.shape)
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, tokens, keepdims=True).astype(jnp.bfloat16)
    wide = wide - mean
    size = jnp.sqrt(jnp.mean(wide * wide, tokens, keepdims=True))
    size = jnp.minimum(not_zero(size), 1e30).astype(jnp.bfloat16)  # squares of the largest numbers are infinite
    wide = wide / size
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    codes = jnp.floor(wide / not_zero(scale) + uniform(x.shape, seed))
    return Compressed(jnp.clip(codes, -127, 127).astype(jnp.int8), scale, mean, size, seed)


def decompress(stored: Compressed, dtype: Any) -> jax.Array:
    """The values that the codes stand for."""
    codes, scale, mean, size, seed = stored
    steps = codes.astype(jnp.float32) - (uniform(codes.shape, seed) - 0.5)
    return (mean + size * (scale * steps)).astype(dtype)


def not_zero(x):
    """x, or 1 where it is too small to divide by."""
    return jnp.where(x > 1e-30, x, 1.0)


def uniform(shape, seed):
    """Multiples of 2^-24 in (0, 1) by an integer hash of position and seed (lowbias32, C. Wellons 2018).

    It fuses into whatever reads it; jax.random would cost more than the rounding itself.
    """
    z = jnp.zeros(shape, jnp.uint32) + seed
    for axis in range(len(shape)):
        z = (z ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
    z = (z ^ (z >> 16)) * jnp.uint32(0x7FEB352D)
    z = (z ^ (z >> 15)) * jnp.uint32(0x846CA68B)
    z = z ^ (z >> 16)
    # 23 bits and a half: with one more the largest would be rounded to 1.
    return ((z >> 9).astype(jnp.float32) + 0.5) * (1 / (1 << 23))
