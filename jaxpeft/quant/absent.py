"""A kernel that is not there: factors beside it have taken its place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["inputs", "outputs", "dtype"])
@dataclasses.dataclass(frozen=True)
class Absent:
    """W (..., n, m) without its numbers: zeros where it is asked for them.

    layers: zeros (...) uint8, one for each matrix: a stack's axes, from which layers are cut.
    inputs, outputs: n and m.
    dtype: that W had, and has again when the factors are merged.
    """

    layers: jax.Array
    inputs: int
    outputs: int
    dtype: Any

    @classmethod
    def like(cls, kernel: Any) -> Absent:
        """In the place of a kernel (..., n, m)."""
        *lead, n, m = kernel.shape
        return cls(jnp.zeros(tuple(lead), jnp.uint8), n, m, jnp.dtype(kernel.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n, m)."""
        return (*self.layers.shape, self.inputs, self.outputs)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Of its numbers none is there."""
        return 0

    @property
    def nbytes(self) -> int:
        return self.layers.size
