"""Normal noise from a counter, so that it is never stored: the same z wherever an element is looked at.

    h = hash(i + k0),   bits = hash(h ^ k1),   z = sqrt(2) erfinv(u),  u in (-1, 1) from the upper 23 bits

i is the element's number in its leaf, or in its layer's part of one; k0, k1, k2 come from a draw's three words, the
leaf's path, and the layer (k2 is for stochastic rounding and masks). All of it is elementwise, in int32 and float32,
so that a compiler makes it where it is used. A `Direction` is what W is perturbed along, z or a part of it; `Noisy` is
a table, W + eps d, whose rows and products are made without the whole.

The hash is that of dropout's masks (`pallas_kernels.dropout`): a bijection of 32 bits, so the elements of a leaf, or of
a layer's part, all have bits of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.models.layers import lookup, unembed
from jaxpeft.quant import dot
from pallas_kernels.dropout import hashed

BLOCK = 2**24  # elements of a table that are made at once


def draw(key: jax.Array, *count: int) -> jax.Array:
    """(3,) int32: a draw of the noise of all leaves; (count, 3): several, of which the first is that one."""
    return jax.lax.bitcast_convert_type(jax.random.bits(key, (*count, 3), jnp.uint32), jnp.int32)


def of_leaf(words: jax.Array, path: str, layer: jax.Array | int | None = None) -> jax.Array:
    """(3,) int32: the leaf's own, of one of its layers where it has some; (3, L) for layers (L,)."""
    code = zlib.crc32(path.encode())
    own = hashed(words ^ jnp.int32(code - 2**32 if code >= 2**31 else code))
    if layer is None:
        return own
    number = jnp.asarray(layer, jnp.int32)
    return hashed(own.reshape(3, *[1] * number.ndim) + 1 + number)


def numbers(shape: tuple[int, ...]) -> jax.Array:
    """int32 numbers of a leaf's elements, in its order."""
    total = jnp.zeros(shape, jnp.int32)
    for axis, size in enumerate(shape):
        total = total * jnp.int32(size) + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return total


@jax.jit  # traced once per shape
def normal(keys: jax.Array, index: jax.Array) -> jax.Array:
    """z float32 of the elements `index` int32; keys (3, ...) of a shape that broadcasts with it."""
    bits = hashed(hashed(index + keys[0]) ^ keys[1])
    fraction = jax.lax.shift_right_logical(bits, jnp.int32(9)) | jnp.int32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(fraction, jnp.float32) - 1.0  # [0, 1) in steps of 2^-23
    return math.sqrt(2) * jax.lax.erf_inv((2 * unit - 1) + 2**-23)


def rounded(x: jax.Array, dtype: Any, keys: jax.Array, index: jax.Array) -> jax.Array:
    """x float32 in a dtype; for bfloat16 one of the two neighbours, at random, so that the mean is x."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    bits = hashed(hashed(index + keys[0]) ^ keys[2]) & jnp.int32(0xFFFF)
    upper = (jax.lax.bitcast_convert_type(x, jnp.int32) + bits) & jnp.int32(-0x10000)
    return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("keys", "below"), meta_fields=("kept", "relative"))
@dataclasses.dataclass(frozen=True)
class Direction:
    """What W is perturbed along, made of W as it is; it is never stored.

        d = m z, or m z W where it is relative;     m = [|W| <= below] [u < kept],  u in [0, 1) from k2

    keys: (3, ...) int32 of a leaf or its layer, of a shape that broadcasts with W.
    below: float32 of a shape that broadcasts with W; None: no threshold.
    kept: share of the elements, chosen at random for each draw.
    relative: whether d is in proportion to W.
    """

    keys: jax.Array
    below: jax.Array | None = None
    kept: float = 1.0
    relative: bool = False

    def __call__(self, wide: jax.Array, index: jax.Array) -> jax.Array:
        """d float32 at the elements `index` int32 of W, `wide` float32 their values."""
        d = normal(self.keys, index)
        if self.relative:
            d = d * wide
        if self.below is not None:
            d = jnp.where(jnp.abs(wide) <= self.below, d, 0)
        if self.kept < 1:
            u = jax.lax.shift_right_logical(hashed(hashed(index + self.keys[0]) ^ self.keys[2]), jnp.int32(16))
            d = jnp.where(u < round(self.kept * 2**16), d, 0)
        return d


@functools.partial(jax.tree_util.register_dataclass, data_fields=("table", "direction", "eps"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Noisy:
    """W + eps d in W's dtype; to whoever does not know it, an array to convert.

    table: W (n, m).  direction: the leaf's.  eps: () float32.
    """

    table: jax.Array
    direction: Direction
    eps: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    @property
    def ndim(self) -> int:
        return self.table.ndim

    @property
    def dtype(self) -> Any:
        return self.table.dtype

    def astype(self, dtype: Any) -> jax.Array:
        """The whole, in a dtype."""
        return self.__jax_array__().astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return perturbed(self.table, self.direction, self.eps)

    def rows(self, ids: jax.Array) -> jax.Array:
        """(...) int32 -> (..., m)."""
        n, m = self.shape
        ids = jnp.where(ids < 0, ids + n, ids)
        index = ids[..., None] * jnp.int32(m) + jnp.arange(m, dtype=jnp.int32)
        return perturbed(jnp.take(self.table, ids, axis=0), self.direction, self.eps, index)

    def product(self, x: jax.Array, axis: int) -> jax.Array:
        """x times the table (axis 0), or the transposed one (1): the axis is summed over, the other made in blocks."""
        count, inner = self.shape[1 - axis], self.shape[axis]
        size = min(max(BLOCK // inner, 1), count)

        def part(start):
            w = jax.lax.dynamic_slice_in_dim(self.table, start, size, 1 - axis)
            i, j = (jax.lax.broadcasted_iota(jnp.int32, w.shape, a) for a in (0, 1))
            i, j = (i, j + start) if axis == 0 else (i + start, j)
            w = perturbed(w, self.direction, self.eps, i * jnp.int32(self.shape[1]) + j).astype(x.dtype)
            return jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())))

        if size == count:
            return part(0)

        def put(block, y):
            start = jnp.minimum(block * size, count - size)  # the last block may overlap
            return jax.lax.dynamic_update_slice_in_dim(y, part(start), start, y.ndim - 1)

        return jax.lax.fori_loop(0, -(-count // size), put, jnp.zeros((*x.shape[:-1], count), x.dtype))


def perturbed(leaf: jax.Array, along: Direction, eps: jax.Array, index: jax.Array | None = None) -> jax.Array:
    """leaf + eps d in the leaf's dtype; a vector's in float32, as eps may be below the last place of a norm's scale.

    Args:
      leaf: of any shape.
      along: d; of layers (L, ...) with keys of a shape that broadcasts with the leaf.
      eps: float32, of a shape that broadcasts with the leaf.
      index: the elements' numbers, in their layer; None: the leaf is whole.
    """
    index = numbers(leaf.shape) if index is None else index
    wide = leaf.astype(jnp.float32)
    return (wide + eps * along(wide, index)).astype(leaf.dtype if index.ndim > 1 else jnp.float32)


@dot.register  # type: ignore[attr-defined]
def _(kernel: Noisy, x: jax.Array) -> jax.Array:
    return kernel.product(x, 0)


@lookup.register
def _(table: Noisy, ids: jax.Array) -> jax.Array:
    return table.rows(ids)


@unembed.register
def _(table: Noisy, x: jax.Array) -> jax.Array:
    return table.product(x, 1)
