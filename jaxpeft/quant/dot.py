"""`dot(x, kernel)`: the matrix product of a site, by the type of its kernel.

A quantized array type registers its product:

    @dot.register(MyQuantized)
    def _(kernel, x): ...
"""

from __future__ import annotations

import functools
from typing import Any

import jax


@functools.singledispatch
def _product(kernel: Any, x: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


def dot(x: jax.Array, kernel: Any) -> jax.Array:
    """x (..., n), kernel (n, m) of any registered type -> (..., m) in x's dtype."""
    return _product(kernel, x)


dot.register = _product.register  # type: ignore[attr-defined]
