"""LoRA's products over a packed kernel in plain JAX: the kernel is unpacked, then as in lora_matmul/reference.py.

The element that enters a product is value(c) * scale in float32, rounded to x's dtype.
"""

from __future__ import annotations

from pallas_kernels.lora_matmul import reference as dense
from pallas_kernels.packed import dequantize
from pallas_kernels.stacked import AnyPacked, taken


def forward(x, w: AnyPacked, a, b, seed, *, scale: float, rate: float):
    """(y (T, m), z (r, T)); see lora_matmul."""
    return dense.forward(x, dequantize(taken(w), x.dtype), a, b, seed, scale=scale, rate=rate)


def input_gradient(dy, w: AnyPacked, a, b, seed, *, scale: float, rate: float):
    """(dx (T, n), e (r, T)); see lora_matmul."""
    return dense.input_gradient(dy, dequantize(taken(w), dy.dtype), a, b, seed, scale=scale, rate=rate)
