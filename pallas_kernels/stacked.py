"""One layer of a stack of kernels, which the products read where it lies.

A loop over layers has their kernels in one array W (L, n, m). A kernel of ours is a custom call to XLA, and gets its
operands whole: W[l] would be copied out of the stack before each call. So the products take the stack and the number
of the layer, and copy W[l]'s tiles to the chip from there. Plain JAX takes the slice (`taken`), as the loop would.

What a loop keeps of each step is such a stack, too: a custom call's result would be copied to its place there. So
operations may write a layer of a stack that they are given (`platform.INTO`). Plain JAX puts the result there (`put`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.packed import Packed


@functools.partial(jax.tree_util.register_dataclass, data_fields=("stack", "index", "layer"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Stacked:
    """W[l] (n, m) of a stack W. It is not differentiated; to whoever does not know it, it is an array to convert.

    stack: (L, n, m), or a stack of packed kernels.
    index: l, () int32.
    layer: W[l] itself, which a loop takes once for all its steps with it, or None. Who takes the layer takes this; a
      program in which nobody does has nothing left of it.
    """

    stack: Any
    index: jax.Array
    layer: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, m)."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the array, or what a packed kernel's was."""
        return self.stack.dtype

    @property
    def size(self) -> int:
        """Elements of W[l]."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of W[l] in the stack."""
        return self.stack.nbytes // self.stack.shape[0]

    @property
    def format(self) -> str:
        """Of packed kernels."""
        return self.stack.format

    @property
    def group(self) -> int:
        """Of packed kernels."""
        return self.stack.group

    @property
    def doubled(self) -> bool:
        """Of packed kernels."""
        return self.stack.doubled

    def take(self) -> Any:
        """W[l], an array or `Packed`."""
        if self.layer is not None:
            return self.layer
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, self.index, keepdims=False), self.stack)

    def astype(self, dtype: Any) -> jax.Array:
        """W[l] in a dtype."""
        return self.take().astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return self.take()


AnyPacked = Packed | Stacked  # a packed kernel, alone or in a stack


def taken(w: Any) -> Any:
    """w itself, or the layer that it is of a stack."""
    return w.take() if isinstance(w, Stacked) else w


def put(out: Stacked, y: jax.Array) -> jax.Array:
    """The stack with y in the place of the layer."""
    return jax.lax.dynamic_update_index_in_dim(out.stack, y.astype(out.dtype), out.index, 0)


def whole(w: Any) -> tuple[Any, jax.Array | None]:
    """(what w lies in: itself or its stack, the layer's number there (1,) int32 or None)."""
    return (w.stack, jnp.asarray(w.index, jnp.int32).reshape(1)) if isinstance(w, Stacked) else (w, None)
