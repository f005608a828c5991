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

from jaxpeft.backward.blocks import blocks, of_each, paired, unpaired

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
    # The type of the operand is bfloat16, so that XLA has to round: it may leave out a conversion there and back.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    exponents = ((bits >> 7) & 0xFF).astype(jnp.uint8)
    largest = jnp.max(blocks(exponents, BLOCK), axis=-1)
    offsets = jnp.minimum(of_each(largest, x.shape[-1], BLOCK) - exponents, _ZERO)
    signs = (bits >> 8).astype(jnp.uint8) & 0x80
    digits = jnp.where(offsets == _ZERO, signs, signs | (bits & 0x7F).astype(jnp.uint8))
    return Short(digits, paired(offsets), largest)


def lengthen(stored: Short, dtype: Any) -> jax.Array:
    """The values that the codes stand for."""
    digits, pairs, largest = stored
    offsets = unpaired(pairs, digits.shape)
    exponents = jnp.where(offsets == _ZERO, 0, of_each(largest, digits.shape[-1], BLOCK) - offsets)
    wide = digits.astype(jnp.uint16)
    bits = (wide & 0x80) << 8 | exponents.astype(jnp.uint16) << 7 | wide & 0x7F
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)
