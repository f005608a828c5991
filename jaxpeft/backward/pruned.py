"""The largest numbers of each row, and where they are; what is read again is zero elsewhere.

    k = ceil(share n)                                      of a row of n channels
    values, index = the k entries of largest magnitude, and their channels
    x ~ values at index, 0 elsewhere

Values are kept as they are, places in the smallest unsigned integer that holds n - 1: k (2 + 2) bytes for a row of more
than 256 channels in bfloat16, 0.4 n for a tenth. A share of 1 is the array itself.

SlimFit (Ardakani et al. 2023, arXiv:2305.18513) keeps so of a norm's normalised rows, with a tenth and 4 bytes for a
place: a norm's derivative reads them beside one number of each row (jaxpeft/backward/norms.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Pruned(NamedTuple):
    """An array (..., n).

    values: (..., k), in its dtype.
    index: uint8, uint16 or uint32 (..., k), the channels.
    """

    values: jax.Array
    index: jax.Array


def count(n: int, share: float) -> int:
    """k of n channels."""
    return max(1, math.ceil(share * n - 1e-9))


def place_type(n: int) -> Any:
    """The smallest unsigned integer for the numbers of n channels."""
    return next(dtype for dtype in (jnp.uint8, jnp.uint16, jnp.uint32) if n - 1 <= jnp.iinfo(dtype).max)


def prune(x: jax.Array, share: float) -> Pruned:
    """Of each row of x (..., n) the k entries of largest magnitude; of equal ones the first."""
    n = x.shape[-1]
    index = jax.lax.top_k(jnp.abs(x), count(n, share))[1]
    return Pruned(jnp.take_along_axis(x, index, axis=-1), index.astype(place_type(n)))


def spread(stored: Pruned, n: int, dtype: Any) -> jax.Array:
    """The array (..., n)."""

    def row(values, index):
        return jnp.zeros((n,), dtype).at[index].set(values, unique_indices=True, mode="promise_in_bounds")

    for _ in stored.values.shape[:-1]:  # and no reshape, which would move rows that a mesh divides
        row = jax.vmap(row)
    return row(stored.values.astype(dtype), stored.index.astype(jnp.int32))
