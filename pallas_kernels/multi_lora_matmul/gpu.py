"""LoRA's products for rows of different adapters, on NVIDIA GPUs of the Hopper generation.

The kernels are those of lora_matmul/gpu.py. Their tiles are of 64 or 128 rows, and TILE = 128 rows have one owner, so a
tile of rows has one adapter: its number is read from `owner`, and with it

    low_product     the factor F_g and s_g
    product         the factor B_g (A_g^T)
    row_product     one part of the sums per adapter: those of the tiles that it owns, which need not be neighbours

A block of `row_product` looks through `owner` for the tiles of its adapter; the others' rows are not read. An adapter
that owns nothing has the sums of no steps, zeros. No temporaries, and nothing is copied but what lora_matmul/gpu.py
says.

Factors of different ranks come as tuples. Those of one rank, in whole tiles of TMA's 8 rows, are stacked, and a tile
costs its own adapter's rank (lora_matmul/gpu_owners.py). Temporaries are these stacks and the gradients': n + m times
the sum of the ranks, each up to a multiple of 8, or of 64 above 64.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.lora_matmul import gpu as lora
from pallas_kernels.lora_matmul import gpu_owners as owners
from pallas_kernels.lora_matmul.gpu import Config, candidates, configs, default_config
from pallas_kernels.multi_lora_matmul.reference import TILE, rows_of_z

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
    (t, n), m, r = x.shape, w.shape[1], rows_of_z(b)
    config = config or default_config(t, n, m, r)
    a, b, of = _whole_ranks(a, b)
    shared = {"owner": owner, "config": config, "interpret": interpret, **of}
    x = lora.whole_rows(x)
    z = lora.low_product(x, a, transposed=True, scales=scales, rows=r if of else None, **shared)
    return lora.product(x, w, z, b, transposed=False, **shared)[:t], z[:r, :t]


def input_gradient(dy, w, a, b, scales, owner, *, config: Config | None = None, interpret: Any = None):
    """(dx (T, n), e (r, T)); see reference.py."""
    (t, m), n, r = dy.shape, w.shape[0], rows_of_z(b)
    config = config or default_config(t, m, n, r)
    a, b, of = _whole_ranks(a, b)
    shared = {"owner": owner, "config": config, "interpret": interpret, **of}
    dy = lora.whole_rows(dy)
    e = lora.low_product(dy, b, transposed=False, scales=scales, rows=r if of else None, **shared)
    return lora.product(dy, w, e, a, transposed=True, **shared)[:t], e[:r, :t]


def factor_gradient(
    z, x, owner, *, count: int, ranks: tuple[int, ...] = (), config: Config | None = None, interpret: Any = None
):
    """z x over the rows of each adapter, float32 (G, r, k), or a tuple of (r_g, k); see reference.py."""
    shared = {"owner": owner, "adapters": count, "config": config or Config(), "interpret": interpret}
    if not ranks:
        return lora.row_product(lora.whole_low(z), lora.whole_rows(x), **shared)[:, : len(z)]
    z, stacks = gpu.padded(z, len(z), gpu.round_up(z.shape[1], gpu.TILE)), owners.stacks(ranks)
    counts = {rank: len(members) for rank, members in stacks.items()}
    found = lora.row_product(z, lora.whole_rows(x), ranks=counts, places=owners.places(ranks), **shared)
    own = {g: part[i] for part, members in zip(found, stacks.values(), strict=True) for i, g in enumerate(members)}
    return tuple(own[g][:rank] for g, rank in enumerate(ranks))


def _whole_ranks(a, b) -> tuple[Any, Any, dict[str, Any]]:
    """(a, b, places): as `lora.whole_ranks`; tuples as stacks, where their places are."""
    if not isinstance(b, tuple):
        return *lora.whole_ranks(a, b), {}
    ranks = [len(factor) for factor in b]
    groups = owners.stacks(ranks).items()

    def stacked(factors, members, rows=0, columns=0):
        """Those of `members`, up to so many rows and columns."""
        mine = [factors[g] for g in members]
        return jnp.stack([gpu.padded(f, rows or len(f), columns or f.shape[1]) for f in mine])

    a = tuple(stacked(a, members, columns=gpu.short_or_whole(rank)) for rank, members in groups)
    b = tuple(stacked(b, members, rows=rank) for rank, members in groups)
    return a, b, {"places": owners.places(ranks)}


def supports_forward(x, w, a, b, scales, owner) -> bool:
    """Whether `forward` takes arguments of these shapes."""
    if isinstance(b, tuple):
        return lora.supported(x, w, *a, *b) and rows_of_z(b) in lora.RANKS
    return lora.supported(x, w, a, b) and b.shape[1] in lora.RANKS


def supports_input_gradient(dy, w, a, b, scales, owner) -> bool:
    """Whether `input_gradient` takes arguments of these shapes."""
    return supports_forward(dy, w, a, b, scales, owner)


def supports_factor_gradient(z, x, owner, *, count: int, ranks: tuple[int, ...] = ()) -> bool:
    """Whether `factor_gradient` takes arguments of these shapes."""
    return lora.supported(x, None, z) and z.shape[0] in lora.RANKS
