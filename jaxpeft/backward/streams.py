"""The numbers of a reversible model's streams: fixed point, where multiplying by a fraction can be undone, or floating.

In int32, with lam = n / 2^k and n odd: n x is computed modulo 2^32 and its low k bits, which the division shifts out,
are kept. Then

    n x = 2^k y + the k bits         and x = n^-1 (n x) modulo 2^32

hold for every value, overflow included. (Reversible multiplication with a buffer of lost bits: Maclaurin et al. 2015,
arXiv:1502.03492; fixed point for reversible networks: MacKay et al. 2018, arXiv:1810.10999.)
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError


class Fixed(NamedTuple):
    """Streams as int32 multiples of 2^-bits."""

    bits: int = 16

    def encode(self, x: jax.Array) -> jax.Array:
        """Rounds to nearest."""
        return _integers(x.astype(jnp.float32) * 2.0**self.bits)

    def decode(self, s: jax.Array, dtype: Any) -> jax.Array:
        """The value, rounded to the type."""
        return (s.astype(jnp.float32) * 2.0**-self.bits).astype(dtype)

    def add(self, s: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(s + x, whether every element of x and of the sum is a number in range, ())."""
        term = self.encode(x)
        total = s + term
        inside = jnp.all(jnp.abs(x.astype(jnp.float32)) < 2.0 ** (31 - self.bits))  # NaN is not
        return total, inside & jnp.all(((s ^ total) & (term ^ total)) >= 0)

    def multiply(self, s: jax.Array, factor: Fraction) -> tuple[jax.Array, jax.Array | None]:
        """(s times factor, rounded down; the bits that are lost, packed, or None)."""
        n, k = factor.numerator, factor.denominator.bit_length() - 1
        product = s * jnp.int32(n)
        with jax.named_scope("save:remainder"):
            return product >> k, pack(product & (2**k - 1), k) if k else None

    def divide(self, s: jax.Array, factor: Fraction, lost: jax.Array | None) -> jax.Array:
        """The inverse of `multiply`."""
        n, k = factor.numerator, factor.denominator.bit_length() - 1
        product = s if lost is None else (s << k) | unpack(lost, k, s.shape[-2])
        inverse = pow(n, -1, 2**32)
        return product * jnp.int32(inverse - 2**32 if inverse >= 2**31 else inverse)


@jax.custom_jvp
def _integers(x: jax.Array) -> jax.Array:
    """x float32 rounded to int32. Their derivative, which JAX takes for zero, is refused."""
    return jnp.round(x).astype(jnp.int32)


@_integers.defjvp
def _(primals, tangents):
    raise InputError(
        "streams in fixed point have no derivative in forward mode: give meft exact=False, or leave it out"
    )


class Float(NamedTuple):
    """Streams in a floating type, inverted up to rounding."""

    dtype: Any = jnp.float32

    def encode(self, x):
        """To the streams' type."""
        return x.astype(self.dtype)

    def decode(self, s, dtype):
        """To the blocks' type."""
        return s.astype(dtype)

    def add(self, s, x):
        """What is not finite stays visible in the sum."""
        return s + self.encode(x), jnp.ones((), bool)

    def multiply(self, s, factor):
        """Nothing is kept."""
        return s * jnp.asarray(float(factor), self.dtype), None

    def divide(self, s, factor, lost):
        """Exact only without rounding."""
        del lost
        return s / jnp.asarray(float(factor), self.dtype)


def pack(values: jax.Array, bits: int) -> jax.Array:
    """int32 (..., S, d) of values below 2^bits -> uint32 (..., bits * ceil(S / 32), d): 32 positions in a word.

    Positions, not features, share a word: the features stay in a vector unit's lanes.
    """
    *lead, length, d = values.shape
    values = jnp.pad(values, [*[(0, 0)] * len(lead), (0, -length % 32), (0, 0)]).astype(jnp.uint32)
    words = values.reshape(*lead, 1, -1, 32, d) >> jnp.arange(bits, dtype=jnp.uint32)[:, None, None, None] & 1
    words = jnp.sum(words << jnp.arange(32, dtype=jnp.uint32)[:, None], axis=-2, dtype=jnp.uint32)
    return words.reshape(*lead, -1, d)


def unpack(words: jax.Array, bits: int, length: int) -> jax.Array:
    """The inverse of `pack`: int32 (..., length, d)."""
    *lead, _, d = words.shape
    planes = words.reshape(*lead, bits, -1, 1, d) >> jnp.arange(32, dtype=jnp.uint32)[:, None] & 1
    planes = planes.reshape(*lead, bits, -1, d) << jnp.arange(bits, dtype=jnp.uint32)[:, None, None]
    return jnp.sum(planes, axis=-3, dtype=jnp.uint32).astype(jnp.int32)[..., :length, :]
