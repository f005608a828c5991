"""LoRA's products over a packed kernel on NVIDIA GPUs of the Hopper generation (wgmma and TMA), by Mosaic GPU.

z and e have nothing to do with W: they are lora_matmul's `low_product`. What is here is

    product     y = x W + drop(z^T B)        (T, m)      for dx, W and B are W^T and A^T, read transposed

over the codes of W, which come by TMA as they lie in memory, are turned into bfloat16 in registers, and never exist in
another form outside a streaming multiprocessor. Scales are read decoded, (n / group, m) float32. It is for few rows:
each tile of rows unpacks all of W, so from UNPACKED rows on, unless a `config` asks for the kernel, W is unpacked to
memory and the products are lora_matmul's.

A tile is `rows` (128 or 256) by 128; each warpgroup has half of the rows, so both multiply by the same W. A panel is
the W of 64 steps of the sum in bfloat16: (64, 128), or (128, 64) for W^T. Each warpgroup unpacks one half of it,
(64, 64): half of the columns, for W; for W^T half of the rows, which are the bytes' high or low nibbles (packed.py), or
other bytes. Such a half has one scale per column, because the group is a multiple of 64.

    unpack my half of panel q           while the tensor cores are at panel q - 1
    arrive at unpacked[q]; wait for the other half
    multiply; wait until panel q - 1 is multiplied, and release its x

There are 3 panels: a warpgroup that is past unpacked[q] knows that the other has multiplied panel q - 2, so it may
write panel q + 1 in its place.

Two rings: x (rows, 64) per panel, and codes with their scales: 128 inputs by the tile's columns, two panels, or for W^T
128 inputs by 64 outputs, one. z comes through x's ring at the end, as in lora_matmul; B has a place of its own. As
there, z^T B goes into the same sums, unless it has a mask.

By count of instructions, unpacking an element takes about 8 for int4 and int8, and 25 for nf4 (a tree of selects over
the 16 values; there is no look-up in registers), once per tile of rows: at 128 rows more than the tensor cores take for
nf4 (five times as much on an H100), at 256 half of that, but then sums and codes together exceed the registers, and
about 50 of them are spilled.

Traffic: as lora_matmul's, with W's share 2 to 4 times less.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lora_matmul as dense  # with its tiles, where a table has them
from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels import packed
from pallas_kernels.lora_matmul import gpu as lora
from pallas_kernels.lora_matmul.gpu_products import mask, of_layer, scalars
from pallas_kernels.mosaic_gpu import COMPUTE, TILE, Ring, ceil_div
from pallas_kernels.stacked import AnyPacked, taken, whole

UNPACKED = 256  # rows from which on W is unpacked before the product
PANELS = 3
INPUTS = 2 * TILE  # that share a tile of codes, and columns of a tile of y


class Config(NamedTuple):
    """How the product is cut.

    rows: of a tile, 128 or 256.
    slots: of x's ring.
    code_slots: of the codes' ring.
    width: rows of tiles that are worked on together, see `mosaic_gpu.snake`.
    blocks: of the grid; the number of streaming multiprocessors.
    """

    rows: int = 128
    slots: int = 6
    code_slots: int = 3
    width: int = 4
    blocks: int = gpu.BLOCKS


def forward(
    x, w: AnyPacked, a, b, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None
):
    """(y (T, m), z (r, T)); see reference.py."""
    (t, n), (r, m) = x.shape, b.shape
    if config is None and t >= UNPACKED:
        return dense.forward(x, packed.dequantize(taken(w), x.dtype), a, b, seed, scale=scale, rate=rate)
    config = config or default_config(t, n, m, r)
    x, (a, b) = lora.whole_rows(x), lora.whole_ranks(a, b)
    low = lora.Config(blocks=config.blocks)
    z = lora.low_product(x, a, seed, transposed=True, scale=scale, rate=rate, config=low, interpret=interpret)
    y = product(x, w, z, b, transposed=False, config=config, interpret=interpret)
    return y[:t], z[:r, :t]


def input_gradient(
    dy, w: AnyPacked, a, b, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None
):
    """(dx (T, n), e (r, T)); see reference.py."""
    (t, m), (n, r) = dy.shape, a.shape
    if config is None and t >= UNPACKED:
        return dense.input_gradient(dy, packed.dequantize(taken(w), dy.dtype), a, b, seed, scale=scale, rate=rate)
    config = config or default_config(t, m, n, r)
    dy, (a, b) = lora.whole_rows(dy), lora.whole_ranks(a, b)
    low = lora.Config(blocks=config.blocks)
    e = lora.low_product(dy, b, seed, transposed=False, scale=scale, config=low, interpret=interpret)
    dx = product(dy, w, e, a, seed, transposed=True, rate=rate, config=config, interpret=interpret)
    return dx[:t], e[:r, :t]


def supports_forward(x, w: AnyPacked, a, b, seed, *, scale: float, rate: float) -> bool:
    """Whether `forward` takes arguments of these shapes."""
    return _supported(x, w, a, b)


def supports_input_gradient(dy, w: AnyPacked, a, b, seed, *, scale: float, rate: float) -> bool:
    """Whether `input_gradient` takes arguments of these shapes."""
    return _supported(dy, w, a, b)


def _supported(x, w: AnyPacked, a, b) -> bool:
    n, m = w.shape[-2:]
    whole = n % INPUTS == 0 and m % TILE == 0 and w.group % TILE == 0
    fused = w.format in packed.FUSED
    return w.ndim == 2 and fused and whole and lora.supported(x, None, a, b) and b.shape[0] in lora.RANKS


def default_config(rows: int, n: int, m: int, r: int) -> Config:
    """A good guess for x (rows, n) W (n, m); for dy W^T, n and m are the other way round."""
    return candidates(rows, n, m, r)[0]


def candidates(rows: int, n: int, m: int, r: int) -> list[Config]:
    """What is worth timing for x (rows, n) W (n, m), beginning with the default.

    Beyond rank 192, B leaves room for a single tile of codes.
    """
    found = [
        Config(height, code_slots=slots, width=width)
        for height in (128, 256)
        for slots in (3, 2, 1)
        for width in (4, 8)
    ]
    return [config for config in found if _slots(config, r) >= max(2, ceil_div(r, TILE))]


def configs(function: str, *args) -> list[Config]:
    """The candidates of a call function(*args), the default first; none where W is unpacked before the product."""
    if args[0].shape[0] >= UNPACKED:
        return []
    n, m = args[1].shape if function == "forward" else args[1].shape[::-1]
    return candidates(args[0].shape[0], n, m, args[2].shape[-1])


def _slots(config: Config, r: int) -> int:
    """x's slots, as many as fit beside the rest, whatever the format."""
    panels = (PANELS + ceil_div(r, TILE)) * 2 * TILE * INPUTS
    codes = config.code_slots * (INPUTS * INPUTS + 4 * 2 * INPUTS)
    staging = 2 * COMPUTE * TILE * TILE
    return gpu.slots_that_fit(config.slots, 2 * TILE * config.rows, panels + codes + staging)


