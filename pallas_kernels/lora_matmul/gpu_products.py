"""The kernels of LoRA's products on NVIDIA GPUs of the Hopper generation (wgmma and TMA), by Mosaic GPU.

Three kernels, the first in gpu_low.py, the last in gpu_rows.py; mosaic_gpu.py describes their pipeline. With
drop(x) = x keep / (1 - rate), keep drawn again wherever it is needed and never stored, and all sums in float32:

    low_product     z = s F drop(x)^T            (r, T)      F = A^T (r, n), read transposed; for e, F = B and x = dy
    product         y = x W + drop(z^T B)        (T, m)      for dx, W and B are W^T and A^T, read transposed
    row_product     z drop(x)                    (r, k)

Forward is the first two, as LoRAFusion splits it: x is read twice, but from then on a tile of y costs one tile of z and
B, whatever r is, instead of the whole of A. Nothing of size T x r but z and nothing of size T x m but y is written.

low_product. A tile is 64 rows. Both warpgroups multiply it, one the even steps of 64 inputs and one the odd ones:

    (r, 64 inputs) x (64 inputs, 64 rows)        r, rounded up to 64, is wgmma's M, so that z needs no transposition

and the second one hands its sums to the first. The mask is applied in place to the slot in shared memory. Traffic: x
once, A once per tile (from the L2 cache).

product. A tile is 128 rows by `columns`; each warpgroup has 64 rows, and its sums in registers (64 x 256 float32: half
of all). The ring's slots hold x (128, 64) and W (64, columns); then, as more steps of the same ring, z (64, 128) and B
(64, columns), that is, z^T in as many bytes as x. Without a mask the two are one product, over n + r inputs:

    y = (x, z^T) (W; B)                          z^T is read transposed, as wgmma can read what is in shared memory

that is, the last steps go into the same sums, and y is rounded and goes out through shared memory by TMA, 64 columns at
a time. That is why z carries the scale. A mask (of dx; y's is in z) is of the low-rank part alone: then that is a
product of its own, by 64 columns as y goes out, and its steps stay in their slots until the tile is done.
Traffic: x once per column of tiles, W once per row of tiles, most of it from the L2 cache by the order of `snake`.

What TMA does not take is copied: x, dy and their results where T is not a multiple of 8, z and e where it is not one of
64, factors where r is neither a multiple of 8 up to 64 nor one of 64.

Two choices that rounding sees: s / (1 - rate) multiplies sums, not elements; and in float32, before z or e is rounded.

Source: Zhu et al. 2025, "LoRAFusion", arXiv:2510.00206.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.dropout import keep
from pallas_kernels.lora_matmul import gpu_owners as owners
from pallas_kernels.mosaic_gpu import COMPUTE, TILE, Ring, ceil_div
from pallas_kernels.stacked import whole

ROWS = COMPUTE * TILE  # of x in a tile


class Config(NamedTuple):
    """How the products are cut.

    columns: of a tile of y (or dx); 64, 128 or 256.
    slots: of the ring of `product`.
    width: rows of tiles that are worked on together, see `mosaic_gpu.snake`.
    blocks: of the grid; the number of streaming multiprocessors.
    """

    columns: int = 256
    slots: int = 4
    width: int = 8
    blocks: int = gpu.BLOCKS


def mask(values, seed, row, column, rate: float):
    """values, those that dropout keeps, of the tile that begins at (row, column)."""
    kept = keep(seed, gpu.iota(values.shape, 0, row), gpu.iota(values.shape, 1, column), rate)
    return jnp.where(kept, values, jnp.zeros_like(values))


def scalars(rate: float, seed, **others) -> dict[str, jax.Array]:
    """The scalars that a kernel reads, where it needs them."""
    found = {"seed": seed.reshape(1) if rate else None, **others}
    return {name: values for name, values in found.items() if values is not None}


def seed_of(extra):
    """The seed among a kernel's scalars, () int32; None without dropout."""
    return extra["seed"][0] if "seed" in extra else None


