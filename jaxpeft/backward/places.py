"""Arrays that a loop writes, part by part, before anything reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def empty(shape: Sequence[int], dtype: Any) -> jax.Array:
    """An array of which every element is written before it is read: GPUs and TPUs do not fill it, CPUs do.

    Under `jax_debug_nans` and `jax_debug_infs`, which look at what is between two operations, it is zeros.

    Args:
      shape: of the array.
      dtype: any.
    """
    if jax.config.jax_debug_nans or jax.config.jax_debug_infs:
        return jnp.zeros(shape, dtype)
    return jax.lax.empty(tuple(shape), dtype)
