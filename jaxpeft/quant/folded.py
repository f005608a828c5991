"""Kernels of modules that give their inputs or outputs several axes (heads, channels), taken for the matrices they are.

`flax.linen.DenseGeneral` keeps the projection to 4 heads of 16 channels as (64, 4, 16). A site's kernel is (64, 64):
the same numbers in the same order, so nothing is copied, and what merging gives back has the module's own shape again.
Packed, it is kept as the matrix, with the axes that it had.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxpeft.quant.dot import dot
from jaxpeft.quant.kernel import dense, like, merged

EMBEDDING, CONVOLUTION = "an embedding", "a convolution"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["inputs", "outputs", "axes", "why", "kind"]
)
@dataclasses.dataclass(frozen=True)
class Folded:
    """A kernel (layers..., inputs..., outputs...) as a matrix, or a stack of them.

    array: as its module has it; where it is packed, the matrix.
    inputs, outputs: how many axes of it they are; 0 and 0 for what is no linear map, and so no site.
    axes: (inputs..., outputs...) of a packed kernel; None of one that still has them.
    why: what is wrong with targets that choose it, in a few words; empty where nothing is.
    kind: EMBEDDING or CONVOLUTION, of a matrix that is no linear map's.
    """

    array: Any
    inputs: int
    outputs: int
    axes: tuple[int, ...] | None = None
    why: str = ""
    kind: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers..., n, m)."""
        own = tuple(self.array.shape)
        if not self.inputs or self.axes:
            return own
        layers, rest = own[: len(own) - self.inputs - self.outputs], own[len(own) - self.inputs - self.outputs :]
        return (*layers, math.prod(rest[: self.inputs]), math.prod(rest[self.inputs :]))

    @property
    def ndim(self) -> int:
        """Of `shape`."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The array's."""
        return self.array.dtype

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.array.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.array.nbytes if self.axes else self.size * self.array.dtype.itemsize

    @property
    def own_shape(self) -> tuple[int, ...]:
        """(layers..., inputs..., outputs...)."""
        return (*self.array.shape[:-2], *self.axes) if self.axes else tuple(self.array.shape)


def fold(array: Any, inputs: int, outputs: int, why: str = "", kind: str = "") -> Any:
    """A kernel as a matrix; a plain array where it is one already, and a linear map's."""
    return array if inputs == outputs == 1 and not kind else Folded(array, inputs, outputs, why=why, kind=kind)


def folded_as(kernel: Any, function: Callable[[jax.Array], Any]) -> Any:
    """`function` of a kernel's matrix, which packs it; of a `Folded`, with the axes that it has now."""
    if not isinstance(kernel, Folded):
        return function(kernel)
    own = kernel.own_shape[kernel.array.ndim - kernel.inputs - kernel.outputs :]
    return Folded(function(matrix(kernel)), kernel.inputs, kernel.outputs, own)


def matrix(kernel: Any) -> Any:
    """A kernel (layers..., n, m) without the axes that its module gives it."""
    if not isinstance(kernel, Folded):
        return kernel
    return kernel.array if kernel.axes else kernel.array.reshape(kernel.shape)


def unfolded(leaf: Any) -> Any:
    """A leaf as its module has it; what is packed stays so, and keeps its axes."""
    return leaf.array if isinstance(leaf, Folded) and not leaf.axes else leaf


def unfolded_all(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: leaf}` with every leaf as its module has it."""
    return {path: unfolded(leaf) for path, leaf in flat.items()}


def refolded(flat: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: leaf}` in which what was a `Folded` in `before` is one again, of what the leaf has become."""
    return {
        path: dataclasses.replace(of, array=leaf, axes=None)
        if isinstance(of := before.get(path), Folded) and not isinstance(leaf, Folded)
        else leaf
        for path, leaf in flat.items()
    }


def is_linear(kernel: Any) -> bool:
    """Whether a leaf called kernel is that of a linear map."""
    return not isinstance(kernel, Folded) or (kernel.inputs > 0 and not kernel.kind)


def kind_of(leaf: Any) -> str:
    """EMBEDDING, CONVOLUTION, or empty for a linear map and what is no kernel."""
    return leaf.kind if isinstance(leaf, Folded) else ""


@dot.register(Folded)  # type: ignore[attr-defined]
def _(kernel: Folded, x: jax.Array) -> jax.Array:
    return dot(x, matrix(kernel))


@dense.register(Folded)  # type: ignore[attr-defined]
def _(kernel: Folded, dtype: Any) -> jax.Array:
    return dense(matrix(kernel), dtype)


@like.register(Folded)  # type: ignore[attr-defined]
def _(kernel: Folded, array: jax.Array) -> Folded:
    if kernel.axes:
        return dataclasses.replace(kernel, array=like(kernel.array, array))
    return dataclasses.replace(kernel, array=merged(kernel, array))


@merged.register(Folded)  # type: ignore[attr-defined]
def _(kernel: Folded, array: jax.Array) -> jax.Array:
    return array.reshape(kernel.own_shape).astype(kernel.dtype)
