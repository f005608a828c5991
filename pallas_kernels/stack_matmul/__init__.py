"""x W[l] for a few rows x, as in decoding, and a layer of a stack of kernels, which is read where it lies.

A product of few rows takes as long as its kernel takes to read, and on a GPU the compiler's products are calls, which
get their operands whole: the layer would be copied out of the stack first, three times the bytes. A TPU's compiler
makes the slice a part of the product, and elsewhere plain JAX runs. From ROWS rows on the slice is taken: beside so
many products the copy is little, and the compiler's are the better tuned ones. It has no derivative of its own there
and elsewhere that of the slice's product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.platform import operation
from pallas_kernels.stacked import Stacked, taken
from pallas_kernels.tuning import Sizes

__all__ = ["ROWS", "stack_matmul"]

ROWS = 256


def _plain(x, w):
    return (x @ taken(w),)


def _sizes(x, w):
    n, m = w.shape
    return Sizes(len(x), n, m, 0, x.dtype)


def _flops(x, w):
    n, m = w.shape
    return 2.0 * len(x) * n * m


_forward = operation(
    "stack_matmul",
    _plain,
    flops=_flops,
    cuda=tuning.kernels("pallas_kernels.stack_matmul", "forward", _sizes)["cuda"],
)


@jax.custom_vjp
def stack_matmul(x: jax.Array, w: Stacked) -> jax.Array:
    """x W[l].

    Args:
      x: (..., n).
      w: a layer (n, m) of a stack of x's dtype; it is not differentiated.

    Returns:
      (..., m) in x's dtype; sums are float32 in the kernel.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not 0 < len(rows) < ROWS:
        return x @ taken(w)
    return _forward(rows, w)[0].reshape(*x.shape[:-1], w.shape[1])


stack_matmul.defvjp(
    lambda x, w: (stack_matmul(x, w), w),
    lambda w, dy: (jnp.matmul(dy, taken(w).T), None),
)
