"""LoRA's products on a TPU, one kernel each; the equations are in reference.py.

    forward           z = s A^T drop(x)^T  and    y = x W + z^T B              one pass over x and W
    input_gradient    e = s B dy^T         and    dx = dy W^T + drop(e^T A^T)  one pass over dy and W
    low               z alone                                                  one pass over x
    factor_gradient   z drop(x)            (r, k)                              one pass over x

The first two are `mosaic_tpu.low_rank_product`: the low-rank sum comes from the tiles of x that the big product reads
anyway, stays in VMEM, and is added to each tile of y in that tile's last step, so that nothing but y and z is written.
A transposed W is read in its own layout; the MXU contracts the last axes of both tiles. Tiles of A are read for the
first column tile only.

`factor_gradient` has the grid (column tiles, row tiles). Its block of the result stays in VMEM while the row tiles pass
and are summed into it: x is read once, z (column tiles) times. It is the one that sums over rows, so it alone has to
keep what lies beyond the last row out (a ragged block holds anything there, NaN included).

Masks are drawn where they are used, tile by tile, from the numbers of rows and columns (dropout.py). The factor
1 / (1 - rate) multiplies the sums, in float32.

In the compiler's schedule for a v5e (tiles of 256 rows, 1024 columns) drawing a mask takes 2.5 bundles per register of
elements, once per element of x and pass; `factor_gradient` stays within the time that reading x takes.

Traffic of `forward` in device memory, in elements: T n (column tiles, or 1 if an input tile is all of n) + n m (row
tiles) + T m + r (T + n + m). `default_config` picks tiles by that and by the MXU's time; `candidates` lists more.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu as tpu
from pallas_kernels import tiles_tpu
from pallas_kernels.dropout import keep
from pallas_kernels.mosaic_tpu import Part, Step, dot
from pallas_kernels.stacked import Stacked, put, whole
from pallas_kernels.tiles_tpu import Config

__all__ = [
    "Config",
    "candidates",
    "configs",
    "default_config",
    "factor_candidates",
    "factor_gradient",
    "forward",
    "forward_into",
    "input_gradient",
    "low",
    "low_candidates",
    "supports_factor_gradient",
    "supports_forward",
    "supports_forward_into",
    "supports_input_gradient",
    "supports_low",
]

# The products. `seed` is () int32; `config` None is the default; `interpret` is for `pltpu.InterpretParams`.


def forward(
    x, w, a, b, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None, out: Any = None
):
    """(y (T, m), z (r, T)) of x (T, n), w (n, m), a (n, r), b (r, m), seed () int32; all in x's dtype."""
    (total, n), (r, m) = x.shape, b.shape
    config = config or default_config(total, n, m, r, x.dtype.itemsize)
    return tpu.low_rank_product(
        x,
        dense(w, config),
        down(*turned(a), config, scale, rate),
        up(b, 0, config, 0),
        columns=m,
        rank=r,
        prefetch=(seed, *layer_of(w)),
        config=config,
        bytes_read=tiles_tpu.bytes_of(w, a, b),
        interpret=interpret,
        name="lora_forward",
        into=out,
    )


def forward_into(x, w, a, b, seed, out, **options):
    """(the stack that `out` (T, m) is a layer of, with y there, y, z (r, T)); options as of `forward`."""
    config = options.pop("config", None) or default_config(
        len(x), x.shape[1], out.shape[1], b.shape[0], x.dtype.itemsize
    )
    if len(x) % config.rows:  # a ragged tile would reach beyond the layer
        y, z = forward(x, w, a, b, seed, config=config, **options)
        return put(out, y), y, z
    stack, z = forward(x, w, a, b, seed, out=out, config=config, **options)
    return stack, Stacked(stack, out.index).take(), z


def input_gradient(
    dy, w, a, b, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None
):
    """(dx (T, n), e (r, T)) of dy (T, m), w (n, m), a (n, r), b (r, m), seed () int32; all in dy's dtype."""
    (total, m), (n, r) = dy.shape, a.shape
    config = config or default_config(total, m, n, r, dy.dtype.itemsize)
    return tpu.low_rank_product(
        dy,
        dense(w, config, transposed=True),
        down(b, 0, config, scale, 0),
        up(*turned(a), config, rate),
        columns=n,
        rank=r,
        prefetch=(seed, *layer_of(w)),
        config=config,
        bytes_read=tiles_tpu.bytes_of(w, a, b),
        interpret=interpret,
        name="lora_input_gradient",
    )


