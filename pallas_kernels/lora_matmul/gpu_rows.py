"""z drop(x): sums over rows, for the gradients of the factors, on NVIDIA GPUs of the Hopper generation.

row_product. A tile is all r by 128 columns, and a part of the rows: with k / 128 tiles there would not be one for each
block, so there are up to 8 parts, whose sums (parts, r, k) in float32 are added up afterwards. These are the only
temporaries: at most 128 BLOCKS r floats, 67 KB times r; none where k > 66 * 128.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.lora_matmul import gpu_owners as owners
from pallas_kernels.lora_matmul.gpu_products import ROWS, Config, mask, scalars, seed_of
from pallas_kernels.mosaic_gpu import COMPUTE, TILE, Ring, ceil_div, round_up

PARTS = 8  # of the rows, at most, whose sums `row_product` keeps apart
ROW_SLOTS = 6  # of its ring, where they fit


def parts_of_rows(rows: int, k: int, config: Config) -> int:
    """Into how many parts `row_product` cuts the rows, so that there is a tile for every block."""
    tiles = ceil_div(rows, ROWS)
    wanted = max(1, min(PARTS, config.blocks // ceil_div(k, COMPUTE * TILE)))
    return ceil_div(tiles, ceil_div(tiles, wanted))


def row_product(
    z, x, seed=None, *, config: Config, rate=0.0, owner=None, adapters=0, ranks=None, places=None, interpret=None
):
    """Sums over rows of z drop(x): float32 (parts, r, k) of z (r, T rounded up to 64), x (T, k).

    parts: sums over parts of the rows, to be added up; with an owner, one per adapter. With `places`, a tuple of such
    arrays, the stacks of adapters of each rank, and `ranks` {r: how many have it}.
    """
    (t, k), r = x.shape, len(z)
    heights, wide = tuple(round_up(rank, TILE) for rank in ranks or (r,)), COMPUTE * TILE
    tallest = max(heights)
    row_tiles, column_tiles = ceil_div(t, ROWS), ceil_div(k, wide)
    parts = parts_of_rows(t, k, config) if owner is None else adapters
    per_part = ceil_div(row_tiles, parts)
    tiles = parts * column_tiles
    blocks = min(config.blocks, tiles)
    sums = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    slots = gpu.slots_that_fit(ROW_SLOTS, 2 * TILE * (tallest + wide), 4 * COMPUTE * TILE * TILE)

    def body(z_ref, x_ref, extra, *out_refs, z_slots, x_slots, staging, full, empty):
        ring = Ring(full, empty, slots)

        def rows_of(part) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
            """(first row tile, how many, the first that is the part's from a given one on)."""
            if owner is None:
                begin = part * per_part
                return begin, jnp.minimum(per_part, row_tiles - begin), lambda i: i
            of = extra["owner"]
            count = lax.fori_loop(0, row_tiles, lambda i, n: n + (of[i] == part).astype(jnp.int32), jnp.int32(0))
            return jnp.int32(0), count, lambda i: lax.while_loop(lambda i: of[i] != part, lambda i: i + 1, i)

        def each_step(rows, action):
            """action(number of the step, first row) for the steps of a tile with such rows."""
            begin, count, following = rows

            def row_tile(i, place):
                place = following(place)
                for part in range(ROWS // TILE):
                    action(i * (ROWS // TILE) + part, place * ROWS + part * TILE)
                return place + 1

            lax.fori_loop(0, count, row_tile, begin)

        def each_height(part, use):
            owners.each_height(heights, extra["height"][part] if "height" in extra else None, use)

        def memory():
            def tile(first, number):
                part, columns = number // column_tiles, pl.ds(number % column_tiles * wide, wide)
                rows = rows_of(part)

                def of_height(height):
                    def fetch(i, row):
                        z = z_ref.at[gpu.beyond(0, height, row), pl.ds(row, TILE)]
                        ring.fill(
                            first + i,
                            (z, lambda slot: owners.first(z_slots, slot, height)),
                            (x_ref.at[pl.ds(row, TILE), columns], lambda slot: x_slots.at[slot]),
                        )

                    each_step(rows, fetch)

                each_height(part, of_height)
                return first + rows[1] * (ROWS // TILE)

            ring.drain(gpu.each_tile(tiles, blocks, tile))

        def compute(half):
            seed = seed_of(extra)
            columns = pl.ds(half * TILE, TILE)

            def tile(first, number):
                part, column = number // column_tiles, number % column_tiles * wide + half * TILE
                rows = rows_of(part)
                steps = rows[1] * (ROWS // TILE)

                def of_height(height):
                    def accumulate(acc):
                        def multiply(i, row):
                            ring.wait(first + i)
                            slot = ring.slot(first + i)
                            rhs = x_slots.at[slot, :, columns]
                            if rate:
                                rhs[...] = mask(rhs[...], seed, row, column, rate)
                                plgpu.commit_smem()
                            plgpu.wgmma(acc, owners.first(z_slots, slot, height), rhs)
                            plgpu.wgmma_wait(1)

                            @pl.when(i > 0)
                            def _():
                                ring.release(first + i - 1)

                        each_step(rows, multiply)
                        return acc[...]

                    total = pl.run_scoped(accumulate, plgpu.ACC((height, TILE), jnp.float32))

                    @pl.when(steps > 0)
                    def _():
                        ring.release(first + steps - 1)

                    def out(place):
                        for i in range(0, height, TILE):
                            target = place.at[gpu.beyond(i, TILE, number), pl.ds(column, TILE)]
                            values = total[i : i + TILE]
                            gpu.store(values * (1 / (1 - rate)) if rate else values, staging.at[half], target)

                    for i, stack in enumerate(out_refs):
                        if not ranks:
                            out(stack.at[part])
                        elif heights[i] == height:
                            pl.when(extra["stack"][part] == i)(functools.partial(out, stack.at[extra["place"][part]]))

                each_height(part, of_height)
                return first + steps

            gpu.each_tile(tiles, blocks, tile)
            plgpu.wait_smem_to_gmem(0)

        gpu.specialise(compute, memory)

    return gpu.launch(
        body,
        z,
        x,
        scalars(rate, seed, owner=owner, **(places or {})),
        name="lora_row_product",
        out=tuple(sums((count, own, k)) for own, count in ranks.items()) if ranks else sums((parts, r, k)),
        blocks=blocks,
        interpret=interpret,
        z_slots=gpu.swizzled(slots, tallest, TILE, dtype=x.dtype),
        x_slots=gpu.swizzled(slots, TILE, wide, dtype=x.dtype),
        staging=gpu.swizzled(COMPUTE, TILE, TILE, dtype=jnp.float32),
        **Ring.barriers(slots, 2),
    )