def of_layer(ref, extra, name="layer"):
    """The whole, or a layer of the stack."""
    return ref.at[extra[name][0]] if name in extra else ref


def _halves(x_ref, row, columns, x_slots) -> list[tuple[Any, Callable]]:
    """Copies of the rows of a tile, one per warpgroup."""
    return [
        (
            x_ref.at[pl.ds(row + half * TILE, TILE), columns],
            lambda slot, half=half: x_slots.at[slot, pl.ds(half * TILE, TILE)],
        )
        for half in range(COMPUTE)
    ]


# y = x W + z^T B


def slots_of_product(config: Config, k: int, r: int, itemsize: int, masked: bool = False) -> int:
    """How many slots the ring of `product` has: those that fit, no more than steps; with a mask, all low-rank steps."""
    staging = itemsize * COMPUTE * 2 * TILE * TILE
    slots = gpu.slots_that_fit(config.slots, itemsize * TILE * (ROWS + config.columns), staging)
    low_steps = ceil_div(r, TILE)
    return max(min(slots, ceil_div(k, TILE) + low_steps), low_steps if masked else 1)


def product(
    x,
    w,
    z,
    b,
    seed=None,
    *,
    transposed: bool,
    config: Config,
    rate=0.0,
    owner=None,
    places=None,
    into=None,
    interpret=None,
):
    """x W + drop(z^T B) (T, m) for w (k, m) and b (r, m), or w (m, k) and b (m, r) if transposed.

    With an owner, b is (G, ...), or a tuple of stacks and `places` theirs (gpu_owners.py). w may be a layer of a stack.
    `into`, a layer of a stack, is where the result is written; then that stack is what is given back.
    """
    t, k = x.shape
    m = w.shape[0 if transposed else 1]
    w, layer = whole(w)
    stack, place = (None, None) if into is None else whole(into)
    heights = owners.heights_of(b, -1 if transposed else -2)
    columns, slots = config.columns, slots_of_product(config, k, len(z), x.dtype.itemsize, masked=rate > 0)
    steps, low_steps = ceil_div(k, TILE), ceil_div(len(z), TILE)
    row_tiles, column_tiles = ceil_div(t, ROWS), ceil_div(m, columns)
    tiles = row_tiles * column_tiles
    blocks = min(config.blocks, tiles)
    shape = (columns, TILE) if transposed else (TILE, columns)

    def body(x_ref, w_ref, z_ref, b_ref, extra, y_ref, x_slots, w_slots, staging, full, empty):
        ring, y_ref = Ring(full, empty, slots), of_layer(y_ref, extra, "into")

        def tile_at(number):
            return gpu.snake(number, row_tiles, column_tiles, config.width)

        def low_steps_of(row):
            height = owners.height_at(extra, row)
            return low_steps if height is None else height // TILE

        def panel(ref, i, column):
            """Step i's part of w or b, for the tile's columns."""
            inner, outer = pl.ds(i * TILE, TILE), pl.ds(column * columns, columns)
            return ref.at[(outer, inner) if transposed else (inner, outer)], lambda slot: w_slots.at[slot]

        def memory():
            def tile(first, number):
                row, column = tile_at(number)
                own_w = of_layer(w_ref, extra)

                def step(i, _):
                    ring.fill(
                        first + i, *_halves(x_ref, row * ROWS, pl.ds(i * TILE, TILE), x_slots), panel(own_w, i, column)
                    )

                def low(mine, height):
                    def step(i, _):
                        blocks = [
                            (
                                z_ref.at[pl.ds(i * TILE, TILE), pl.ds(row * ROWS + half * TILE, TILE)],
                                lambda slot, half=half: x_slots.at[slot, pl.ds(half * TILE, TILE)],
                            )
                            for half in range(COMPUTE)
                        ]
                        ring.fill(first + steps + i, *blocks, panel(mine, i, column))

                    lax.fori_loop(0, height // TILE, step, None)

                lax.fori_loop(0, steps, step, None)
                owners.with_factor(b_ref, heights, extra, owners.owner_of(extra, row), low)
                return first + steps + low_steps_of(row)

            ring.drain(gpu.each_tile(tiles, blocks, tile))

        def compute(half):
            seed = seed_of(extra)
            rows = pl.ds(half * TILE, TILE)

            def tile(first, number):
                row, column = tile_at(number)
                start, low_steps = row * ROWS + half * TILE, low_steps_of(row)

                def accumulate(acc):
                    def multiply(i, slot):
                        rhs = w_slots.at[slot]
                        plgpu.wgmma(acc, x_slots.at[slot, rows], gpu.transposed(rhs) if transposed else rhs)

                    def multiply_low(i, slot):
                        rhs = w_slots.at[slot]
                        lhs = gpu.transposed(x_slots.at[slot, rows])
                        plgpu.wgmma(acc, lhs, gpu.transposed(rhs) if transposed else rhs)

                    gpu.multiply_steps(ring, first, steps, multiply)
                    if not rate:
                        gpu.multiply_steps(ring, first + steps, low_steps, multiply_low, follows=True)
                    return acc[...]

                y = pl.run_scoped(accumulate, plgpu.ACC((TILE, columns), jnp.float32))
                following = first + steps + low_steps
                ring.release((first + steps if rate else following) - 1)
                # With one chunk per tile the next tile's store is from the same staging.
                in_flight = 1 if columns > TILE else 0

                def out(i, chunk, values):
                    target = y_ref.at[pl.ds(start, TILE), pl.ds(column * columns + chunk, TILE)]
                    gpu.store(values, staging.at[half, i % 2], target, in_flight=in_flight)

                if not rate:
                    for i, chunk in enumerate(range(0, columns, TILE)):
                        out(i, chunk, y[:, chunk : chunk + TILE])
                    return following
                each_low_step = functools.partial(lax.fori_loop, first + steps, following)
                each_low_step(lambda i, _: ring.wait(i), None)

                def low_part(chunk):
                    def accumulate(acc):
                        def multiply(i, _):
                            slot = ring.slot(i)
                            if transposed:
                                rhs = gpu.transposed(w_slots.at[slot, pl.ds(chunk, TILE)])
                            else:
                                rhs = w_slots.at[slot, :, pl.ds(chunk, TILE)]
                            plgpu.wgmma(acc, gpu.transposed(x_slots.at[slot, rows]), rhs)

                        each_low_step(multiply, None)
                        return acc[...]

                    return pl.run_scoped(accumulate, plgpu.ACC((TILE, TILE), jnp.float32))

                for i, chunk in enumerate(range(0, columns, TILE)):
                    added = mask(low_part(chunk) * (1 / (1 - rate)), seed, start, column * columns + chunk, rate)
                    out(i, chunk, y[:, chunk : chunk + TILE] + added)
                each_low_step(lambda i, _: ring.release(i), None)
                return following

            gpu.each_tile(tiles, blocks, tile)
            plgpu.wait_smem_to_gmem(0)

        # A mask is drawn beside half of the registers.
        gpu.specialise(compute, memory, 24 if rate and columns == 256 else 40)

    return gpu.launch(
        body,
        x,
        w,
        z,
        b,
        scalars(
            rate,
            seed,
            owner=owner,
            layer=layer,
            into=place,
            **(places or {}),
        ),
        name="lora_product_transposed" if transposed else "lora_product",
        out=jax.ShapeDtypeStruct((t, m), x.dtype) if stack is None else stack,
        blocks=blocks,
        interpret=interpret,
        x_slots=gpu.swizzled(slots, ROWS, TILE, dtype=x.dtype),
        w_slots=gpu.swizzled(slots, *shape, dtype=x.dtype),
        staging=gpu.swizzled(COMPUTE, 2, TILE, TILE, dtype=x.dtype),
        **Ring.barriers(slots, COMPUTE + 1),
    )
