"""One kernel packed in several widths, among which a product chooses when it runs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from jaxpeft.quant import affine
from jaxpeft.quant.affine import Affine


@functools.partial(jax.tree_util.register_dataclass, data_fields=["widths"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Nested:
    """W (..., n, m) several times.

    widths: affine kernels, the fewest bits first. Where none is chosen, W is what the last is worth.
    """

    widths: tuple[Affine, ...]

    @property
    def last(self) -> Affine:
        """The one of most bits."""
        return self.widths[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n, m)."""
        return self.last.shape

    @property
    def ndim(self) -> int:
        return self.last.ndim

    @property
    def dtype(self) -> Any:
        """That W had."""
        return self.last.dtype

    @property
    def size(self) -> int:
        """Elements of W."""
        return self.last.size

    @property
    def nbytes(self) -> int:
        """Of all widths."""
        return sum(kernel.nbytes for kernel in self.widths)

    @property
    def unit(self) -> int:
        """Inputs that cannot be parted in any width."""
        return math.lcm(*(kernel.unit for kernel in self.widths))


def unpacked(kernel: Nested, index: jax.Array, dtype: Any) -> jax.Array:
    """W (n, m) of one width in a dtype: the others are not unpacked."""
    widths = [functools.partial(affine.dequantize, one, dtype) for one in kernel.widths]
    return jax.lax.switch(index, widths)


@jax.custom_vjp
def chosen_product(x: jax.Array, kernel: Nested, index: jax.Array) -> jax.Array:
    """x W, x (..., n), W (n, m) of the width of an index () int32: unpacked in both passes and kept in neither."""
    return x @ unpacked(kernel, index, x.dtype)


def _save(x, kernel, index):
    return chosen_product(x, kernel, index), (kernel, index)


def _back(saved, dy):
    kernel, index = saved
    return dy @ unpacked(kernel, index, dy.dtype).T, None, None


chosen_product.defvjp(_save, _back)
