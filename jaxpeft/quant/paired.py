"""A packed kernel with the plain one that it was made of: products read the packed one, a teacher the other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed", "plain"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Paired:
    """W (..., n, m) twice.

    packed: a packed kernel, which is what W is worth wherever it is asked.
    plain: the array before it was packed.
    """

    packed: Any
    plain: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n, m)."""
        return self.plain.shape

    @property
    def ndim(self) -> int:
        return self.plain.ndim

    @property
    def dtype(self) -> Any:
        """Of the plain array."""
        return self.plain.dtype

    @property
    def size(self) -> int:
        """Elements of W."""
        return self.plain.size

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.packed.nbytes + self.plain.size * self.plain.dtype.itemsize

    @property
    def unit(self) -> int:
        """Inputs of the packed kernel that cannot be parted."""
        return self.packed.unit
