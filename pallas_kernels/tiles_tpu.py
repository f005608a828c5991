"""Tiles of the TPU kernels: what fits in VMEM, and which should be the fastest.

A v5p has 64 MiB of VMEM, a v5e and a v6e 128. Blocks are there twice, as the pipeline copies one while the one before
is computed on (see mosaic_tpu.py). Times are estimated for the chip with the least memory bandwidth per FLOP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
# Of a v5p's 64 MiB: what a kernel may ask for, and what its blocks may take of that (the rest is the compiler's).
VMEM_LIMIT = 56 * 2**20
VMEM_BLOCKS = 44 * 2**20
# A v6e's: bfloat16 FLOP/s, bytes/s, and seconds that a step of a grid costs by itself.
FLOPS, BANDWIDTH, STEP = 918e12, 1640e9, 0.35e-6
RANKS = range(4, 257)
MOST = 24  # candidates
# Elements of a tile of W by the dtype's bytes: they bound an unrolled program's size.
WEIGHT_TILE = {2: 2**21, 4: 2**18}


class Config(NamedTuple):
    """Tiles of a kernel.

    rows: of x; a multiple of 128.
    columns: of the result, a multiple of 128; the last tile may be ragged.
    inputs: over which a product sums; a multiple of 128 that divides all (0 where the sum is over rows).
    vmem_limit_bytes: what the kernel may take of VMEM.
    """

    rows: int
    columns: int
    inputs: int
    vmem_limit_bytes: int = VMEM_LIMIT


# Products and arrays.


def size(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of a block in VMEM: the last axis is padded to 128, the one before to 8 rows of 4 bytes."""
    *lead, rows, columns = shape
    return math.prod(lead) * up_to(rows, 32 // itemsize) * up_to(columns, LANES) * itemsize


def bytes_of(*arrays) -> int:
    """Bytes of arrays or shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)


def up_to(count: int, unit: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // unit) * unit


def divisors(total: int, unit: int = LANES) -> list[int]:
    """The multiples of `unit` that divide `total`."""
    return [tile for tile in range(unit, total + 1, unit) if total % tile == 0]


def powers(total: int, largest: int) -> list[int]:
    """128, 256, ... up to `largest`, and all of `total`, rounded up, in place of what is larger."""
    total = up_to(total, LANES)
    tiles = [LANES * 2**i for i in range(12) if LANES * 2**i <= min(total, largest)]
    return sorted({*tiles, total}) if total <= largest else tiles


def fused_candidates(
    total: int,
    n: int,
    m: int,
    r: int,
    itemsize: int,
    vmem: Callable[[Config], int],
    largest: int = 2048,
    bits: float = 0,
    unpacking: float = 0,
) -> list[Config]:
    """Configurations of `low_rank_product` that fit, the one that should be the fastest first.

    Args:
      total, n, m, r: y (total, m) = x (total, n) W with rank r.
      itemsize: of x.
      vmem: bytes of VMEM of what the operation adds to x, y, z and the sums.
      largest: rows of a tile.
      bits: per element of W; 0: x's.
      unpacking: seconds per element of a tile of W, besides the product.
    """
    configs = [
        Config(i, j, k)
        for i in powers(total, largest)
        for j in powers(m, 2048)
        for k in divisors(n)
        if j * k <= WEIGHT_TILE[itemsize]
    ]
    return best(
        configs,
        lambda config: _seconds(config, total, n, m, itemsize, bits / 8 or itemsize, unpacking),
        lambda config: _vmem(config, r, itemsize) + vmem(config),
    )


def _vmem(config: Config, r: int, itemsize: int) -> int:
    """Bytes of the blocks of x, y and z, of the sums of y and z, and of a step's product."""
    rows, columns, inputs, _ = config
    blocks = size((rows, inputs), itemsize) + size((rows, columns), itemsize) + size((r, rows), itemsize)
    return 2 * blocks + 2 * size((rows, columns), 4) + 3 * size((rows, r), 4)


def _seconds(config: Config, total: int, n: int, m: int, itemsize: int, weight: float, unpacking: float) -> float:
    """Estimated time of `low_rank_product`; `weight` bytes per element of W, `unpacking` seconds."""
    rows, columns, inputs, _ = config
    i, j, k = pl.cdiv(total, rows), pl.cdiv(m, columns), n // inputs
    compute = inputs * columns * (2 * rows / (FLOPS if itemsize == 2 else FLOPS / 6) + unpacking)
    of_x, of_y = rows * inputs * itemsize / BANDWIDTH, rows * columns * itemsize / BANDWIDTH
    others = inputs * columns * weight / BANDWIDTH + of_y / k
    steps, repeated = i * j * k, i * (j - 1) if k == 1 else 0
    with_x, without_x = max(compute, others + of_x) + STEP, max(compute, others) + STEP
    return ((steps - repeated) * with_x + repeated * without_x) * shared(i)


def best(configs: Sequence[Config], seconds: Callable[[Config], float], vmem: Callable[[Config], int]) -> list[Config]:
    """The configurations that fit, the one that should be the fastest first, and no more than are worth timing."""
    return sorted((config for config in configs if vmem(config) <= VMEM_BLOCKS), key=seconds)[:MOST]


def shared(tiles: int) -> float:
    """What a grid of so many tiles along its parallel axis costs besides: the two cores of a v5p share them."""
    return 1.25 if tiles == 1 else 1.0
