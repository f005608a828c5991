"""Blocks of channels, and numbers of 4 bits two to a byte, of arrays (B, S, ..., n) or (S, n)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def tokens_axis(shape: Sequence[int]) -> int:
    """The axis of tokens."""
    return min(1, len(shape) - 2)


def paired(x: jax.Array) -> jax.Array:
    """Numbers below 16, uint8 (B, S, ..., n), as (B, ceil(S / 2), ..., n).

    Token s is in the low bits, token s + ceil(S / 2) in the high.
    """
    axis = tokens_axis(x.shape)
    if x.shape[axis] % 2:
        x = jnp.pad(x, [(0, int(i == axis)) for i in range(x.ndim)])
    low, high = jnp.split(x, 2, axis=axis)
    return low | (high << 4)


def unpaired(pairs: jax.Array, shape: Sequence[int]) -> jax.Array:
    """What `paired` was given, of this shape."""
    axis = tokens_axis(shape)
    whole = jnp.concatenate([pairs & 0xF, pairs >> 4], axis=axis)
    return jax.lax.slice_in_dim(whole, 0, shape[axis], axis=axis)


def blocks(x: jax.Array, width: int) -> jax.Array:
    """(..., n) -> (..., ceil(n / width), width), zeros after the last; one block of n where n is less."""
    n = x.shape[-1]
    width = min(width, n)
    count = -(-n // width)
    if padding := count * width - n:
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, padding)])
    return x.reshape(*x.shape[:-1], count, width)


def of_each(values: jax.Array, n: int, width: int) -> jax.Array:
    """(..., blocks) -> (..., n): each channel's."""
    width = min(width, n)
    return jnp.broadcast_to(values[..., None], (*values.shape, width)).reshape(*values.shape[:-1], -1)[..., :n]
