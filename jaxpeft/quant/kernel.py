"""What a kernel is: a matrix that products read (`jaxpeft.quant.dot`), however it is stored.

Plain JAX arrays, packed kernels and layers of a stack are kernels alike, and no method asks which one it has:

    dense(kernel)         its values, a plain array
    like(kernel, array)   a plain array, stored as the kernel is
    pack(array, ...)      a plain array as a packed kernel
    merged(kernel, array) a plain array in the place of a kernel into which something was folded

Leading axes are layers. A stack is packed and unpacked layer by layer, so that float32 copies are one layer's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxpeft.quant import affine
from jaxpeft.quant.absent import Absent
from jaxpeft.quant.affine import Affine
from jaxpeft.quant.nested import Nested
from jaxpeft.quant.paired import Paired
from pallas_kernels.packed import FORMATS, Packed, dequantize, quantize
from pallas_kernels.stacked import Stacked

_PACKED = (Packed, Affine, Paired, Nested, Absent)


class Kernel(Protocol):
    """A matrix W (n, m), inputs and outputs, with leading axes a stack of them.

    shape: (..., n, m).  ndim: its length.  size: elements of W.
    dtype: of W as the base has it: what merging gives back.
    nbytes: that the kernel takes as it is stored.

    A new type registers its products (`dot.register`), `dense` and `like`. It is a registered dataclass whose arrays
    all have the leading axes, as layers are cut from it leaf by leaf.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def size(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


def is_packed(kernel: Any) -> bool:
    """Whether a node of a tree is a kernel of several arrays, which a tree's functions would otherwise take apart."""
    return isinstance(kernel, _PACKED) or isinstance(getattr(kernel, "array", None), _PACKED)


def dense(kernel: Any, dtype: Any = jnp.float32) -> jax.Array:
    """The values of a kernel (..., n, m) of any registered type, in `dtype`, rounded once."""
    return _dense(kernel, jnp.dtype(dtype))


@functools.singledispatch
def _dense(kernel: Any, dtype: Any) -> jax.Array:
    return kernel.astype(dtype)


def like(kernel: Any, array: jax.Array) -> Any:
    """`array` (..., n, m), stored as `kernel` is: in its dtype, or in its format with its groups."""
    return _like(kernel, array)


@functools.singledispatch
def _like(kernel: Any, array: jax.Array) -> Any:
    return array.astype(kernel.dtype)


def merged(kernel: Any, array: jax.Array) -> jax.Array:
    """`array` (..., n, m), what a kernel has become by merging: plain, in the kernel's dtype and its module's shape."""
    return _merged(kernel, array)


@functools.singledispatch
def _merged(kernel: Any, array: jax.Array) -> jax.Array:
    return array.astype(kernel.dtype)


dense.register = _dense.register  # type: ignore[attr-defined]
like.register = _like.register  # type: ignore[attr-defined]
merged.register = _merged.register  # type: ignore[attr-defined]


def pack(array: jax.Array, format: str, group: int | None = None, double: bool | None = None) -> Packed:
    """A packed kernel of an array (..., n, m) in its dtype; arguments and errors are those of `packed.quantize`."""
    return by_layer(functools.partial(_pack, format=format, group=group, double=double), array)


def by_layer(function: Callable[..., Any], array: Any, *others: Any) -> Any:
    """`function` of each matrix of a kernel (..., n, m), the results stacked; of others, it is given the same layer.

    One after the other, so that what it works on is one matrix's; the bits are the same as of one matrix alone.
    """
    if array.ndim == 2:
        return function(array, *others)
    layer = lambda i: jax.tree.map(lambda x: x[i], (array, *others))
    parts = [by_layer(function, *layer(i)) for i in range(array.shape[0])]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def unpacked(params: Any) -> Any:
    """A tree in which each packed kernel is plain, in its dtype."""
    plain = lambda kernel: dense(kernel, kernel.dtype) if is_packed(kernel) else kernel
    return jax.tree.map(plain, params, is_leaf=is_packed)


def pack_affine(array: jax.Array, bits: int, group: int = 0) -> Affine:
    """An affine kernel of an array (..., n, m) in its dtype; arguments and errors are those of `affine.quantize`."""
    return by_layer(functools.partial(_pack_affine, bits=bits, group=group), array)


_pack_affine = jax.jit(affine.quantize, static_argnames=("bits", "group"))
_pack = jax.jit(quantize, static_argnames=("format", "group", "double"))


@functools.partial(jax.jit, static_argnums=1)
def _unpack(packed: Packed | Affine, dtype: Any) -> jax.Array:
    if packed.ndim == 2:
        return affine.dequantize(packed, dtype) if isinstance(packed, Affine) else dequantize(packed, dtype)
    return jax.lax.map(lambda layer: _unpack(layer, dtype), packed)


@_dense.register(Packed)
@_dense.register(Affine)
def _(kernel: Packed | Affine, dtype: Any) -> jax.Array:
    return _unpack(kernel, dtype)


@_dense.register
def _(kernel: Paired, dtype: Any) -> jax.Array:
    return _dense(kernel.packed, dtype)


@_dense.register
def _(kernel: Nested, dtype: Any) -> jax.Array:
    return _dense(kernel.last, dtype)


@_dense.register
def _(kernel: Stacked, dtype: Any) -> jax.Array:
    return _dense(kernel.take(), dtype)


@_dense.register
def _(kernel: Absent, dtype: Any) -> jax.Array:
    return jnp.zeros(kernel.shape, dtype)


@_like.register
def _(kernel: Packed, array: jax.Array) -> Packed:
    packed = pack(array, kernel.format, kernel.group, kernel.doubled)
    return dataclasses.replace(packed, dtype=kernel.dtype)


@_like.register
def _(kernel: Paired, array: jax.Array) -> Any:
    return _like(kernel.packed, array)


@_like.register
def _(kernel: Nested, array: jax.Array) -> Any:
    return Nested(tuple(_like(one, array) for one in kernel.widths))


@_like.register
def _(kernel: Affine, array: jax.Array) -> Affine:
    group = kernel.shape[-2] // kernel.groups
    found = pack_affine(array, kernel.bits, group)
    return dataclasses.replace(found, dtype=kernel.dtype, scales=found.scales.astype(kernel.scales.dtype))


__all__ = ["FORMATS", "Kernel", "by_layer", "dense", "is_packed", "like", "merged", "pack", "pack_affine", "unpacked"]
