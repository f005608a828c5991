"""`lora_matmul` over a packed kernel (pallas_kernels/packed.py: NF4, int4, int8).

    y = x deq(W) + s (drop(x) A) B

A TPU's kernels unpack W tile by tile in VMEM, in both directions. Elsewhere W is unpacked whole before the product, in
both passes again (on a GPU, for few rows, in the product's kernel); none is kept for the backward pass. W has no
gradient. Everything else (z, dropout, what is kept) is lora_matmul's.

Source: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels import lora_matmul as dense
from pallas_kernels import tuning
from pallas_kernels.divided import Divided
from pallas_kernels.packed import Packed, decoded, dequantize
from pallas_kernels.platform import Part, operation
from pallas_kernels.quant_lora_matmul import reference
from pallas_kernels.stacked import AnyPacked, taken

__all__ = ["quant_lora_matmul", "quant_matmul"]

forward = operation(
    "quant_lora_forward",
    reference.forward,
    flops=dense.flops_of_both,
    dims=dense.FORWARD,
    part=Part(outputs=(1,), function=dense.low, args=(0, -3, -1), static=("scale", "rate")),
    **tuning.kernels("pallas_kernels.quant_lora_matmul", "forward", dense.sizes_of_both),
)
input_gradient = operation(
    "quant_lora_input_gradient",
    reference.input_gradient,
    flops=dense.flops_of_both,
    dims=dense.INPUT_GRADIENT,
    **tuning.kernels("pallas_kernels.quant_lora_matmul", "input_gradient", dense.sizes_of_both),
)


def quant_lora_matmul(
    x: jax.Array,
    w: AnyPacked,
    a: jax.Array,
    b: jax.Array,
    *,
    scale: float = 1.0,
    rate: float = 0.0,
    seed: jax.Array | None = None,
    make_a: Callable[[jax.Array], jax.Array] | None = None,
    name: str = "lora_low",
    implementation: str | None = None,
    divided: Divided | None = None,
) -> jax.Array:
    """x deq(W) + scale (drop(x) A) B.

    Args:
      w: a packed kernel (n, m), or one of a stack; it is not differentiated.
      Others: as of `lora_matmul`.

    Returns:
      (..., m) in x's dtype.

    Raises:
      As `lora_matmul`.
    """
    dense.check("quant_lora_matmul", x, w, None if make_a else a, b, rate, seed)
    operations = dense.Operations(forward, input_gradient)
    options = dense.Options(scale, rate, make_a, implementation, operations, dense.of_rows(divided, rate))
    if options.divided is not None and options.divided.of("nm") and w.doubled:
        w = decoded(taken(w))
    return dense.differentiable(x, w, a, b, seed, name, options)


@jax.custom_vjp
def quant_matmul(x: jax.Array, w: Packed) -> jax.Array:
    """x deq(W) in plain JAX, x (..., n), W (n, m) packed: the kernel is unpacked in both passes and kept in neither."""
    return x @ dequantize(w, x.dtype)


quant_matmul.defvjp(lambda x, w: (quant_matmul(x, w), w), lambda w, dy: (dy @ dequantize(w, dy.dtype).T, None))
