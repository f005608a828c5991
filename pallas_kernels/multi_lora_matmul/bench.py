"""What do several adapters in one batch cost beside one adapter for all rows?

    python -m pallas_kernels.multi_lora_matmul.bench --model llama3-8b --ranks 16 --rows 8192

Eight adapters, each row of 1024 tokens with one of them in a shuffled order, against lora_matmul on the same rows
(ours), and against plain JAX (xla). `both` adds the backward pass. Speed has not been measured on a GPU or TPU yet.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.lora_matmul import bench as dense
from pallas_kernels.lora_matmul import lora_matmul
from pallas_kernels.lora_matmul.shapes import MODELS, Shape
from pallas_kernels.multi_lora_matmul import multi_lora_matmul

ADAPTERS, LENGTH = 8, 1024


def functions(shape: Shape, rank: int, rows: int, dtype: Any) -> dict[str, dict[str, Any]]:
    """{pass: {name: function without arguments}}; rows are cut into as many of LENGTH tokens as there are."""
    x, w, a, b, dy = jax.jit(dense.arrays, static_argnums=(0, 1, 2, 3))(shape, rank, rows, dtype)
    length = min(LENGTH, rows)
    cut = lambda v: v[: rows // length * length].reshape(-1, length, v.shape[-1])
    x, dy = cut(x), cut(dy)
    many = jnp.stack([a] * ADAPTERS), jnp.stack([b] * ADAPTERS)
    adapter = jax.random.permutation(jax.random.key(1), jnp.arange(len(x)) % ADAPTERS)
    scales = jnp.full((ADAPTERS,), 2.0)

    def multi(implementation):
        options = {"scales": scales, "implementation": implementation}
        return lambda x, a, b: multi_lora_matmul(x, w, a, b, adapter, **options), many

    forms = {
        "ours": (lambda x, a, b: lora_matmul(x, w, a, b, scale=2.0), (a, b)),
        "multi": multi(None),
        "multi xla": multi("xla"),
    }
    found: dict[str, dict[str, Any]] = {"forward": {}, "both": {}}
    for name, (forward, factors) in forms.items():

        def both(x, a, b, dy, forward=forward):
            y, pull = jax.vjp(forward, x, a, b)
            return y, pull(dy)

        one, two = jax.jit(forward), jax.jit(both)
        found["forward"][name] = lambda one=one, factors=factors: one(x, *factors)
        found["both"][name] = lambda two=two, factors=factors: two(x, *factors, dy)
    return found


if __name__ == "__main__":
    timing.main(__doc__, functions, MODELS, "ours")
