"""x W[l] for few rows on NVIDIA GPUs of the Hopper generation (wgmma and TMA), by Mosaic GPU.

    parts[p] = x[:, inputs of p] W[l, inputs of p]        (P, T, m) float32, added up in plain JAX

The time is that of reading W, so every streaming multiprocessor should read a part of it: a tile is 64 rows of x by 128
columns of W over one of P parts of the n inputs. mosaic_gpu.py describes the pipeline. A slot holds x (64, 64) and W
(64, 128); as many as fit are under way. Each of the two warpgroups multiplies by half of the columns.

Traffic: W once per 64 rows, x once per column of tiles (from the L2 cache), P sums of T x m.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.lora_matmul.gpu import supported, whole_rows
from pallas_kernels.lora_matmul.gpu_products import of_layer
from pallas_kernels.mosaic_gpu import COMPUTE, TILE, Ring, ceil_div
from pallas_kernels.stacked import Stacked, whole

COLUMNS = COMPUTE * TILE  # of a tile of y
PARTS = 16  # at most
SLOTS = 8  # of the ring, where they fit


class Config(NamedTuple):
    """How the product is cut.

    parts: of the sum, each with a multiple of 64 inputs; a divisor of n / 64.
    slots: of the ring.
    blocks: of the grid; the number of streaming multiprocessors.
    """

    parts: int = 1
    slots: int = SLOTS
    blocks: int = gpu.BLOCKS


def forward(x, w: Stacked, *, config: Config | None = None, interpret: Any = None):
    """(y (T, m),)."""
    t = len(x)
    config = config or default_config(t, *w.shape)
    parts = _parts(whole_rows(x), w, config, interpret)
    return (parts.sum(0)[:t].astype(x.dtype),)


def supports_forward(x, w: Stacked) -> bool:
    """Whether `forward` takes arguments of these shapes: a stack of x's type, n a multiple of 64, m of 128."""
    return isinstance(w, Stacked) and supported(x, w) and w.shape[1] % COLUMNS == 0


def default_config(rows: int, n: int, m: int) -> Config:
    """The parts for which reading W, as slowly as fewer blocks than there are read it, and the sums take least."""
    tiles = ceil_div(rows, TILE) * (m // COLUMNS)

    def cost(parts: int) -> float:
        busy = tiles * parts / (ceil_div(tiles * parts, gpu.BLOCKS) * gpu.BLOCKS)
        return 2 * n * m / busy + 8 * parts * rows * m

    return Config(min((parts for parts in range(1, PARTS + 1) if n // TILE % parts == 0), key=cost))


def _parts(x, w: Stacked, config: Config, interpret):
    """float32 (P, T, m)."""
    (t, n), m = x.shape, w.shape[1]
    stack, layer = whole(w)
    steps, column_tiles = n // TILE // config.parts, m // COLUMNS
    tiles = ceil_div(t, TILE) * config.parts * column_tiles
    blocks = min(config.blocks, tiles)
    slots = gpu.slots_that_fit(config.slots, 2 * TILE * (TILE + COLUMNS), 4 * COMPUTE * TILE * TILE)

    def body(x_ref, w_ref, extra, out_ref, x_slots, w_slots, staging, full, empty):
        ring = Ring(full, empty, slots)

        def place(number):
            """(row tile, part, column tile)."""
            row, rest = number // (config.parts * column_tiles), number % (config.parts * column_tiles)
            return row, rest // column_tiles, rest % column_tiles

        def memory():
            def tile(first, number):
                row, part, column = place(number)
                own = of_layer(w_ref, extra)

                def fetch(i, _):
                    inputs = pl.ds((part * steps + i) * TILE, TILE)
                    ring.fill(
                        first + i,
                        (x_ref.at[pl.ds(row * TILE, TILE), inputs], lambda slot: x_slots.at[slot]),
                        (own.at[inputs, pl.ds(column * COLUMNS, COLUMNS)], lambda slot: w_slots.at[slot]),
                    )

                lax.fori_loop(0, steps, fetch, None)
                return first + steps

            ring.drain(gpu.each_tile(tiles, blocks, tile))

        def compute(half):
            columns = pl.ds(half * TILE, TILE)

            def tile(first, number):
                row, part, column = place(number)

                def accumulate(acc):
                    def multiply(i, slot):
                        plgpu.wgmma(acc, x_slots.at[slot], w_slots.at[slot, :, columns])

                    gpu.multiply_steps(ring, first, steps, multiply)
                    return acc[...]

                sums = pl.run_scoped(accumulate, plgpu.ACC((TILE, TILE), jnp.float32))
                ring.release(first + steps - 1)
                target = out_ref.at[part, pl.ds(row * TILE, TILE), pl.ds(column * COLUMNS + half * TILE, TILE)]
                gpu.store(sums, staging.at[half], target)
                return first + steps

            gpu.each_tile(tiles, blocks, tile)
            plgpu.wait_smem_to_gmem(0)

        gpu.specialise(compute, memory)

    return gpu.launch(
        body,
        x,
        stack,
        {"layer": layer},
        name="stack_matmul",
        out=jax.ShapeDtypeStruct((config.parts, t, m), jnp.float32),
        blocks=blocks,
        interpret=interpret,
        x_slots=gpu.swizzled(slots, TILE, TILE, dtype=x.dtype),
        w_slots=gpu.swizzled(slots, TILE, COLUMNS, dtype=x.dtype),
        staging=gpu.swizzled(COMPUTE, TILE, TILE, dtype=jnp.float32),
        **Ring.barriers(slots, 2),
    )
