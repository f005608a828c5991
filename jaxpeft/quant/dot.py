"""The products of a site, by the type of its kernel: `dot(x, W)`, and those which add a low-rank update.

    dot               y = x W
    low_rank_dot      y = x W + s (drop(x) A) B            by the fused kernels of `pallas_kernels` where they serve
    low_rank_dot_of   y_i = x_i W + s_g x_i A_g B_g        the same, of the adapter g that row i has

A quantized array type registers its product, and, where it has one, its fused product:

    @dot.register(MyQuantized)
    def _(kernel, x): ...

    @low_rank_dot.register(MyQuantized)
    def _(kernel, x, a, b, **options): ...

A type with a product alone gets the two added. In a memory plan's loop over layers a kernel comes as a layer of the
stack that it lies in (`pallas_kernels.stacked`): the fused kernels read it there; for all others it is taken out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import constraints
from jaxpeft.errors import InputError
from jaxpeft.quant import affine
from jaxpeft.quant.absent import Absent
from jaxpeft.quant.nested import Nested
from jaxpeft.quant.paired import Paired
from pallas_kernels.dropout import drop
from pallas_kernels.lora_matmul import lora_matmul
from pallas_kernels.multi_lora_matmul import TILE, low_rank, multi_lora_matmul
from pallas_kernels.packed import FUSED, Packed
from pallas_kernels.quant_lora_matmul import quant_lora_matmul, quant_matmul
from pallas_kernels.stack_matmul import stack_matmul
from pallas_kernels.stacked import Stacked, taken

LOW = "lora_low"  # what x A is called in a memory plan


@functools.singledispatch
def _product(kernel: Any, x: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


def dot(x: jax.Array, kernel: Any) -> jax.Array:
    """x (..., n), kernel (n, m) of any registered type -> (..., m) in x's dtype."""
    chex.assert_equal((x.shape[-1], 2), (kernel.shape[0], len(kernel.shape)))
    return _product(kernel, x)


dot.register = _product.register  # type: ignore[attr-defined]


@_product.register
def _(kernel: Absent, x: jax.Array) -> jax.Array:
    raise InputError(
        f"a method reads a kernel {kernel.shape} that factors have taken the place of; leave one of the two out"
    )


@functools.singledispatch
def _low_rank_product(kernel: Any, x, a, b, *, scale, rate, seed, make_a) -> jax.Array:
    if isinstance(kernel, jax.Array):
        options = {"scale": scale, "rate": rate, "seed": seed, "make_a": make_a}
        return _fused(lora_matmul, kernel.astype(x.dtype), x, a, b, **options)
    inner = kernel if callable(kernel) else functools.partial(dot, kernel=kernel)
    if make_a is not None:
        low = jax.checkpoint(lambda x, a: x @ make_a(a).astype(x.dtype))(x, a)
    else:
        rows = drop(x.reshape(-1, x.shape[-1]), seed, rate).reshape(x.shape) if rate else x
        low = rows @ a.astype(x.dtype)
    return inner(x) + scale * (checkpoint_name(low, LOW) @ b.astype(x.dtype))


