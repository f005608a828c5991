"""What does the low-rank path cost beside the frozen product, fused and unfused?

    python -m pallas_kernels.lora_matmul.bench --model llama3-8b --ranks 8,16,64,256 --rows 2048,8192,65536

For each linear map of a model, in one process on the attached device: (frozen) x W alone; (xla) LoRA in plain JAX;
(ours) the kernels. `forward` is y; `both` adds the backward pass: dx for the frozen product, dx, dA and dB for LoRA.
What was measured: docs/device.md.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import timing
from pallas_kernels.lora_matmul import lora_matmul
from pallas_kernels.lora_matmul.shapes import MODELS, Shape


def arrays(shape: Shape, rank: int, rows: int, dtype: Any) -> tuple[jax.Array, ...]:
    """(x, w, a, b, dy) at random."""
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = ((rows, shape.n), (shape.n, shape.m), (shape.n, rank), (rank, shape.m), (rows, shape.m))
    scales = (1.0, shape.n**-0.5, shape.n**-0.5, rank**-0.5, 1.0)
    return tuple(s * jax.random.normal(k, size, dtype) for k, size, s in zip(keys, sizes, scales, strict=True))


def functions(shape: Shape, rank: int, rows: int, dtype: Any) -> dict[str, dict[str, Any]]:
    """{pass: {name: function without arguments}}."""
    x, w, a, b, dy = jax.jit(arrays, static_argnums=(0, 1, 2, 3))(shape, rank, rows, dtype)

    def frozen(x, w, a, b):
        return x @ w

    def both(forward, trained):
        def run(x, w, a, b, dy):
            of = lambda *moved: forward(
                *[moved[trained.index(i)] if i in trained else v for i, v in enumerate((x, w, a, b))]
            )
            y, pull = jax.vjp(of, *[(x, w, a, b)[i] for i in trained])
            return y, pull(dy)

        return jax.jit(run)

    def lora(implementation):
        return lambda x, w, a, b: lora_matmul(x, w, a, b, scale=2.0, implementation=implementation)

    forms = {"frozen": frozen, "xla": lora("xla"), "ours": lora(None)}
    found: dict[str, dict[str, Any]] = {"forward": {}, "both": {}}
    for name, form in forms.items():
        forward, backward = jax.jit(form), both(form, (0,) if name == "frozen" else (0, 2, 3))
        found["forward"][name] = lambda forward=forward: forward(x, w, a, b)
        found["both"][name] = lambda backward=backward: backward(x, w, a, b, dy)
    return found


if __name__ == "__main__":
    timing.main(__doc__, functions, MODELS, "frozen")
