"""LoRA's products for rows of different adapters, on NVIDIA GPUs of the Hopper generation.

The kernels are those of lora_matmul/gpu.py. Their tiles are of 64 or 128 rows, and TILE = 128 rows have one owner, so a
tile of rows has one adapter: its number is read from `owner`, and with it

    low_product     the factor F_g and s_g
    product         the factor B_g (A_g^T)
    row_product     one part of the sums per adapter: those of the tiles that it owns, which need not be neighbours

A block of `row_product` looks through `owner` for the tiles of its adapter; the others' rows are not read. An adapter
that owns nothing has the sums of no steps, zeros. No temporaries, and nothing is copied but what lora_matmul/gpu.py
says.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.lora_matmul import gpu as lora
from pallas_kernels.lora_matmul.gpu import Config, candidates, configs, default_config
from pallas_kernels.multi_lora_matmul.reference import TILE

__all__ = [
    "Config",
    "candidates",
    "configs",
    "default_config",
    "factor_gradient",
    "forward",
    "input_gradient",
    "supports_factor_gradient",
    "supports_forward",
    "supports_input_gradient",
]

assert lora.ROWS == TILE


def forward(x, w, a, b, scales, owner, *, config: Config | None = None, interpret: Any = None):
    """(y (T, m), z (r, T)); see reference.py."""
    (t, n), (_, r, m) = x.shape, b.shape
    config = config or default_config(t, n, m, r)
    shared = {"owner": owner, "config": config, "interpret": interpret}
    x, (a, b) = lora.whole_rows(x), lora.whole_ranks(a, b)
    z = lora.low_product(x, a, transposed=True, scales=scales, **shared)
    return lora.product(x, w, z, b, transposed=False, **shared)[:t], z[:r, :t]


def input_gradient(dy, w, a, b, scales, owner, *, config: Config | None = None, interpret: Any = None):
    """(dx (T, n), e (r, T)); see reference.py."""
    (t, m), (_, n, r) = dy.shape, a.shape
    config = config or default_config(t, m, n, r)
    shared = {"owner": owner, "config": config, "interpret": interpret}
    dy, (a, b) = lora.whole_rows(dy), lora.whole_ranks(a, b)
    e = lora.low_product(dy, b, transposed=False, scales=scales, **shared)
    return lora.product(dy, w, e, a, transposed=True, **shared)[:t], e[:r, :t]


def factor_gradient(z, x, owner, *, count: int, config: Config | None = None, interpret: Any = None):
    """z x over the rows of each adapter, float32 (G, r, k); see reference.py."""
    r = len(z)
    shared = {"owner": owner, "adapters": count, "config": config or Config(), "interpret": interpret}
    return lora.row_product(lora.whole_low(z), lora.whole_rows(x), **shared)[:, :r]


def supports_forward(x, w, a, b, scales, owner) -> bool:
    """Whether `forward` takes arguments of these shapes."""
    return lora.supported(x, w, a, b) and b.shape[1] in lora.RANKS


def supports_input_gradient(dy, w, a, b, scales, owner) -> bool:
    """Whether `input_gradient` takes arguments of these shapes."""
    return lora.supported(dy, w, a, b) and b.shape[1] in lora.RANKS


def supports_factor_gradient(z, x, owner, *, count: int) -> bool:
    """Whether `factor_gradient` takes arguments of these shapes."""
    return lora.supported(x, None, z) and z.shape[0] in lora.RANKS
