"""LoRA's products for rows of different adapters on a TPU; the equations are in reference.py.

    forward           z[:, t] = s_g A_g^T x_t     and    y_t = x_t W + z[:, t]^T B_g           g = owner[t // 128]
    input_gradient    e[:, t] = s_g B_g dy_t      and    dx_t = dy_t W^T + e[:, t]^T A_g^T
    factor_gradient   sum_t:g(t)=g z[:, t] x_t           (G, r, k)

The first two are `mosaic_tpu.low_rank_product`. W's product has row tiles of up to 1024 rows, as if there was one
adapter; of A and B it reads one block for each 128 rows of such a tile, the one that the owner table names. The table
is in SMEM before the kernel starts (scalar prefetch), so the pipeline knows what to copy: an adapter that owns nothing
in a row tile is not read for it, and the number of adapters costs nothing. Factors are read once per 128 rows:
r T (n + m) / 128 elements, besides what lora_matmul reads.

`factor_gradient` has the grid (column tiles, visits). A visit adds 128 rows to the gradient of their adapter, whose
block stays in VMEM until the next adapter's turn; so visits go in the order of their owners, wherever in x the rows
are. Each adapter's first visit only clears its block: adapters without rows get zeros that way.

    owner      1 0 1                   T = 384, G = 3
    adapters   0 0 1 1 1 2             of visits: 0, 1, .., G - 1 and the owners, sorted
    tiles      1 1 0 0 2 2             of visits; a clearing one names the next tile, so that nothing is read for it
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_tpu as tpu
from pallas_kernels import tiles_tpu
from pallas_kernels.lora_matmul import tpu as lora
from pallas_kernels.mosaic_tpu import Part, dot
from pallas_kernels.multi_lora_matmul import tpu_ranks
from pallas_kernels.multi_lora_matmul.reference import TILE, rows_of_z
from pallas_kernels.tiles_tpu import Config

__all__ = [
    "Config",
    "candidates",
    "configs",
    "default_config",
    "factor_candidates",
    "factor_gradient",
    "forward",
    "input_gradient",
    "supports_factor_gradient",
    "supports_forward",
    "supports_input_gradient",
]

LARGEST = 1024  # rows of a tile: 8 blocks of each factor
VISITS = 2**13  # what the tables in SMEM may be long


def forward(x, w, a, b, scales, owner, *, config: Config | None = None, interpret: Any = None):
    """(y (T, m), z (r, T)) of x (T, n), w (n, m), a (G, n, r), b (G, r, m), scales (G,) float32, owner int32."""
    (total, n), m, r = x.shape, w.shape[1], rows_of_z(b)
    config = config or default_config(total, n, m, r, x.dtype.itemsize)
    return tpu.low_rank_product(
        x,
        lora.dense(w, config),
        down(a, 1, r, config, len(owner)),
        up(b, 0, r, config, len(owner)),
        columns=m,
        rank=r,
        prefetch=(owner, *tables(b, scales), *lora.layer_of(w)),
        config=config,
        bytes_read=tiles_tpu.bytes_of(w, *jax.tree.leaves((a, b))),
        interpret=interpret,
        name="multi_lora_forward",
        chunk=TILE,
        unrolled=not isinstance(b, tuple),
    )


def input_gradient(dy, w, a, b, scales, owner, *, config: Config | None = None, interpret: Any = None):
    """(dx (T, n), e (r, T)) of dy (T, m), w (n, m), a (G, n, r), b (G, r, m), scales (G,) float32, owner int32."""
    (total, m), n, r = dy.shape, w.shape[0], rows_of_z(b)
    config = config or default_config(total, m, n, r, dy.dtype.itemsize)
    return tpu.low_rank_product(
        dy,
        lora.dense(w, config, transposed=True),
        down(b, 0, r, config, len(owner)),
        up(a, 1, r, config, len(owner)),
        columns=n,
        rank=r,
        prefetch=(owner, *tables(b, scales), *lora.layer_of(w)),
        config=config,
        bytes_read=tiles_tpu.bytes_of(w, *jax.tree.leaves((a, b))),
        interpret=interpret,
        name="multi_lora_input_gradient",
        chunk=TILE,
        unrolled=not isinstance(b, tuple),
    )


def factor_gradient(
    z, x, owner, *, count: int, ranks: tuple[int, ...] = (), config: Config | None = None, interpret: Any = None
):
    """z x over the rows of each of `count` adapters: float32 (G, r, k) of z (r, T), x (T, k), owner int32.

    Of ranks, a tuple of (r_g, k) each.
    """
    (r, total), k = z.shape, x.shape[1]
    found = factor_candidates(k, r, x.dtype.itemsize)
    if ranks:
        config = config or next(config for config in found if k % config.columns == 0)
        adapters, tiles = visits(owner, count + 1)
        return tpu_ranks.factor_gradient(z, x, adapters, tiles, ranks=ranks, config=config, interpret=interpret)
    config, (adapters, tiles) = config or found[0], visits(owner, count)

    def kernel(adapters_ref, tiles_ref, z_ref, x_ref, out_ref):
        v = pl.program_id(1)
        g = adapters_ref[v]
        clears = (v == 0) | (g != adapters_ref[jnp.maximum(v - 1, 0)])

        @pl.when(clears)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        @pl.when(jnp.logical_not(clears))
        def _():
            z_tile, x_tile = z_ref[...], x_ref[...]
            if total % TILE:
                z_tile = tpu.inside(z_tile, tiles_ref[v] * TILE, total, 1)
                x_tile = tpu.inside(x_tile, tiles_ref[v] * TILE, total, 0)
            out_ref[...] += dot(z_tile, x_tile)

    output = jax.ShapeDtypeStruct((count, r, k), jnp.float32)
    return tpu.call(
        kernel,
        (z, x),
        (
            pl.BlockSpec((r, TILE), lambda j, v, adapters, tiles: (0, tiles[v])),
            pl.BlockSpec((TILE, config.columns), lambda j, v, adapters, tiles: (tiles[v], j)),
        ),
        output,
        pl.BlockSpec((None, r, config.columns), lambda j, v, adapters, tiles: (adapters[v], 0, j)),
        grid=(pl.cdiv(k, config.columns), len(adapters)),
        prefetch=(adapters, tiles),
        semantics=("parallel", "arbitrary"),
        config=config,
        flops=2 * total * k * r,
        bytes_accessed=tiles_tpu.bytes_of(z, x, output),
        interpret=interpret,
        name="multi_lora_factor_gradient",
    )


def visits(owner: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(adapters, tiles) of the visits of `factor_gradient`, int32 (count + len(owner),); see the module."""
    adapters = jnp.sort(jnp.concatenate([jnp.arange(count, dtype=jnp.int32), owner.astype(jnp.int32)]))
    order = jnp.argsort(owner).astype(jnp.int32)
    # Before a visit of adapter g there are g + 1 clearing ones, or g if it is one itself.
    clears = jnp.concatenate([jnp.ones(1, bool), adapters[1:] != adapters[:-1]])
    rank = jnp.arange(len(adapters), dtype=jnp.int32) - adapters - jnp.where(clears, 0, 1)
    return adapters, order[jnp.minimum(rank, len(owner) - 1)]