def low(x, a, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None):
    """z (r, T) of x (T, n), a (n, r), seed () int32."""
    (total, n), r = x.shape, a.shape[1]
    config = config or low_candidates(total, n, r, x.dtype.itemsize)[0]
    last, chunk = n // config.inputs - 1, tpu.masked_rows(config)
    part = down(*turned(a), config, scale, rate)

    def kernel(seed_ref, x_ref, a_ref, z_ref, low_ref):
        step = Step(pl.program_id(0), 0, pl.program_id(1), (seed_ref,))
        tpu.zero(low_ref, step.k, last)

        def rows(at, first):
            found = part.use(x_ref[at, :], a_ref, step._replace(first=first))
            low_ref[at, :] = low_ref[at, :] + found if last else found

        tpu.for_chunks(config.rows, chunk, rows)

        @pl.when(step.k == last)
        def _():
            z_ref[...] = low_ref[...].T.astype(z_ref.dtype)

    output = jax.ShapeDtypeStruct((r, total), x.dtype)
    return tpu.call(
        kernel,
        (x, *part.operands),
        (
            pl.BlockSpec((config.rows, config.inputs), lambda i, k, seed: (i, k)),
            *(pl.BlockSpec(spec.block_shape, lambda i, k, seed, at=spec.index_map: at(i, 0, k)) for spec in part.specs),
        ),
        output,
        pl.BlockSpec((r, config.rows), lambda i, k, seed: (0, i)),
        grid=(pl.cdiv(total, config.rows), last + 1),
        prefetch=(seed,),
        scratch=[pltpu.VMEM((config.rows, r), jnp.float32)],
        semantics=("parallel", "arbitrary"),
        config=config,
        flops=2 * total * n * r,
        bytes_accessed=tiles_tpu.bytes_of(x, a, output),
        interpret=interpret,
        name="lora_low",
    )


