"""z = s A^T drop(x)^T: the thin product of LoRA, on NVIDIA GPUs of the Hopper generation; see gpu_products.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.lora_matmul import gpu_owners as owners
from pallas_kernels.lora_matmul.gpu_products import ROWS, Config, mask, scalars, seed_of
from pallas_kernels.mosaic_gpu import COMPUTE, TILE, Ring, ceil_div, round_up

SLOTS = 12  # of the ring, where they fit


def low_product(
    x,
    factor,
    seed=None,
    *,
    transposed: bool,
    config: Config,
    scale=1.0,
    rate=0.0,
    owner=None,
    places=None,
    scales=None,
    rows=None,
    interpret=None,
):
    """s factor drop(x)^T (r, T rounded up to 64) for a factor (r, k), or (k, r) if transposed.

    With an owner, the factor is (G, ...), or a tuple of stacks and `places` theirs (gpu_owners.py); then r is `rows`,
    at least the largest rank. With scales (G,), s is that of the rows' owner.
    """
    (t, k), axis = x.shape, -1 if transposed else -2
    heights, tiles = owners.heights_of(factor, axis), ceil_div(t, TILE)
    tallest, r = max(heights), rows or factor.shape[axis]
    steps = COMPUTE * ceil_div(k, COMPUTE * TILE)
    blocks = min(config.blocks, tiles)
    shape = (TILE, tallest) if transposed else (tallest, TILE)
    staged = (2 + 4) * TILE * TILE
    slots = gpu.slots_that_fit(SLOTS, 2 * TILE * (TILE + tallest), staged) // COMPUTE * COMPUTE

    def body(x_ref, factor_ref, extra, z_ref, x_slots, factor_slots, staging, other, full, empty, given, taken):
        ring = Ring(full, empty, slots)

        def memory():
            def tile(first, row):
                def fetch(mine, height):
                    # TMA writes no part of a tile's columns: it has zeros for those beyond the rank.
                    height = tallest if transposed else height

                    def step(i, _):
                        columns, ranks = pl.ds(i * TILE, TILE), gpu.beyond(0, height, row)
                        ring.fill(
                            first + i,
                            (x_ref.at[pl.ds(row * TILE, TILE), columns], lambda slot: x_slots.at[slot]),
                            (
                                mine.at[(columns, ranks) if transposed else (ranks, columns)],
                                lambda slot: owners.first(factor_slots, slot, height, int(transposed)),
                            ),
                        )

                    lax.fori_loop(0, steps, step, None)

                at = row * TILE // ROWS
                owners.with_factor(factor_ref, heights, extra, owners.owner_of(extra, at), fetch)
                return first + owners.count_at(owners.height_at(extra, at), steps)

            ring.drain(gpu.each_tile(tiles, blocks, tile))

        def compute(parity):
            seed = seed_of(extra)

            def multiplied(height, first, row):
                """The rows' sums, over this warpgroup's steps."""

                def accumulate(acc):
                    def multiply(i, slot):
                        rows, lhs = x_slots.at[slot], owners.first(factor_slots, slot, height, int(transposed))
                        if rate:
                            column = (COMPUTE * i + parity) * TILE
                            rows[...] = mask(rows[...], seed, row * TILE, column, rate)
                            plgpu.commit_smem()
                        plgpu.wgmma(acc, gpu.transposed(lhs) if transposed else lhs, gpu.transposed(rows))

                    gpu.multiply_steps(ring, first + parity, steps // COMPUTE, multiply, COMPUTE)
                    return acc[...]

                half = pl.run_scoped(accumulate, plgpu.ACC((height, TILE), jnp.float32))
                ring.release(first + steps - COMPUTE + parity)
                return half

            def out(height, first, row):
                def target(i):
                    return z_ref.at[gpu.beyond(i, TILE, row), pl.ds(row * TILE, TILE)]

                if height:
                    half, factor = multiplied(height, first, row), scale / (1 - rate)
                    if "scales" in extra:
                        factor = extra["scales"][extra["owner"][row * TILE // ROWS]]
                for i in range(0, height, TILE):
                    part = half[i : i + TILE]

                    @pl.when(parity == 0)
                    def _(part=part, i=i):
                        plgpu.barrier_wait(given)
                        z = (part + other[...]) * factor
                        plgpu.barrier_arrive(taken)
                        gpu.store(z, staging, target(i))

                    @pl.when(parity == 1)
                    def _(part=part):
                        other[...] = part
                        plgpu.barrier_arrive(given)
                        plgpu.barrier_wait(taken)

                for i in range(height, tallest, TILE):

                    @pl.when(parity == 0)
                    def _(i=i):
                        gpu.store(jnp.zeros((TILE, TILE), jnp.float32), staging, target(i))

            def tile(first, row):
                height = owners.height_at(extra, row * TILE // ROWS)
                owners.each_height((*heights, 0), height, functools.partial(out, first=first, row=row))
                return first + owners.count_at(height, steps)

            gpu.each_tile(tiles, blocks, tile)
            plgpu.wait_smem_to_gmem(0)

        gpu.specialise(compute, memory)

    return gpu.launch(
        body,
        x,
        factor,
        scalars(rate, seed, owner=owner, scales=scales, **(places or {})),
        name="lora_low_product",
        out=jax.ShapeDtypeStruct((r, round_up(t, TILE)), x.dtype),
        blocks=blocks,
        interpret=interpret,
        x_slots=gpu.swizzled(slots, TILE, TILE, dtype=x.dtype),
        factor_slots=gpu.swizzled(slots, *shape, dtype=x.dtype),
        staging=gpu.swizzled(TILE, TILE, dtype=x.dtype),
        other=gpu.swizzled(TILE, TILE, dtype=jnp.float32),
        given=plgpu.Barrier(),
        taken=plgpu.Barrier(),
        **Ring.barriers(slots, 2, users=1),
    )
