"""What the TPU kernels share: products, and the pipeline of a product with a low-rank term.

A TPU core computes on VMEM (64 MiB on a v5p, 128 MiB on v5e and v6e), to which the pipeline of `pl.pallas_call` copies
one block of each operand per step of the grid, while the step before computes. Two blocks of an operand are in VMEM
therefore; a block whose index is that of the step before is not copied again.

`low_rank_product` is that pipeline for

    low = f(x)                     (T, r), summed over inputs; rounded to x's dtype, and written as (r, T)
    y = x W + g(low)               (T, m)

    grid (row tiles, column tiles, input tiles), the last one innermost

    step (i, j, k)                 reads x[i, k] and W[k, j]; adds their product to an accumulator of y's tile
      j = 0                        adds f of the same tile of x to `low`, which stays in VMEM for all j
      j = 0, last k                writes low[i], transposed
      last k                       writes y[i, j] = accumulator + g(low)

x passes (column tiles) times through VMEM, or once if an input tile is all inputs; W passes (row tiles) times. So tiles
are large; tiles_tpu.py picks them.
(r, T) because the last axis of an array in device memory is padded to 128: a (T, 16) one would take 8 times its bytes.

What W, f and g are is left to the operations: a `Part` is operands, their blocks, and the function of a step's blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.stacked import Stacked, whole
from pallas_kernels.tiles_tpu import LANES, Config, bytes_of

# Loops' bodies are unrolled: these bound a program's size and the time to compile it. Elements of a chunk of rows that
# a mask is drawn for; rows that a product takes at a time, and elements of a tile of W, by the dtype's bytes (a float32
# product is six bfloat16 ones).
MASKED = 2**20
PRODUCT_ROWS = {2: 512, 4: 256}


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices over axes `contract`, in float32: the MXU's own for bfloat16, exact for float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def numbers(start, count: int, axis: int) -> jax.Array:
    """start, start + 1, ... as int32 (count, 1), axis 0, or (1, count), axis 1."""
    shape = (count, 1) if axis == 0 else (1, count)
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def is_matrix_dtype(*arrays) -> bool:
    """Whether all arrays have one dtype, which the kernels take."""
    return arrays[0].dtype in (jnp.bfloat16, jnp.float32) and len({x.dtype for x in arrays}) == 1


# Calls.


def call(
    kernel: Callable[..., None],
    operands: Sequence[Any],
    specs: Sequence[pl.BlockSpec],
    outputs: Any,
    out_specs: Any,
    *,
    grid: tuple[int, ...],
    prefetch: Sequence[jax.Array],
    scratch: Sequence[Any] = (),
    semantics: tuple[str, ...],
    config: Config,
    flops: int,
    bytes_accessed: int,
    interpret: Any,
    name: str,
    aliases: Mapping[int, int] | None = None,
):
    """`pl.pallas_call` with scalars in SMEM, which kernel and index maps get: the one place for its many settings."""
    results = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=grid,
            in_specs=list(specs),
            out_specs=out_specs,
            scratch_shapes=list(scratch),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=config.vmem_limit_bytes),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=bytes_accessed, transcendentals=0),
        input_output_aliases=dict(aliases or {}),
        interpret=interpret or False,
        name=name,
    )(*prefetch, *operands)
    # XLA would join a kernel with the loop's update that stores its result, under a limit of 16 MiB of VMEM.
    return jax.lax.optimization_barrier(results)


class Part(NamedTuple):
    """A part of `low_rank_product`: operands, a block of each, and what a step makes of them.

    operands: arrays.
    specs: their blocks; the index maps get (i, j, k, *prefetched).
    use: gets some rows of a tile, the references of blocks and scratch, and `Step`; see `low_rank_product`.
    prepare: gets these references and `Step`, once per tile, before all `use` of it, and before the product with W.
    scratch: VMEM and semaphores.
    """

    operands: tuple[Any, ...]
    specs: tuple[pl.BlockSpec, ...]
    use: Callable[..., jax.Array]
    prepare: Callable[..., None] | None = None
    scratch: tuple[Any, ...] = ()


class Step(NamedTuple):
    """Where a kernel is.

    i, j, k: the tile's numbers.
    scalars: references of what is in SMEM.
    first: the number, in the tile, of the first of the rows at hand.
    """

    i: Any
    j: Any
    k: Any
    scalars: tuple[Any, ...]
    first: Any = 0


def low_rank_product(
    x: jax.Array,
    weight: Part,
    down: Part,
    up: Part,
    *,
    columns: int,
    rank: int,
    prefetch: Sequence[jax.Array],
    config: Config,
    bytes_read: int,
    interpret: Any,
    name: str,
    chunk: int | None = None,
    unrolled: bool = False,
    into: Stacked | None = None,
):
    """y = x W + g(f(x)), and f(x).

    Args:
      x: (T, n).
      weight: use(x's rows (., inputs), *blocks, *scratch, step) -> float32 (., columns), their product with W's tile.
      down: use(x's rows (chunk, inputs), *blocks, *scratch, step) -> float32 (chunk, r), this tile's part of f's sum.
      up: use(low (chunk, r) in x's dtype, *blocks, *scratch, step) -> float32 (chunk, columns), g of it.
      columns: m.
      rank: r.
      prefetch: int32 or float32 scalars and vectors for SMEM.
      config: tiles.
      bytes_read: of all operands but x, once each.
      interpret: None, or `pltpu.InterpretParams`.
      name: the kernel's.
      chunk: rows that `down` and `up` get at a time; None: as many as masks allow.
      unrolled: whether `step.first` is known when the kernel is traced, rather than a loop's variable.
      into: the layer of a stack that y is written to.

    Returns:
      (y (T, m), or the stack with it, low (r, T)) in x's dtype.
    """
    (total, n), tiles = x.shape, config
    if n % tiles.inputs:
        raise ValueError(f"tiles of {tiles.inputs} do not divide {n} inputs")
    grid = (pl.cdiv(total, tiles.rows), pl.cdiv(columns, tiles.columns), n // tiles.inputs)
    last, parts = grid[2] - 1, (weight, down, up)
    chunk = chunk or masked_rows(tiles)
    product_rows = math.gcd(PRODUCT_ROWS[x.dtype.itemsize], tiles.rows)

    stack, place = (None, None) if into is None else whole(into)
    given = () if stack is None else (stack,)
    # W's layer stays the last of the scalars, and the seed the first.
    prefetch = prefetch if place is None else (prefetch[0], place, *prefetch[1:])

    def kernel(*refs):
        refs = (*refs[: len(prefetch)], *refs[len(prefetch) + len(given) :])
        counts = [len(part.operands) for part in parts], [len(part.scratch) for part in parts]
        scalars, (x_ref,), *blocks, (y_ref, z_ref), (low_ref, sum_ref), more_w, more_d, more_u = _split(
            refs, len(prefetch), 1, *counts[0], 2, 2, *counts[1]
        )
        of_weight, of_down, of_up = (a + b for a, b in zip(blocks, (more_w, more_d, more_u), strict=True))
        step = Step(pl.program_id(0), pl.program_id(1), pl.program_id(2), scalars)

        def low():
            @pl.when(step.j == 0)
            def _():
                zero(low_ref, step.k, last)

                def rows(at, first):
                    part = down.use(x_ref[at, :], *of_down, step._replace(first=first))
                    low_ref[at, :] = low_ref[at, :] + part if last else part

                for_chunks(tiles.rows, chunk, rows, unrolled)

            @pl.when((step.j == 0) & (step.k == last))
            def _():
                z_ref[...] = low_ref[...].T.astype(z_ref.dtype)

        if down.prepare is None:
            low()
        else:
            pl.when(step.j == 0)(functools.partial(down.prepare, *of_down, step))
        if up.prepare is not None:
            pl.when(step.k == last)(functools.partial(up.prepare, *of_up, step))

        zero(sum_ref, step.k, last)
        if weight.prepare is not None:
            weight.prepare(*of_weight, step)

        def products(at, first):
            part = weight.use(x_ref[at, :], *of_weight, step)
            sum_ref[at, :] = sum_ref[at, :] + part if last else part

        for_chunks(tiles.rows, product_rows, products)
        if down.prepare is not None:
            low()

        @pl.when(step.k == last)
        def _():
            def rows(at, first):
                lifted = up.use(low_ref[at, :].astype(x_ref.dtype), *of_up, step._replace(first=first))
                y_ref[at, :] = (sum_ref[at, :] + lifted).astype(y_ref.dtype)

            for_chunks(tiles.rows, chunk, rows, unrolled)

    y = jax.ShapeDtypeStruct((total, columns), x.dtype)
    low = jax.ShapeDtypeStruct((rank, total), x.dtype)
    y_spec = pl.BlockSpec((tiles.rows, tiles.columns), lambda i, j, k, *_: (i, j))
    if stack is not None:
        y_spec = pl.BlockSpec((None, tiles.rows, tiles.columns), lambda i, j, k, seed, place, *_: (place[0], i, j))
    return call(
        kernel,
        (*given, x, *weight.operands, *down.operands, *up.operands),
        (
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in given),
            pl.BlockSpec((tiles.rows, tiles.inputs), lambda i, j, k, *_: (i, k)),
            *weight.specs,
            *down.specs,
            *up.specs,
        ),
        (y if stack is None else jax.ShapeDtypeStruct(stack.shape, stack.dtype), low),
        (
            y_spec,
            pl.BlockSpec((rank, tiles.rows), lambda i, j, k, *_: (0, i)),
        ),
        grid=grid,
        prefetch=prefetch,
        scratch=[
            pltpu.VMEM((tiles.rows, rank), jnp.float32),
            pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32),
            *(extra for part in parts for extra in part.scratch),
        ],
        semantics=("parallel", "arbitrary", "arbitrary"),
        config=config,
        flops=2 * total * (n * columns + rank * (n + columns)),
        bytes_accessed=bytes_read + bytes_of(x, y, low),
        interpret=interpret,
        name=name,
        aliases={len(prefetch): 0} if given else {},
    )


def _split(refs, *counts: int):
    """Tuples of so many of `refs`, in order."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [tuple(refs[end - count : end]) for end, count in zip(ends, counts, strict=True)]


# Pieces of kernels.


def zero(ref, step, last: int) -> None:
    """Clears a sum in the first of steps 0..last, unless it is the only one: then it is written at once."""
    if last:

        @pl.when(step == 0)
        def _():
            ref[...] = jnp.zeros_like(ref)


def masked_rows(config: Config) -> int:
    """Rows of a tile for which a mask is drawn at a time."""
    widest = max(config.inputs, config.columns)
    return max(math.gcd(config.rows, 256 if 256 * widest <= MASKED else 128), LANES)


def for_chunks(rows: int, chunk: int, body: Callable[[Any, Any], None], unrolled: bool = False) -> None:
    """body(slice of `chunk` rows, first row) over a tile: a loop, since what is unrolled fills the program's memory."""
    if unrolled or rows == chunk:
        for first in range(0, rows, chunk):
            body(pl.ds(first, chunk), first)
        return

    def one(c, carry):
        first = pl.multiple_of(c * chunk, chunk)
        body(pl.ds(first, chunk), first)
        return carry

    jax.lax.fori_loop(0, rows // chunk, one, 0)


def first_column(j, k, last: int):
    """k while j is 0; then the last one, so that a block that only the first column tile needs is not read again."""
    return jnp.where(j == 0, k, last)


def inside(tile: jax.Array, start, total: int, axis: int) -> jax.Array:
    """A tile with zeros where its rows (axis of the tile, numbered from `start`) lie beyond the array's `total`."""
    if axis == 0:
        return jnp.where(numbers(start, tile.shape[axis], axis) < total, tile, jnp.zeros_like(tile))
    # A mask of one row is not spread over the rows of a 16-bit tile.
    own = start + jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis)
    return jnp.where(own < total, tile.astype(jnp.float32), 0.0).astype(tile.dtype)
