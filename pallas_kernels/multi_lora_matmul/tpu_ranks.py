"""Factors of different ranks on a TPU: side by side in device memory, and copied from there at their own ranks.

    rows      of an adapter's rank in whole tiles of device memory: 8 rows of 4 bytes, 16 of 2
    beside    the A_g^T, or the B_g, one below the other: (R, n), (R, m), R the sum of their rows
    tables    of an adapter: its first row there, and its rows; nobody's, the last, are none

The pipeline of a `pl.pallas_call` copies blocks of one shape, which would be the largest rank's. So a factor stays in
device memory, and the kernel copies the rows of each 128 tokens' adapter itself: it starts all copies of a step, then
multiplies with W, then waits for them. Products are by 128 ranks, the width of the MXU; an adapter of 16 beside one of
256 has one, and rows without an adapter none.

`factor_gradient` adds up an adapter's sums in VMEM, and copies its rows to their place in one array (R, k).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu as tpu
from pallas_kernels import tiles_tpu
from pallas_kernels.mosaic_tpu import Part, Step, dot
from pallas_kernels.multi_lora_matmul.reference import TILE
from pallas_kernels.tiles_tpu import LANES, Config

OWNER, SCALES, STARTS, COUNTS = range(4)  # of the scalars


class Beside(NamedTuple):
    """Where adapters' rows are.

    starts, counts: of each, and of nobody.
    unit: rows of a tile.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    unit: int

    @property
    def total(self) -> int:
        """R."""
        return self.starts[-1]

    @property
    def tables(self) -> tuple[jax.Array, jax.Array]:
        """(starts, counts), int32 (G + 1,)."""
        return jnp.asarray(self.starts, jnp.int32), jnp.asarray(self.counts, jnp.int32)


def beside(ranks: Sequence[int], itemsize: int) -> Beside:
    """Of adapters of such ranks."""
    unit = 32 // itemsize
    counts = [tiles_tpu.up_to(rank, unit) for rank in ranks]
    return Beside((0, *np.cumsum(counts).tolist()), (*counts, 0), unit)


def put(factors: Sequence[jax.Array], where: Beside, columns: int) -> jax.Array:
    """(R, columns) of factors (r_g, up to columns): one below the other, with zeros between them."""
    return jnp.concatenate(
        [
            jnp.pad(f, ((0, count - f.shape[0]), (0, columns - f.shape[1])))
            for f, count in zip(factors, where.counts[:-1], strict=True)
        ]
    )


def down(factors: Sequence[jax.Array], rows: int, config: Config, tiles: int) -> Part:
    """s_g x F_g^T of 128 rows, (128, rows), for the F_g (r_g, inputs); zeros beyond their rank."""
    operand, copies, scratch = _copies(factors, rows, config.inputs, lambda step: step.k, config, tiles)

    def use(x, hbm, blocks, semaphores, step):
        t, g = _number(step), copies(_wait, hbm, blocks, semaphores, step)
        count, scale = step.scalars[COUNTS][g], step.scalars[SCALES][g]

        def part(at, size):
            found = scale * dot(x, blocks[t, at : at + size, :], (1, 1))
            return jnp.where(tpu.numbers(at, size, 1) < count, found, 0.0)

        return jnp.concatenate([_if_any(count, at, size, part, (TILE, size)) for at, size in _by_lanes(rows)], 1)

    return Part((operand,), _WHOLE, use, functools.partial(_start, copies, config), scratch)


def up(factors: Sequence[jax.Array], rows: int, config: Config, tiles: int) -> Part:
    """low F_g of 128 rows, for the F_g (r_g, columns); low (128, rows) has zeros beyond their rank."""
    operand, copies, scratch = _copies(factors, rows, config.columns, lambda step: step.j, config, tiles)

    def use(low, hbm, blocks, semaphores, step):
        t, g = _number(step), copies(_wait, hbm, blocks, semaphores, step)
        count = step.scalars[COUNTS][g]

        def part(at, size):
            # What an earlier step left there need not be finite.
            block = tpu.inside(blocks[t, at : at + size, :], at, count, 0)
            return dot(low[:, at : at + size], block)

        return sum(_if_any(count, at, size, part, (TILE, config.columns)) for at, size in _by_lanes(rows))

    return Part((operand,), _WHOLE, use, functools.partial(_start, copies, config), scratch)


_WHOLE = (pl.BlockSpec(memory_space=pl.ANY),)


def _number(step: Step):
    """Of the 128 rows at hand, in their row tile."""
    return step.first // TILE if isinstance(step.first, int) else jax.lax.div(step.first, TILE)


def _by_lanes(rows: int) -> list[tuple[int, int]]:
    """(first, size) of parts of so many ranks."""
    return [(first, min(LANES, rows - first)) for first in range(0, rows, LANES)]


def _if_any(count, at: int, size: int, part: Callable[[int, int], jax.Array], shape: tuple[int, int]) -> jax.Array:
    """part(at, size), or zeros, where the adapter has no such ranks."""
    return jax.lax.cond(count > at, lambda: part(at, size), lambda: jnp.zeros(shape, jnp.float32))


