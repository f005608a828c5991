"""What does unpacking a 4- or 8-bit kernel tile by tile cost?

    python -m pallas_kernels.quant_lora_matmul.bench --model llama3-8b --ranks 16 --rows 2048,8192

For each linear map of a model, in one process on the attached device: (ours) lora_matmul's kernels over a kernel in
bfloat16; (nf4, int4, int8) quant_lora_matmul's over a packed one; (nf4 xla) the same in plain JAX, which unpacks the
kernel into device memory. `both` adds the backward pass. What was measured: docs/device.md.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import packed, timing
from pallas_kernels.lora_matmul import bench as dense
from pallas_kernels.lora_matmul import lora_matmul
from pallas_kernels.lora_matmul.shapes import MODELS, Shape
from pallas_kernels.quant_lora_matmul import quant_lora_matmul


def functions(shape: Shape, rank: int, rows: int, dtype: Any) -> dict[str, dict[str, Any]]:
    """{pass: {name: function without arguments}}."""
    x, w, a, b, dy = jax.jit(dense.arrays, static_argnums=(0, 1, 2, 3))(shape, rank, rows, dtype)
    kernels = {name: jax.jit(packed.quantize, static_argnums=1)(w, name) for name in packed.FUSED}
    forms: dict[str, tuple[Any, Any]] = {"ours": (lora_matmul, w)}
    forms |= {name: (quant_lora_matmul, kernel) for name, kernel in kernels.items()}
    plain = lambda *args, **options: quant_lora_matmul(*args, implementation="xla", **options)
    forms["nf4 xla"] = plain, kernels["nf4"]
    found: dict[str, dict[str, Any]] = {"forward": {}, "both": {}}
    for name, (product, kernel) in forms.items():

        def forward(x, kernel, a, b, product=product):
            return product(x, kernel, a, b, scale=2.0)

        def both(x, kernel, a, b, dy, forward=forward):
            y, pull = jax.vjp(lambda x, a, b: forward(x, kernel, a, b), x, a, b)
            return y, pull(dy)

        one, two = jax.jit(forward), jax.jit(both)
        found["forward"][name] = lambda one=one, kernel=kernel: one(x, kernel, a, b)
        found["both"][name] = lambda two=two, kernel=kernel: two(x, kernel, a, b, dy)
    return found


if __name__ == "__main__":
    timing.main(__doc__, functions, MODELS, "ours")