def factor_gradient(z, x, seed, *, rate: float, config: Config | None = None, interpret: Any = None):
    """z drop(x): float32 (r, k) of z (r, T), x (T, k), seed () int32."""
    (r, total), k = z.shape, x.shape[1]
    config = config or factor_candidates(total, k, r, x.dtype.itemsize)[0]
    rows, columns = config.rows, config.columns
    steps, chunk = pl.cdiv(total, rows), tpu.masked_rows(config)

    def kernel(seed_ref, z_ref, x_ref, out_ref):
        j, i = pl.program_id(0), pl.program_id(1)

        @pl.when(i == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        def add(at, first):
            z_tile, x_tile, row = z_ref[:, at], x_ref[at, :], i * rows + first
            if total % rows:
                z_tile, x_tile = tpu.inside(z_tile, row, total, 1), tpu.inside(x_tile, row, total, 0)
            kept = dropped(x_tile, seed_ref, row, j * columns, rate)
            out_ref[...] += 1 / (1 - rate) * dot(z_tile, kept)

        tpu.for_chunks(rows, chunk, add)

    output = jax.ShapeDtypeStruct((r, k), jnp.float32)
    return tpu.call(
        kernel,
        (z, x),
        (
            pl.BlockSpec((r, rows), lambda j, i, seed: (0, i)),
            pl.BlockSpec((rows, columns), lambda j, i, seed: (i, j)),
        ),
        output,
        pl.BlockSpec((r, columns), lambda j, i, seed: (0, j)),
        grid=(pl.cdiv(k, columns), steps),
        prefetch=(seed,),
        semantics=("parallel", "arbitrary"),
        config=config,
        flops=2 * total * k * r,
        bytes_accessed=tiles_tpu.bytes_of(z, x, output),
        interpret=interpret,
        name="lora_factor_gradient",
    )


# Their parts.


def layer_of(w) -> tuple[jax.Array, ...]:
    """What is to be prefetched last for w: the number of its layer (1,), if it is one of a stack."""
    _, layer = whole(w)
    return () if layer is None else (layer,)


def block_of(w, shape: tuple[int, int], place) -> tuple[Any, pl.BlockSpec]:
    """(w or its stack, a block of w (n, m) for its index map `place`, which gets (i, j, k))."""
    array, layer = whole(w)
    if layer is None:
        return array, pl.BlockSpec(shape, lambda i, j, k, *_: place(i, j, k))
    return array, pl.BlockSpec((None, *shape), lambda i, j, k, *scalars: (scalars[-1][0], *place(i, j, k)))


def dense(w, config: Config, transposed: bool = False) -> Part:
    """x W, or x W^T, of a tile; w (n, m), or one of a stack, is read in its own layout."""
    if transposed:
        array, spec = block_of(w, (config.columns, config.inputs), lambda i, j, k: (j, k))
        return Part((array,), (spec,), lambda x, w_ref, step: dot(x, w_ref[...], (1, 1)))
    array, spec = block_of(w, (config.inputs, config.columns), lambda i, j, k: (k, j))
    return Part((array,), (spec,), lambda x, w_ref, step: dot(x, w_ref[...]))


def turned(a) -> tuple[jax.Array, int]:
    """A (n, r) in the layout that it has in device memory, and the axis of r.

    XLA keeps an array with few columns transposed, unpadded: there (r, n) is a view. Whole lanes stay as they are.
    """
    return (a.T, 0) if a.shape[1] % tiles_tpu.LANES else (a, 1)


def down(factor, axis: int, config: Config, scale: float, rate: float) -> Part:
    """scale drop(x) F^T of rows of a tile; factor: F (r, inputs), axis 0, or its transpose, axis 1."""
    r, last = factor.shape[axis], factor.shape[1 - axis] // config.inputs - 1

    def use(x, factor_ref, step):
        kept = dropped(x, step.scalars[0], step.i * config.rows + step.first, step.k * config.inputs, rate)
        return scale / (1 - rate) * dot(kept, factor_ref[...], (1, 1 - axis))

    def tile(i, j, k, *_):
        return (0, tpu.first_column(j, k, last))[:: 1 - 2 * axis]

    return Part((factor,), (pl.BlockSpec((r, config.inputs)[:: 1 - 2 * axis], tile),), use)


def up(factor, axis: int, config: Config, rate: float) -> Part:
    """drop(low F) of rows of a tile; factor: F (r, columns), axis 0, or its transpose, axis 1."""

    def use(low, factor_ref, step):
        lifted = 1 / (1 - rate) * dot(low, factor_ref[...], (1, axis))
        row, column = step.i * config.rows + step.first, step.j * config.columns
        return dropped(lifted, step.scalars[0], row, column, rate)

    block = (factor.shape[axis], config.columns)[:: 1 - 2 * axis]
    return Part((factor,), (pl.BlockSpec(block, lambda i, j, k, *_: (0, j)[:: 1 - 2 * axis]),), use)


def dropped(x, seed_ref, row, column, rate: float):
    """A tile whose first element is (row, column), with zeros where elements are dropped; the others as they are."""
    if not rate:
        return x
    rows, columns = tpu.numbers(row, x.shape[0], 0), tpu.numbers(column, x.shape[1], 1)
    return jnp.where(keep(seed_ref[...], rows, columns, rate), x, jnp.zeros_like(x))


# Tiles, and what is supported.


@functools.cache
def candidates(rows: int, n: int, m: int, r: int, itemsize: int) -> list[Config]:
    """Configurations of y (rows, m) = x (rows, n) W with rank r that fit, the one that should be the fastest first.

    For `input_gradient` n and m change places: its sum is over m.
    """

    def vmem(config):
        return 2 * (tiles_tpu.size((config.inputs, config.columns), itemsize) + factors_vmem(config, r, itemsize))

    return tiles_tpu.fused_candidates(rows, n, m, r, itemsize, vmem)


def factors_vmem(config: Config, r: int, itemsize: int) -> int:
    """Bytes of a block of each factor."""
    return tiles_tpu.size((r, config.inputs), itemsize) + tiles_tpu.size((r, config.columns), itemsize)


def default_config(rows: int, n: int, m: int, r: int, itemsize: int) -> Config:
    """The first candidate."""
    return candidates(rows, n, m, r, itemsize)[0]


@functools.cache
def low_candidates(rows: int, n: int, r: int, itemsize: int) -> list[Config]:
    """Configurations of `low` with x (rows, n), the one that should be the fastest first."""

    def seconds(config):
        steps = pl.cdiv(rows, config.rows) * (n // config.inputs)
        seconds = steps * (config.rows * config.inputs * itemsize / tiles_tpu.BANDWIDTH + tiles_tpu.STEP)
        return seconds * tiles_tpu.shared(pl.cdiv(rows, config.rows))

    def vmem(config):
        blocks = tiles_tpu.size((config.rows, config.inputs), itemsize) + factors_vmem(config, r, itemsize)
        return 2 * blocks + 3 * tiles_tpu.size((config.rows, r), 4)

    widest = tiles_tpu.WEIGHT_TILE[itemsize] // tiles_tpu.up_to(r, tiles_tpu.LANES)
    tiles = [k for k in tiles_tpu.divisors(n) if k <= min(widest, 4096)]
    return tiles_tpu.best(
        [Config(i, tiles_tpu.LANES, k) for i in tiles_tpu.powers(rows, 1024) for k in tiles], seconds, vmem
    )


@functools.cache
def factor_candidates(rows: int, k: int, r: int, itemsize: int) -> list[Config]:
    """Configurations of `factor_gradient` with x (rows, k), the one that should be the fastest first."""

    def seconds(config):
        steps = pl.cdiv(rows, config.rows) * pl.cdiv(k, config.columns)
        read = (r * config.rows + config.rows * config.columns) * itemsize
        return steps * (read / tiles_tpu.BANDWIDTH + tiles_tpu.STEP) * tiles_tpu.shared(pl.cdiv(k, config.columns))

    def vmem(config):
        blocks = tiles_tpu.size((r, config.rows), itemsize) + tiles_tpu.size((config.rows, config.columns), itemsize)
        # The sum twice as an output and once as a step's product; a tile of x before and after its mask, in 32 bits.
        return (
            2 * blocks
            + 3 * tiles_tpu.size((r, config.columns), 4)
            + 2 * tiles_tpu.size((config.rows, config.columns), 4)
        )

    configs = [Config(i, j, 0) for i in tiles_tpu.powers(rows, 1024) for j in tiles_tpu.powers(k, 4096)]
    return tiles_tpu.best(configs, seconds, vmem)


def configs(function: str, *args) -> list[Config]:
    """The candidates of a call function(*args), the default first."""
    x, itemsize = args[function == "factor_gradient"], args[0].dtype.itemsize
    if function == "factor_gradient":
        return factor_candidates(*x.shape, args[0].shape[0], itemsize)
    if function == "low":
        return low_candidates(*x.shape, args[1].shape[1], itemsize)
    n, m = args[1].shape if function == "forward" else args[1].shape[::-1]
    return candidates(x.shape[0], n, m, args[2].shape[1], itemsize)


def supports_forward(x, w, a, b, seed, *, scale: float, rate: float) -> bool:
    """Whether `forward` takes the arguments: bfloat16 or float32, ranks 4 to 256, n and m multiples of 128."""
    return _supported((x, w, a, b), a.shape[-1], w.shape, rate) and x.ndim == 2


def supports_forward_into(x, w, a, b, seed, out, *, scale: float, rate: float) -> bool:
    """Whether `forward_into` takes the arguments: as `forward`, and a layer of x's dtype."""
    fits = out.stack.ndim == 3 and out.dtype == x.dtype and out.shape == (x.shape[0], w.shape[1])
    return supports_forward(x, w, a, b, seed, scale=scale, rate=rate) and fits


def supports_input_gradient(dy, w, a, b, seed, *, scale: float, rate: float) -> bool:
    """Whether `input_gradient` takes the arguments: as `forward`."""
    return _supported((dy, w, a, b), a.shape[-1], w.shape, rate) and dy.ndim == 2


def supports_low(x, a, seed, *, scale: float, rate: float) -> bool:
    """Whether `low` takes the arguments: as `forward`."""
    return _supported((x, a), a.shape[-1], x.shape[1:], rate) and x.ndim == 2


def supports_factor_gradient(z, x, seed, *, rate: float) -> bool:
    """Whether `factor_gradient` takes the arguments: as `forward`."""
    return _supported((z, x), z.shape[0], x.shape[1:], rate) and x.ndim == 2


def _supported(arrays, r: int, sizes, rate: float) -> bool:
    whole = all(count and count % tiles_tpu.LANES == 0 for count in sizes)
    return (
        tpu.is_matrix_dtype(*arrays) and r in tiles_tpu.RANKS and whole and min(arrays[0].shape) > 0 and 0 <= rate < 1
    )
