"""Floats in 12 bits: the sign and 7 bits of mantissa of bfloat16 as they are, its exponent counted from the block's.

With E the exponent's 8 bits and M the largest E of a block of 128 channels of one token:

    byte     sign, mantissa                       one per number
    nibble   min(M - E, 15)                       two per byte: of two tokens, half a row apart
    M                                             one byte per block
    x ~ the number of this sign, mantissa and exponent M - nibble; 0 where the nibble is 15

A bfloat16 whose exponent is within 14 of the block's largest comes back to the bit; so do infinities and NaN. What is
smaller becomes zero of its sign: it is below 2^-14 of the block's largest number. All of a block that this can reach
is in norm below sqrt(128) 2^-14 < 2^-10 of that number, where bfloat16 may round it by 2^-8. Other types are
rounded to bfloat16 first, to the nearest, ties to even. Bits per number: 12 + 8 / 128.

The weights of trained networks have as little in their exponents (DFloat11, Zhang et al. 2025, arXiv:2504.11651, which
codes them by Huffman's method, and loses nothing); codes of one length can be read by any part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # channels with one largest exponent
_ZERO = 15  # the offset of what is too small


class Short(NamedTuple):
    """An array (B, S, ..., n).

    digits: uint8 (B, S, ..., n), sign and mantissa.
    offsets: uint8 (B, ceil(S / 2), ..., n), that of token s in the low bits and of token s + ceil(S / 2) in the high.
    largest: uint8 (B, S, ..., ceil(n / 128)), exponents.
    """

    digits: jax.Array
    offsets: jax.Array
    largest: jax.Array


def shorten(x: jax.Array) -> Short:
    """Codes of x (B, S, ..., n), or (S, n), of any floating dtype."""
    tokens = _tokens(x)
    # The type of the operand is bfloat16, so that XLA has to round: it may leave out a conversion there and back.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    exponents = ((bits >> 7) & 0xFF).astype(jnp.uint8)
    largest = jnp.max(_blocks(exponents), axis=-1)
    offsets = jnp.minimum(_of_each(largest, x.shape[-1]) - exponents, _ZERO)
    signs = (bits >> 8).astype(jnp.uint8) & 0x80
    digits = jnp.where(offsets == _ZERO, signs, signs | (bits & 0x7F).astype(jnp.uint8))
    low, high = jnp.split(_even(offsets, tokens), 2, axis=tokens)
    return Short(digits, low | (high << 4), largest)


def lengthen(stored: Short, dtype: Any) -> jax.Array:
    """The values that the codes stand for."""
    digits, pairs, largest = stored
    tokens = _tokens(digits)
    offsets = jnp.concatenate([pairs & 0xF, pairs >> 4], axis=tokens)
    offsets = jax.lax.slice_in_dim(offsets, 0, digits.shape[tokens], axis=tokens)
    exponents = jnp.where(offsets == _ZERO, 0, _of_each(largest, digits.shape[-1]) - offsets)
    wide = digits.astype(jnp.uint16)
    bits = (wide & 0x80) << 8 | exponents.astype(jnp.uint16) << 7 | wide & 0x7F
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)


def _tokens(x: jax.Array) -> int:
    """The axis of tokens."""
    return min(1, x.ndim - 2)


def _even(x: jax.Array, axis: int) -> jax.Array:
    """x, with a 0 at the end of an axis of odd length."""
    widths = [(0, x.shape[axis] % 2 if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if x.shape[axis] % 2 else x


def _blocks(x: jax.Array) -> jax.Array:
    """(..., n) -> (..., blocks, channels of a block), zeros after the last."""
    n = x.shape[-1]
    width = min(BLOCK, n)
    count = -(-n // width)
    if padding := count * width - n:
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, padding)])
    return x.reshape(*x.shape[:-1], count, width)


def _of_each(blocks: jax.Array, n: int) -> jax.Array:
    """(..., blocks) -> (..., n): each channel's."""
    width = min(BLOCK, n)
    return jnp.broadcast_to(blocks[..., None], (*blocks.shape, width)).reshape(*blocks.shape[:-1], -1)[..., :n]
