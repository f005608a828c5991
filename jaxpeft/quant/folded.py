"""Kernels of modules that give their inputs or outputs several axes (heads, channels), taken for the matrices they are.

`flax.linen.DenseGeneral` keeps the projection to 4 heads of 16 channels as (64, 4, 16). A site's kernel is (64, 64):
the same numbers in the same order, so nothing is copied, and what merging gives back has the module's own shape again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxpeft.quant.dot import dot
from jaxpeft.quant.kernel import dense, merged


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["inputs", "outputs"])
@dataclasses.dataclass(frozen=True)
class Folded:
    """A kernel (layers..., inputs..., outputs...) as a matrix, or a stack of them.

    array: as its module has it.
    inputs, outputs: how many axes of it they are; 0 and 0 for what is no linear map, and so no site.
    """

    array: Any
    inputs: int
    outputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers..., n, m)."""
        own = tuple(self.array.shape)
        if not self.inputs:
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
        return self.size * self.array.dtype.itemsize


def fold(array: Any, inputs: int, outputs: int) -> Any:
    """A kernel as a matrix; a plain array where it is one already."""
    return array if inputs == outputs == 1 else Folded(array, inputs, outputs)


def unfolded(leaf: Any) -> Any:
    """A leaf as its module has it."""
    return leaf.array if isinstance(leaf, Folded) else leaf


def unfolded_all(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: leaf}` with every leaf as its module has it."""
    return {path: unfolded(leaf) for path, leaf in flat.items()}


def refolded(flat: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: leaf}` in which what was a `Folded` in `before` is one again, of what the leaf has become."""
    return {
        path: Folded(leaf, of.inputs, of.outputs)
        if isinstance(of := before.get(path), Folded) and not isinstance(leaf, Folded)
        else leaf
        for path, leaf in flat.items()
    }


def is_linear(kernel: Any) -> bool:
    """Whether a leaf called kernel is that of a linear map."""
    return not isinstance(kernel, Folded) or kernel.inputs > 0


@dot.register(Folded)  # type: ignore[attr-defined]
def _(kernel: Folded, x: jax.Array) -> jax.Array:
    return dot(x, kernel.array.reshape(kernel.shape))


@dense.register(Folded)  # type: ignore[attr-defined]
def _(kernel: Folded, dtype: Any) -> jax.Array:
    return kernel.array.reshape(kernel.shape).astype(dtype)


@merged.register(Folded)  # type: ignore[attr-defined]
def _(kernel: Folded, array: jax.Array) -> jax.Array:
    return array.reshape(kernel.array.shape).astype(kernel.dtype)