def low_rank_dot(
    x: jax.Array,
    kernel: Any,
    a: jax.Array,
    b: jax.Array,
    *,
    scale: float,
    rate: float = 0.0,
    seed: jax.Array | None = None,
    make_a: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """x W + scale (drop(x) A) B.

    Args:
      x: (..., n).
      kernel: W (n, m) of any registered type, or a function of x in place of the product.
      a: A (n, r), or what `make_a` makes it of.
      b: B (r, m).
      scale: s.
      rate: of dropout on what A reads.  seed: () int32 of its mask.
      make_a: hashable, a -> A (n, r); A is made in both passes, and not kept.

    Returns:
      (..., m) in x's dtype. x A is named "lora_low"; x is kept for the backward pass only if A is differentiated.

    Raises:
      AssertionError: when traced, for shapes that do not belong together.
    """
    chex.assert_rank(b, 2)
    if make_a is None:
        chex.assert_shape(a, (x.shape[-1], b.shape[0]))
    if not callable(kernel):
        chex.assert_equal((x.shape[-1], b.shape[1]), tuple(kernel.shape))
    return _low_rank_product(kernel, x, a, b, scale=scale, rate=rate, seed=seed, make_a=make_a)


low_rank_dot.register = _low_rank_product.register  # type: ignore[attr-defined]


def low_rank_dot_of(
    adapter: jax.Array,
    x: jax.Array,
    kernel: Any,
    a: Sequence[jax.Array],
    b: Sequence[jax.Array],
    *,
    scales: Sequence[float],
    low: jax.Array | None = None,
) -> jax.Array:
    """x W + the low-rank update of each row's adapter; factors have ranks of their own.

    Args:
      adapter: (B,) integers of 0..G-1; negative: none.
      x: (B, S, n).
      kernel: W (n, m) of any registered type, or a function of x in place of the product.
      a: A_g (n, r_g) of each adapter.  b: B_g (r_g, m).
      scales: s_g.
      low: what the A_g read in place of x, where something was dropped from it.

    Returns:
      (B, S, m) in x's dtype; a row without an adapter has x W.
    """
    chex.assert_rank(x, 3)
    stack = kernel.stack if isinstance(kernel, Stacked) else kernel
    if isinstance(stack, jax.Array) and low is None and x.shape[1] >= TILE:
        fitting = kernel if stack.dtype == x.dtype else taken(kernel).astype(x.dtype)
        return multi_lora_matmul(x, fitting, a, b, adapter, scales=scales, name=LOW)
    inner = kernel(x) if callable(kernel) else dot(x, kernel)
    return inner + low_rank(x if low is None else low, a, b, adapter, scales=scales, name=LOW)


def _fused(product: Callable[..., jax.Array], kernel: Any, x, a, b, **options) -> jax.Array:
    return product(x, kernel, a, b, name=LOW, divided=constraints.of_product(x), **options)


@_product.register
def _(kernel: Packed, x: jax.Array) -> jax.Array:
    return quant_matmul(x, kernel)


@_product.register
def _(kernel: affine.Affine, x: jax.Array) -> jax.Array:
    return affine.product(x, kernel)


def _of_packed(kernel: Packed | Stacked, x, a, b, **options) -> jax.Array:
    plain = {} if kernel.format in FUSED else {"implementation": "xla"}  # which no kernel reads
    return _fused(quant_lora_matmul, kernel, x, a, b, **plain, **options)


@_low_rank_product.register
def _(kernel: Packed, x, a, b, **options) -> jax.Array:
    return _of_packed(kernel, x, a, b, **options)


@_product.register
def _(kernel: Paired, x: jax.Array) -> jax.Array:
    return _product(kernel.packed, x)


@_low_rank_product.register
def _(kernel: Paired, x, a, b, **options) -> jax.Array:
    return _low_rank_product(kernel.packed, x, a, b, **options)


@_product.register
def _(kernel: Nested, x: jax.Array) -> jax.Array:
    return _product(kernel.last, x)


@_product.register
def _(kernel: Stacked, x: jax.Array) -> jax.Array:
    few = isinstance(kernel.stack, jax.Array) and kernel.dtype == x.dtype
    return stack_matmul(x, kernel) if few else _product(kernel.take(), x)


@_low_rank_product.register
def _(kernel: Stacked, x, a, b, **options) -> jax.Array:
    if isinstance(kernel.stack, Packed):
        return _of_packed(kernel, x, a, b, **options)
    if isinstance(kernel.stack, jax.Array) and kernel.dtype == x.dtype:
        return _fused(lora_matmul, kernel, x, a, b, **options)
    return _low_rank_product(kernel.take(), x, a, b, **options)
