"""z drop(x): sums over rows, for the gradients of the factors, on NVIDIA GPUs of the Hopper generation.

row_product. A tile is all r by 128 columns, and a part of the rows: with k / 128 tiles there would not be one for each
block, so there are up to 8 parts, whose sums (parts, r, k) in float32 are added up afterwards. These are the only
temporaries: at most 128 BLOCKS r floats, 67 KB times r; none where k > 66 * 128.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.lora_matmul.gpu_products import ROWS, Config, mask, scalars, seed_of
from pallas_kernels.mosaic_gpu import COMPUTE, TILE, Ring, ceil_div, round_up

PARTS = 8  # of the rows, at most, whose sums `row_product` keeps apart
ROW_SLOTS = 6  # of its ring, where they fit


def parts_of_rows(rows: int, k: int, config: Config) -> int:
    """Into how many parts `row_product` cuts the rows, so that there is a tile for every block."""
    tiles = ceil_div(rows, ROWS)
    wanted = max(1, min(PARTS, config.blocks // ceil_div(k, COMPUTE * TILE)))
    return ceil_div(tiles, ceil_div(tiles, wanted))


def row_product(z, x, seed=None, *, config: Config, rate=0.0, owner=None, adapters=0, interpret=None):
    """Sums over rows of z drop(x): float32 (parts, r, k) of z (r, T rounded up to 64), x (T, k).

    parts: sums over parts of the rows, to be added up; with an owner, one per adapter.
    """
    (t, k), r = x.shape, len(z)
    height, wide = round_up(r, TILE), COMPUTE * TILE
    row_tiles, column_tiles = ceil_div(t, ROWS), ceil_div(k, wide)
    parts = parts_of_rows(t, k, config) if owner is None else adapters
    per_part = ceil_div(row_tiles, parts)
    tiles = parts * column_tiles
    blocks = min(config.blocks, tiles)
    slots = gpu.slots_that_fit(ROW_SLOTS, 2 * TILE * (height + wide), 4 * COMPUTE * TILE * TILE)

    def body(z_ref, x_ref, extra, out_ref, z_slots, x_slots, staging, full, empty):
        ring = Ring(full, empty, slots)

        def rows_of(part) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
            """(first row tile, how many, the first that is the part's from a given one on)."""
            if owner is None:
                begin = part * per_part
                return begin, jnp.minimum(per_part, row_tiles - begin), lambda i: i
            owners = extra["owner"]
            count = lax.fori_loop(0, row_tiles, lambda i, n: n + (owners[i] == part).astype(jnp.int32), jnp.int32(0))
            return jnp.int32(0), count, lambda i: lax.while_loop(lambda i: owners[i] != part, lambda i: i + 1, i)

        def each_step(number, action):
            """action(number of the step, first row) for the steps of a tile; how many there were."""
            begin, count, following = rows_of(number // column_tiles)

            def row_tile(i, place):
                place = following(place)
                for part in range(ROWS // TILE):
                    action(i * (ROWS // TILE) + part, place * ROWS + part * TILE)
                return place + 1

            lax.fori_loop(0, count, row_tile, begin)
            return count * (ROWS // TILE)

        def memory():
            def tile(first, number):
                columns = pl.ds(number % column_tiles * wide, wide)

                def fetch(i, row):
                    ring.fill(
                        first + i,
                        (z_ref.at[gpu.beyond(0, height, row), pl.ds(row, TILE)], lambda slot: z_slots.at[slot]),
                        (x_ref.at[pl.ds(row, TILE), columns], lambda slot: x_slots.at[slot]),
                    )

                return first + each_step(number, fetch)

            ring.drain(gpu.each_tile(tiles, blocks, tile))

        def compute(half):
            seed = seed_of(extra)
            columns = pl.ds(half * TILE, TILE)

            def tile(first, number):
                part, column = number // column_tiles, number % column_tiles * wide + half * TILE

                def accumulate(acc):
                    def multiply(i, row):
                        ring.wait(first + i)
                        slot = ring.slot(first + i)
                        rhs = x_slots.at[slot, :, columns]
                        if rate:
                            rhs[...] = mask(rhs[...], seed, row, column, rate)
                            plgpu.commit_smem()
                        plgpu.wgmma(acc, z_slots.at[slot], rhs)
                        plgpu.wgmma_wait(1)

                        @pl.when(i > 0)
                        def _():
                            ring.release(first + i - 1)

                    steps = each_step(number, multiply)
                    return acc[...], steps

                total, steps = pl.run_scoped(accumulate, plgpu.ACC((height, TILE), jnp.float32))

                @pl.when(steps > 0)
                def _():
                    ring.release(first + steps - 1)

                for i in range(0, height, TILE):
                    target = out_ref.at[part, gpu.beyond(i, TILE, number), pl.ds(column, TILE)]
                    values = total[i : i + TILE]
                    gpu.store(values * (1 / (1 - rate)) if rate else values, staging.at[half], target)
                return first + steps

            gpu.each_tile(tiles, blocks, tile)
            plgpu.wait_smem_to_gmem(0)

        gpu.specialise(compute, memory)

    return gpu.launch(
        body,
        z,
        x,
        scalars(rate, seed, owner=owner),
        name="lora_row_product",
        out=jax.ShapeDtypeStruct((parts, r, k), jnp.float32),
        blocks=blocks,
        interpret=interpret,
        z_slots=gpu.swizzled(slots, height, TILE, dtype=x.dtype),
        x_slots=gpu.swizzled(slots, TILE, wide, dtype=x.dtype),
        staging=gpu.swizzled(COMPUTE, TILE, TILE, dtype=jnp.float32),
        **Ring.barriers(slots, 2),
    )
