"""Arrays in 4 bits: blocks of 64 channels with a step of their own, the largest number of each block apart.

With u uniform in (0, 1), drawn again at decompression from the same seed, as in compressed.py,

    top                                of a block of 64 channels of one token, the x that is largest in magnitude
    step = max |other x| / 7           of the block
    codes = floor(x / step + u)        -7 to 7; -8 where |x| > 7 step, which only top is
    x ~ top  where the code is -8, else  step (codes - u + 1/2)

The error is uniform within half a step whatever x is: unbiased but for top, which is in bfloat16. No index is kept, as
a code that is left over says which one is apart. Bits per number: 4 + 2 * 16 / 64.

Channels are not shifted and scaled as those in 8 bits: a pretrained model's stream has single numbers a thousand times
as large as all others (Sun et al. 2024, arXiv:2402.17762), and a channel that one token has made large would be lost
for all of them. So queries and keys, which need it, are better kept in 8 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft.backward.blocks import blocks, of_each, paired, unpaired
from jaxpeft.backward.compressed import not_zero, uniform

BLOCK = 64  # channels with one step
_MOST = 7  # the largest code
_APART = 8  # the code, less 16, of what is larger


class Quarter(NamedTuple):
    """An array (B, S, ..., n).

    codes: uint8 (B, ceil(S / 2), ..., n), modulo 16, two to a byte (blocks.py).
    step, top: bfloat16 (B, S, ..., ceil(n / 64)).
    seed: () uint32.
    """

    codes: jax.Array
    step: jax.Array
    top: jax.Array
    seed: jax.Array


def quarter(x: jax.Array, seed: jax.Array) -> Quarter:
    """4-bit codes of x; the mean of `whole` over seeds is x, but for rounding to bfloat16.

    Args:
      x: (B, S, ..., n), or (S, n), of any floating dtype, below 1e30 in magnitude.
      seed: () uint32.
    """
    x = x.astype(jnp.float32)
    n, parts = x.shape[-1], blocks(x, BLOCK)
    high, low = jnp.max(parts, axis=-1), jnp.min(parts, axis=-1)
    top = jnp.where(high > -low, high, low)
    second = jnp.max(jnp.where(parts == top[..., None], 0, jnp.abs(parts)), axis=-1)
    # Upwards by more than bfloat16 rounds, which a conversion there and back might leave out: nothing else is apart.
    step = jax.lax.reduce_precision(second * ((1 + 2**-7) / _MOST), 8, 7)
    steps = of_each(step, n, BLOCK)
    codes = jnp.clip(jnp.floor(x / not_zero(steps) + uniform(x.shape, seed)), -_MOST, _MOST)
    codes = jnp.where(jnp.abs(x) > _MOST * steps, _APART, codes.astype(jnp.int8) & 0xF).astype(jnp.uint8)
    return Quarter(paired(codes), step.astype(jnp.bfloat16), top.astype(jnp.bfloat16), seed)


def whole(stored: Quarter, dtype: Any) -> jax.Array:
    """The values that the codes stand for."""
    pairs, step, top, seed = stored
    n = pairs.shape[-1]
    codes = unpaired(pairs, (*step.shape[:-1], n))
    signed = (codes ^ 8).astype(jnp.float32) - 8
    near = of_each(step, n, BLOCK) * (signed - (uniform(codes.shape, seed) - 0.5))
    return jnp.where(codes == _APART, of_each(top, n, BLOCK), near).astype(dtype)