# The parts of the products.


def turned(a) -> tuple[jax.Array, int]:
    """A (G, n, r) as `lora_matmul.tpu.turned`, and the axis of r without G."""
    return (a.transpose(0, 2, 1), 0) if a.shape[2] % tiles_tpu.LANES else (a, 1)


def tables(b, scales) -> tuple[jax.Array, ...]:
    """What is prefetched besides owners: scales, and of tuples where factors are."""
    if not isinstance(b, tuple):
        return (scales,)
    where = tpu_ranks.beside([len(factor) for factor in b], b[0].dtype.itemsize)
    return jnp.append(scales, 1.0), *where.tables


def down(factor, axis: int, r: int, config: Config, tiles: int) -> Part:
    """s_g x F_g^T of 128 rows; factor: F (G, r, inputs), axis 0, or its transpose, axis 1; or a tuple of such F_g."""
    if isinstance(factor, tuple):
        return tpu_ranks.down([f.T if axis else f for f in factor], r, config, tiles)
    factor, axis = turned(factor) if axis else (factor, axis)
    last = factor.shape[2 - axis] // config.inputs - 1

    def use(x, *refs_and_step):
        block, scale = _of_adapter(refs_and_step, config, tiles)
        return scale * dot(x, block, (1, 1 - axis))

    def tile(i, j, k):
        return tpu.first_column(j, k, last)

    operands, specs = _blocks(factor, axis, (r, config.inputs), tile, config, tiles)
    return Part(operands, specs, use)


def up(factor, axis: int, r: int, config: Config, tiles: int) -> Part:
    """low F_g of 128 rows; factor: F (G, r, columns), axis 0, or its transpose, axis 1; or a tuple of such F_g."""
    if isinstance(factor, tuple):
        return tpu_ranks.up([f.T if axis else f for f in factor], r, config, tiles)
    factor, axis = turned(factor) if axis else (factor, axis)

    def use(low, *refs_and_step):
        block, _ = _of_adapter(refs_and_step, config, tiles)
        return dot(low, block, (1, axis))

    operands, specs = _blocks(factor, axis, (r, config.columns), lambda i, j, k: j, config, tiles)
    return Part(operands, specs, use)


