"""Dropout masks from a counter: element (i, j) is kept by a hash of (seed, i, j), so that no mask is ever stored.

    keep(i, j) = hash(hash(i + seed) ^ j) >= rate      the hash read as a number in [0, 1)

Forward and backward kernels, and any tile of either, draw the same mask. The hash is two rounds of a 32-bit finaliser
(xor-shift and multiply, constants of "lowbias32" by Wellons 2018), in int32 arithmetic that wraps, which the vector
units of TPUs and GPUs both have.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# As int32: 0x7FEB352D and 0x846CA68B.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def hashed(h: jax.Array) -> jax.Array:
    """int32 -> int32, a bijection that mixes all bits."""
    h = (h ^ jax.lax.shift_right_logical(h, jnp.int32(16))) * jnp.int32(_FIRST)
    h = (h ^ jax.lax.shift_right_logical(h, jnp.int32(15))) * jnp.int32(_SECOND)
    return h ^ jax.lax.shift_right_logical(h, jnp.int32(16))


def keep(seed: jax.Array, rows: jax.Array, columns: jax.Array, rate: float) -> jax.Array:
    """Where elements are kept.

    Args:
      seed: () int32.
      rows: int32 row numbers in the whole array, of a shape that broadcasts with columns: (T, 1) or (T, n).
      columns: int32 column numbers, (1, n) or (T, n).
      rate: probability that an element is dropped, in [0, 1).

    Returns:
      bool of the broadcast shape.
    """
    bits = hashed(hashed(rows + seed) ^ columns)
    threshold = min(round(rate * 2**31), 2**31 - 1)
    return jax.lax.shift_right_logical(bits, jnp.int32(1)) >= jnp.int32(threshold)


def mask(seed: jax.Array, shape: tuple[int, int], rate: float) -> jax.Array:
    """The whole mask (T, n) bool."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    return keep(seed, rows, columns, rate)


def drop(x: jax.Array, seed: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout of x (T, n): x / (1 - rate) where kept, else 0; in x's dtype."""
    if not rate:
        return x
    # The factor is not a number of x's dtype, so it divides in float32.
    scaled = x.astype(jnp.float32) / (1 - rate)
    return jnp.where(mask(seed, x.shape, rate), scaled, 0).astype(x.dtype)