def _copies(factors, rows: int, width: int, column: Callable[[Step], Any], config: Config, tiles: int):
    """(the factors beside each other, copies, scratch) of a part.

    copies(act, hbm, blocks, semaphores, step): act on each copy of the step's columns, of the rows of the adapter of
    the 128 tokens at hand, to VMEM; which adapter that is.
    """
    of_row_tile = config.rows // TILE
    where = beside([len(f) for f in factors], factors[0].dtype.itemsize)

    def copies(act, hbm, blocks, semaphores, step):
        t = _number(step)
        g = step.scalars[OWNER][jnp.minimum(step.i * of_row_tile + t, tiles - 1)]
        start, columns = step.scalars[STARTS][g], pl.ds(pl.multiple_of(column(step) * width, LANES), width)

        def one(c, _):
            source, target = (pl.multiple_of(first + c * where.unit, where.unit) for first in (start, 0))
            act(
                pltpu.make_async_copy(
                    hbm.at[pl.ds(source, where.unit), columns],
                    blocks.at[t, pl.ds(target, where.unit), :],
                    semaphores.at[t],
                )
            )
            return 0

        jax.lax.fori_loop(0, jax.lax.div(step.scalars[COUNTS][g], where.unit), one, 0)
        return g

    blocks = pltpu.VMEM((of_row_tile, tiles_tpu.up_to(rows, where.unit), width), factors[0].dtype)
    whole = put(factors, where, tiles_tpu.up_to(factors[0].shape[1], width))
    return whole, copies, (blocks, pltpu.SemaphoreType.DMA((of_row_tile,)))


def _start(copies, config: Config, hbm, blocks, semaphores, step) -> None:
    """All copies of a row tile."""

    def one(t, _):
        copies(lambda copy: copy.start(), hbm, blocks, semaphores, step._replace(first=t * TILE))
        return 0

    jax.lax.fori_loop(0, config.rows // TILE, one, 0)


def _wait(copy) -> None:
    copy.wait()


def factor_gradient(z, x, adapters, tiles, *, ranks: tuple[int, ...], config: Config, interpret: Any):
    """z x over the rows of each adapter: float32 (r_g, k) each of z (r, T), x (T, k), and `tpu.visits` of G + 1."""
    (rows, total), k, where = z.shape, x.shape[1], beside(ranks, 4)
    whole, columns = tiles_tpu.up_to(k, config.columns), config.columns

    def kernel(adapters_ref, tiles_ref, starts_ref, counts_ref, z_ref, x_ref, out_ref, sum_ref, semaphore):
        j, v, last = pl.program_id(0), pl.program_id(1), len(adapters) - 1
        g = adapters_ref[v]
        clears = (v == 0) | (g != adapters_ref[jnp.maximum(v - 1, 0)])
        start, count = starts_ref[g], counts_ref[g]

        @pl.when(clears)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def add(at, size):
            z_tile, x_tile = z_ref[at : at + size, :], x_ref[...]
            if total % TILE:
                z_tile = tpu.inside(z_tile, tiles_ref[v] * TILE, total, 1)
                x_tile = tpu.inside(x_tile, tiles_ref[v] * TILE, total, 0)
            sum_ref[at : at + size, :] += dot(z_tile, x_tile)

        for at, size in _by_lanes(rows):
            pl.when(jnp.logical_not(clears) & (count > at))(functools.partial(add, at, size))

        @pl.when((v == last) | (g != adapters_ref[jnp.minimum(v + 1, last)]))
        def _():
            for act in ("start", "wait"):

                def one(c, _, act=act):
                    source, target = (pl.multiple_of(first + c * where.unit, where.unit) for first in (0, start))
                    place = out_ref.at[pl.ds(target, where.unit), pl.ds(pl.multiple_of(j * columns, LANES), columns)]
                    copy = pltpu.make_async_copy(sum_ref.at[pl.ds(source, where.unit), :], place, semaphore)
                    getattr(copy, act)()
                    return 0

                jax.lax.fori_loop(0, jax.lax.div(count, where.unit), one, 0)

    output = jax.ShapeDtypeStruct((where.total, whole), jnp.float32)
    found = tpu.call(
        kernel,
        (z, x),
        (
            pl.BlockSpec((rows, TILE), lambda j, v, adapters, tiles, *_: (0, tiles[v])),
            pl.BlockSpec((TILE, columns), lambda j, v, adapters, tiles, *_: (tiles[v], j)),
        ),
        output,
        pl.BlockSpec(memory_space=pl.ANY),
        grid=(whole // columns, len(adapters)),
        prefetch=(adapters, tiles, *where.tables),
        scratch=[pltpu.VMEM((rows, columns), jnp.float32), pltpu.SemaphoreType.DMA],
        semantics=("parallel", "arbitrary"),
        config=config,
        flops=2 * total * k * sum(ranks) // len(ranks),
        bytes_accessed=tiles_tpu.bytes_of(z, x, output),
        interpret=interpret,
        name="multi_lora_factor_gradient",
    )
    return tuple(found[start : start + rank, :k] for start, rank in zip(where.starts, ranks, strict=False))