def _blocks(factor, axis: int, shape: tuple[int, int], tile, config: Config, tiles: int):
    """(operands, specs): the factor once for each 128 rows of a row tile, with the block of their adapter."""

    def spec(t: int) -> pl.BlockSpec:
        def place(i, j, k, owner, *_):
            return (owner[_number(i, t, config, tiles)], *(0, tile(i, j, k))[:: 1 - 2 * axis])

        return pl.BlockSpec((None, *shape[:: 1 - 2 * axis]), place)

    count = config.rows // TILE
    return (factor,) * count, tuple(spec(t) for t in range(count))


def _of_adapter(refs_and_step, config: Config, tiles: int):
    """(the block, s_g) of the adapter g of the rows at hand."""
    *refs, step = refs_and_step
    owner, scales = step.scalars[:2]
    t = step.first // TILE
    return refs[t][...], scales[owner[_number(step.i, t, config, tiles)]]


def _number(i, t: int, config: Config, tiles: int):
    """Of the t-th 128 rows of row tile i; the last one for those beyond the end."""
    return jnp.minimum(i * (config.rows // TILE) + t, tiles - 1)


# Tiles, and what is supported.


@functools.cache
def candidates(rows: int, n: int, m: int, r: int, itemsize: int) -> list[Config]:
    """Configurations of y (rows, m) = x (rows, n) W with rank r that fit, the one that should be the fastest first.

    For `input_gradient` n and m change places: its sum is over m.
    """

    def vmem(config):
        factors = config.rows // TILE * lora.factors_vmem(config, r, itemsize)
        return 2 * (tiles_tpu.size((config.inputs, config.columns), itemsize) + factors)

    return tiles_tpu.fused_candidates(rows, n, m, r, itemsize, vmem, LARGEST)


def default_config(rows: int, n: int, m: int, r: int, itemsize: int) -> Config:
    """The first candidate."""
    return candidates(rows, n, m, r, itemsize)[0]


@functools.cache
def factor_candidates(k: int, r: int, itemsize: int) -> list[Config]:
    """Configurations of `factor_gradient` with x (T, k), the one that should be the fastest first."""

    def seconds(config):
        read = (r + config.columns) * TILE * itemsize / tiles_tpu.BANDWIDTH
        steps = pl.cdiv(k, config.columns)
        return steps * (read + tiles_tpu.STEP) * tiles_tpu.shared(steps)

    def vmem(config):
        blocks = tiles_tpu.size((r, TILE), itemsize) + tiles_tpu.size((TILE, config.columns), itemsize)
        return 2 * blocks + 3 * tiles_tpu.size((r, config.columns), 4) + 2 * tiles_tpu.size((TILE, config.columns), 4)

    return tiles_tpu.best([Config(TILE, columns, 0) for columns in tiles_tpu.powers(k, 8192)], seconds, vmem)


def configs(function: str, *args) -> list[Config]:
    """The candidates of a call function(*args), the default first."""
    x, w, itemsize = *args[:2], args[0].dtype.itemsize
    if function == "factor_gradient":
        return factor_candidates(args[1].shape[1], args[0].shape[0], itemsize)
    n, m = w.shape if function == "forward" else w.shape[::-1]
    return candidates(x.shape[0], n, m, args[2].shape[-1], itemsize)


def supports_forward(x, w, a, b, scales, owner) -> bool:
    """Whether `forward` takes the arguments: as lora_matmul's, with a table of all tiles of 128 rows."""
    whole = all(size and size % tiles_tpu.LANES == 0 for size in w.shape)
    known = scales.dtype == jnp.float32 and x.ndim == 2 and whole
    return known and _supported((x, w, *jax.tree.leaves((a, b))), rows_of_z(b), len(x), len(b), owner)


def supports_input_gradient(dy, w, a, b, scales, owner) -> bool:
    """Whether `input_gradient` takes the arguments: as `forward`."""
    return supports_forward(dy, w, a, b, scales, owner)


def supports_factor_gradient(z, x, owner, *, count: int, ranks: tuple[int, ...] = ()) -> bool:
    """Whether `factor_gradient` takes the arguments: as `forward`."""
    whole = x.ndim == 2 and x.shape[1] and x.shape[1] % tiles_tpu.LANES == 0
    return bool(whole) and _supported((z, x), z.shape[0], len(x), count, owner)


def _supported(arrays, r: int, rows: int, count: int, owner) -> bool:
    tables = owner.shape == (pl.cdiv(rows, TILE),) and owner.dtype == jnp.int32
    short = count + sum(owner.shape) <= VISITS
    return tables and short and rows > 0 and r in tiles_tpu.RANKS and tpu.is_matrix_dtype(*arrays)
