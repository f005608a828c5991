"""Arrays that are written before they are read, and so need not begin as anything.

XLA fills what a loop is going to write with zeros first: for the activations that a step keeps that is one more pass
over all of them, more than a hundredth of an 8B step's time on an H100. A kernel that writes nothing has an output that
is just memory. Elsewhere than on a GPU the array begins as zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.platform import Implementation, operation

__all__ = ["uninitialised"]


def _zeros(_, *, shape: tuple[int, ...], dtype: Any):
    return jnp.zeros(shape, dtype)


def _memory(unused, *, shape: tuple[int, ...], dtype: Any):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def uninitialised(unused, out):
        del unused, out

    out = jax.ShapeDtypeStruct(shape, dtype)
    return plgpu.kernel(uninitialised, out_type=out, grid=(1,), grid_names=("block",))(unused)


def _supports(_, *, shape: tuple[int, ...], dtype: Any) -> bool:
    whole = jnp.issubdtype(dtype, jnp.floating) or dtype in (jnp.int8, jnp.uint32, jnp.int32)
    return whole and 0 not in shape and len(shape) > 0


_operation = operation("uninitialised", _zeros, cuda=Implementation(_memory, _supports, capability="9."))


def uninitialised(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of which every element is to be written before it is read: whatever was in memory, or zeros."""
    return _operation(jnp.zeros((1,), jnp.int32), shape=tuple(shape), dtype=jnp.dtype(dtype))