def _values(codes, low, format: str):
    """value(c) float32 of a piece of codes, with 4 bits those of the high nibbles (low = 0) or the low ones (1)."""
    codes = codes.astype(jnp.int32)
    if format == "int8":
        return codes.astype(jnp.float32)
    codes = lax.shift_right_logical(codes, jnp.broadcast_to(4 - 4 * jnp.int32(low), codes.shape)) & 15
    if format == "int4":
        return (codes - 8).astype(jnp.float32)
    values = [jnp.full(codes.shape, value, jnp.float32) for value in packed.NF4]
    for bit in (1, 2, 4, 8):
        chosen = (codes & bit) != 0
        values = [jnp.where(chosen, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def product(x, w: AnyPacked, z, b, seed=None, *, transposed: bool, config: Config, rate=0.0, interpret=None):
    """x W + drop(z^T B) (T, m) for W (k, m) and b (r, m), or W (m, k) and b (m, r) if transposed."""
    t, k = x.shape
    m = w.shape[0 if transposed else 1]
    floats = packed.scales(taken(w))
    kernel, layer = whole(w)
    halves = COMPUTE if w.format == "int8" else 1  # of 64 rows of codes in a tile of them; else a nibble each
    height, rows, wide = config.rows, config.rows // COMPUTE, TILE if transposed else INPUTS
    slots, low_steps = _slots(config, len(z)), ceil_div(len(z), TILE)
    parts = 1 if transposed else 2  # panels of a tile of codes
    code_steps = ceil_div(k, TILE * parts)
    steps = code_steps * parts
    row_tiles, column_tiles = ceil_div(t, height), ceil_div(m, INPUTS)
    tiles = row_tiles * column_tiles
    blocks = min(config.blocks, tiles)
    panel = (INPUTS, TILE) if transposed else (TILE, INPUTS)

    def body(
        x_ref, codes_ref, scales_ref, z_ref, b_ref, extra, y_ref,
        x_slots, code_slots, scale_slots, panels, b_panels, staging,
        full, empty, codes_full, codes_empty, unpacked, b_full, b_empty,
    ):  # fmt: skip
        ring, codes_ring = Ring(full, empty, slots), Ring(codes_full, codes_empty, config.code_slots)

        def place(tile):
            return gpu.snake(tile, row_tiles, column_tiles, config.width)

        def memory():
            own_codes = of_layer(codes_ref, extra)

            def fetch_codes(step, i, column):
                """The i-th tile of codes of a tile of y."""
                inputs, outputs = (column, i) if transposed else (i, column)
                across = pl.ds(outputs * wide, wide)
                copies = [
                    (
                        scales_ref.at[(inputs * INPUTS + part * TILE) // w.group, across],
                        lambda slot, part=part: scale_slots.at[slot, part],
                    )
                    for part in range(2)
                ]
                down = pl.ds(inputs * TILE * halves, TILE * halves)
                codes_ring.fill(step, (own_codes.at[down, across], lambda slot: code_slots.at[slot]), *copies)

            def fetch(step, ref, row, columns):
                """x's rows, in pieces of 64."""
                ring.fill(
                    step,
                    *(
                        (
                            ref.at[pl.ds(row * height + i, TILE), columns],
                            lambda slot, i=i: x_slots.at[slot, pl.ds(i, TILE)],
                        )
                        for i in range(0, height, TILE)
                    ),
                )

            def tile(done, number):
                row, column = place(number)
                first = done * (steps + low_steps)

                def code_step(i, _):
                    fetch_codes(done * code_steps + i, i, column)
                    for part in range(parts):
                        step = i * parts + part
                        fetch(first + step, x_ref, row, pl.ds(step * TILE, TILE))

                def low_step(i, _):
                    @pl.when((i == 0) & (done > 0))
                    def when_b_is_free():
                        plgpu.barrier_wait(b_empty)

                    ring.fill(
                        first + steps + i,
                        *(
                            (
                                z_ref.at[pl.ds(i * TILE, TILE), pl.ds(row * height + j, TILE)],
                                lambda slot, j=j: x_slots.at[slot, pl.ds(j, TILE)],
                            )
                            for j in range(0, height, TILE)
                        ),
                    )
                    ranks, columns = pl.ds(i * TILE, TILE), pl.ds(column * INPUTS, INPUTS)
                    source = b_ref.at[(columns, ranks) if transposed else (ranks, columns)]
                    plgpu.copy_gmem_to_smem(source, b_panels.at[i], b_full)

                lax.fori_loop(0, code_steps, code_step, None)
                lax.fori_loop(0, low_steps, low_step, None)
                return done + 1

            done = gpu.each_tile(tiles, blocks, tile)
            codes_ring.drain(done * code_steps)
            ring.drain(done * (steps + low_steps))
            plgpu.barrier_wait(b_empty)

        def compute(half):
            seed = extra["seed"][0] if rate else None
            own = pl.ds(half * TILE, TILE)  # half of a panel

            def pieces(slot):
                """My rows of a slot of x, 64 at a time."""
                return [x_slots.at[slot, pl.ds(half * rows + i, TILE)] for i in range(0, rows, TILE)]

            def unpack(slot, part, target):
                """My half of a panel, from a tile of codes."""
                which = half if transposed else part
                across = pl.ds(0 if transposed else half * TILE, TILE)
                scale = scale_slots[slot, which, across]
                codes = code_slots[slot, pl.ds(which * TILE if halves > 1 else 0, TILE), across]
                values = _values(codes, which, w.format) * lax.broadcast_in_dim(scale, (TILE, TILE), (1,))
                target[...] = values.astype(x.dtype)
                plgpu.commit_smem()

            def tile(done, number):
                row, column = place(number)
                first, first_codes, first_panel = done * (steps + low_steps), done * code_steps, done * steps

                def accumulate(*sums):
                    """64 rows each: those of z are 64 rows apart in its slots."""

                    def code_step(i, _):
                        codes_ring.wait(first_codes + i)
                        slot = codes_ring.slot(first_codes + i)
                        for part in range(parts):
                            step = i * parts + part
                            number = lax.rem(first_panel + step, jnp.int32(PANELS))
                            unpack(slot, part, panels.at[number, own] if transposed else panels.at[number, :, own])
                            plgpu.barrier_arrive(unpacked.at[number])
                            if part == parts - 1:
                                codes_ring.release(first_codes + i)
                            ring.wait(first + step)
                            plgpu.barrier_wait(unpacked.at[number])
                            rhs = panels.at[number]
                            for acc, lhs in zip(sums, pieces(ring.slot(first + step)), strict=True):
                                plgpu.wgmma(acc, lhs, gpu.transposed(rhs) if transposed else rhs)
                            plgpu.wgmma_wait(len(sums))

                            @pl.when(step > 0)
                            def _(step=step):
                                ring.release(first + step - 1)

                    def low_step(i, _):
                        ring.wait(first + steps + i)
                        rhs = b_panels.at[i]
                        for acc, lhs in zip(sums, pieces(ring.slot(first + steps + i)), strict=True):
                            plgpu.wgmma(acc, gpu.transposed(lhs), gpu.transposed(rhs) if transposed else rhs)
                        plgpu.wgmma_wait(len(sums))
                        ring.release(first + steps + i - 1)

                    lax.fori_loop(0, code_steps, code_step, None)
                    if not rate:
                        plgpu.barrier_wait(b_full)
                        lax.fori_loop(0, low_steps, low_step, None)
                    return [acc[...] for acc in sums]

                sums = [plgpu.ACC((TILE, INPUTS), jnp.float32)] * (rows // TILE)
                y = pl.run_scoped(accumulate, *sums)
                ring.release(first + steps + (0 if rate else low_steps) - 1)

                def out(down, across, values):
                    start, at = row * height + half * rows + down * TILE, column * INPUTS + across
                    gpu.store(values, staging.at[half], y_ref.at[pl.ds(start, TILE), pl.ds(at, TILE)])

                if not rate:
                    plgpu.barrier_arrive(b_empty)
                    for down, across in itertools.product(range(rows // TILE), range(0, INPUTS, TILE)):
                        out(down, across, y[down][:, across : across + TILE])
                    return done + 1
                each_low_step = functools.partial(lax.fori_loop, 0, low_steps)
                each_low_step(lambda i, _: ring.wait(first + steps + i), None)
                plgpu.barrier_wait(b_full)

                def low_part(down, across):
                    def accumulate(acc):
                        def multiply(i, _):
                            slot = ring.slot(first + steps + i)
                            lhs = pieces(slot)[down]
                            if transposed:
                                rhs = gpu.transposed(b_panels.at[i, pl.ds(across, TILE)])
                            else:
                                rhs = b_panels.at[i, :, pl.ds(across, TILE)]
                            plgpu.wgmma(acc, gpu.transposed(lhs), rhs)

                        each_low_step(multiply, None)
                        return acc[...]

                    return pl.run_scoped(accumulate, plgpu.ACC((TILE, TILE), jnp.float32))

                for down, across in itertools.product(range(rows // TILE), range(0, INPUTS, TILE)):
                    start, at = row * height + half * rows + down * TILE, column * INPUTS + across
                    added = mask(low_part(down, across) * (1 / (1 - rate)), seed, start, at, rate)
                    out(down, across, y[down][:, across : across + TILE] + added)
                each_low_step(lambda i, _: ring.release(first + steps + i), None)
                plgpu.barrier_arrive(b_empty)
                return done + 1

            gpu.each_tile(tiles, blocks, tile)
            plgpu.wait_smem_to_gmem(0)

        gpu.specialise(compute, memory)

    codes_barriers = {f"codes_{name}": barrier for name, barrier in Ring.barriers(config.code_slots, 3).items()}
    return gpu.launch(
        body,
        x,
        kernel.codes,
        floats,
        z,
        b,
        scalars(rate, seed, layer=layer),
        name="quant_lora_product_transposed" if transposed else "quant_lora_product",
        out=jax.ShapeDtypeStruct((t, m), x.dtype),
        blocks=blocks,
        interpret=interpret,
        x_slots=gpu.swizzled(slots, height, TILE, dtype=x.dtype),
        code_slots=plgpu.SMEM((config.code_slots, TILE * halves, wide), kernel.codes.dtype),
        scale_slots=plgpu.SMEM((config.code_slots, 2, wide), jnp.float32),
        panels=gpu.swizzled(PANELS, *panel, dtype=x.dtype),
        b_panels=gpu.swizzled(low_steps, *panel, dtype=x.dtype),
        staging=gpu.swizzled(COMPUTE, TILE, TILE, dtype=x.dtype),
        unpacked=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=PANELS),
        b_full=plgpu.Barrier(num_arrivals=low_steps),
        b_empty=plgpu.Barrier(num_arrivals=COMPUTE),
        **Ring.barriers(slots, height // TILE),
        **codes_barriers,
    )
