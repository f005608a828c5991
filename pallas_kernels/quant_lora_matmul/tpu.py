"""LoRA's products over a packed kernel on a TPU; the equations are in reference.py, the formats in packed.py.

    forward           z = s A^T drop(x)^T  and    y = x W + z^T B
    input_gradient    e = s B dy^T         and    dx = dy W^T + drop(e^T A^T)      W[i, j] = value(c[i, j]) scale[g, j]

Both are `mosaic_tpu.low_rank_product` with another W: a tile of codes and its scales come to VMEM, are unpacked there
into a tile in x's dtype, and that goes to the MXU. W itself is never in device memory; of what is, only the scales may
be unpacked there, from their own 8 bits (`packed.scales`, n m / group floats).

    codes           int32    128 inputs of W are 64 rows of bytes: a shift gives the first 64, a mask the others
    value           float32  nf4: the register that holds the 16 quantiles, gathered along its lanes
    value * scale   float32  one row of scales for 64 rows of codes, so groups are multiples of 64
    W's tile        x's dtype

A tile is unpacked once per row tile, on the vector units, and then multiplied with all rows of that tile on the MXU.
So row tiles are larger than for a dense W (up to 4096). In the compiler's schedule for tiles (4096, 512, 512) unpacking
takes 7 % of the product's bundles for nf4, 3 % for int4 and 2 % for int8 on a v5e, and 17 % for nf4 on a v6e.

The block of scales is that of the codes, where its rows are a multiple of 8, or else a block of all groups (as for
11008 inputs: 172 groups). The gradient reads the same codes in the same layout, unpacks them in the same way, and
contracts the last axes of dy's and W's tiles.
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
from pallas_kernels.lora_matmul import tpu as lora
from pallas_kernels.mosaic_tpu import Part, dot
from pallas_kernels.packed import FUSED, HALF, NF4, nibbles, scales
from pallas_kernels.stacked import AnyPacked, Stacked, taken
from pallas_kernels.tiles_tpu import Config

__all__ = [
    "Config",
    "candidates",
    "configs",
    "default_config",
    "forward",
    "input_gradient",
    "supports_forward",
    "supports_input_gradient",
]

UNPACKING = 2e-12  # seconds per element: nf4, in the compiler's schedule for a v6e


def forward(
    x, w: AnyPacked, a, b, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None
):
    """(y (T, m), z (r, T)) of x (T, n), w (n, m) packed, a (n, r), b (r, m), seed () int32; x, a, b of one dtype."""
    (total, n), (r, m) = x.shape, b.shape
    config = config or default_config(total, n, m, r, x.dtype.itemsize, w.format, w.group)
    return _product(
        x,
        w,
        config,
        down=lora.down(*lora.turned(a), config, scale, rate),
        up=lora.up(b, 0, config, 0),
        transposed=False,
        columns=m,
        rank=r,
        prefetch=(seed, *lora.layer_of(w)),
        bytes_read=tiles_tpu.bytes_of(a, b),
        interpret=interpret,
        name=f"{w.format}_lora_forward",
    )


def input_gradient(
    dy, w: AnyPacked, a, b, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None
):
    """(dx (T, n), e (r, T)) of dy (T, m), w (n, m) packed, a (n, r), b (r, m), seed () int32."""
    (total, m), (n, r) = dy.shape, a.shape
    config = config or default_config(total, m, n, r, dy.dtype.itemsize, w.format, w.group, transposed=True)
    return _product(
        dy,
        w,
        config,
        down=lora.down(b, 0, config, scale, 0),
        up=lora.up(*lora.turned(a), config, rate),
        transposed=True,
        columns=n,
        rank=r,
        prefetch=(seed, *lora.layer_of(w)),
        bytes_read=tiles_tpu.bytes_of(a, b),
        interpret=interpret,
        name=f"{w.format}_lora_input_gradient",
    )


def _product(x, w: AnyPacked, config: Config, *, transposed: bool, bytes_read: int, **options):
    floats = scales(taken(w))
    codes = Stacked(w.stack.codes, w.index) if isinstance(w, Stacked) else w.codes
    tile = pltpu.VMEM(_tile(config, transposed), x.dtype)
    return tpu.low_rank_product(
        x,
        packed(codes, floats, w.format, w.group, config, transposed)._replace(scratch=(tile,)),
        config=config,
        bytes_read=bytes_read + tiles_tpu.bytes_of(codes, floats),
        **options,
    )


# W's tiles.


def packed(codes, floats, format: str, group: int, config: Config, transposed: bool) -> Part:
    """x W, or x W^T, of a tile; codes (or one of a stack of them) and floats (n / group, m) as in `Packed`."""
    rows, lanes = _tile(config, transposed)
    groups = len(floats)
    of_scales = _rows_of_scales(rows, groups, group)
    whole = of_scales == groups

    def place(i, j, k, *_):
        return (j, k) if transposed else (k, j)

    def prepare(codes_ref, scales_ref, tile_ref, step):
        # The first row of the tile, counted from that of the block of scales.
        start = place(*step[:3])[0] * rows if whole else 0

        def unpacked(at, first):
            """The 128 rows from `first`."""
            for half, value in enumerate(values(codes_ref, first, format)):
                inner = first + half * HALF
                # Beyond a ragged end there is no scale, but the result has no such column either.
                row = jnp.minimum(jax.lax.div(jnp.int32(start + inner), jnp.int32(group)), of_scales - 1)
                tile_ref[pl.ds(pl.multiple_of(inner, HALF), HALF), :] = (value * scales_ref[pl.ds(row, 1), :]).astype(
                    tile_ref.dtype
                )

        tpu.for_chunks(rows, 2 * HALF, unpacked)

    def use(x, codes_ref, scales_ref, tile_ref, step):
        return dot(x, tile_ref[...], (1, 1) if transposed else (1, 0))

    array, spec = lora.block_of(codes, (rows if format == "int8" else rows // 2, lanes), place)
    specs = (
        spec,
        pl.BlockSpec((of_scales, lanes), (lambda *at: (0, place(*at)[1])) if whole else place),
    )
    return Part((array, floats), specs, use, prepare)


def values(codes_ref, first, format: str) -> list[jax.Array]:
    """value(c), two of float32 (64, lanes), of the 128 rows of a tile of W from `first`, a multiple of 128."""
    if format == "int8":
        halves = [codes_ref[pl.ds(pl.multiple_of(first + start, HALF), HALF), :] for start in (0, HALF)]
        return [half.astype(jnp.float32) for half in halves]
    codes = nibbles(codes_ref[pl.ds(pl.multiple_of(first >> 1, HALF), HALF), :])
    if format == "int4":
        return [(half - 8).astype(jnp.float32) for half in codes]
    return [quantiles(half) for half in codes]


def quantiles(codes: jax.Array) -> jax.Array:
    """NF4[codes] of int32 codes (rows, lanes): a gather within each register, whose lanes hold the table."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (codes.shape[0], tiles_tpu.LANES), 1)
    # Made here: a constant array would have to be an operand.
    table = functools.reduce(lambda low, i: jnp.where(lane == i, NF4[i], low), range(16), jnp.zeros(lane.shape))
    tiles = [codes[:, start : start + tiles_tpu.LANES] for start in range(0, codes.shape[1], tiles_tpu.LANES)]
    found = [jnp.take_along_axis(table, tile, axis=1, mode="promise_in_bounds") for tile in tiles]
    return jnp.concatenate(found, axis=1)


def _tile(config: Config, transposed: bool) -> tuple[int, int]:
    """(inputs, outputs) of a tile of W."""
    return (config.columns, config.inputs) if transposed else (config.inputs, config.columns)


def _rows_of_scales(rows: int, groups: int, group: int) -> int:
    """Of a block: those of the codes' block of `rows` inputs, if Mosaic can cut that out; else all."""
    return rows // group if rows % (8 * group) == 0 and rows // group < groups else groups


# Tiles, and what is supported.


@functools.cache
def candidates(
    rows: int, n: int, m: int, r: int, itemsize: int, format: str, group: int, transposed: bool = False
) -> list[Config]:
    """Configurations of y (rows, m) = x (rows, n) W with rank r that fit, the one that should be the fastest first.

    For `input_gradient`, `transposed`, n and m change places: its sum is over m.
    """
    bits = 8 if format == "int8" else 4
    groups = (m if transposed else n) // group

    def vmem(config):
        height, lanes = _tile(config, transposed)
        codes = tiles_tpu.size((height * bits // 8, lanes), 1)
        floats = tiles_tpu.size((_rows_of_scales(height, groups, group), lanes), 4)
        return 2 * (codes + floats + lora.factors_vmem(config, r, itemsize)) + tiles_tpu.size((height, lanes), itemsize)

    return tiles_tpu.fused_candidates(rows, n, m, r, itemsize, vmem, 4096, bits + 32 / group, UNPACKING)


def default_config(
    rows: int, n: int, m: int, r: int, itemsize: int, format: str, group: int, transposed: bool = False
) -> Config:
    """The first candidate."""
    return candidates(rows, n, m, r, itemsize, format, group, transposed)[0]


def configs(function: str, x, w: AnyPacked, a, *rest) -> list[Config]:
    """The candidates of a call function(x, w, a, ..), the default first."""
    del rest
    transposed = function == "input_gradient"
    n, m = w.shape[::-1] if transposed else w.shape
    return candidates(x.shape[0], n, m, a.shape[1], x.dtype.itemsize, w.format, w.group, transposed)


def supports_forward(x, w: AnyPacked, a, b, seed, *, scale: float, rate: float) -> bool:
    """Whether `forward` takes the arguments: as lora_matmul's, of the formats that are FUSED, with groups of 64 inputs
    or a multiple.
    """
    if w.ndim != 2 or w.format not in FUSED or w.group % HALF:
        return False
    dense = jax.ShapeDtypeStruct(w.shape, x.dtype)
    return lora.supports_forward(x, dense, a, b, seed, scale=scale, rate=rate)


def supports_input_gradient(dy, w: AnyPacked, a, b, seed, *, scale: float, rate: float) -> bool:
    """Whether `input_gradient` takes the arguments: as `forward`."""
    return supports_forward(dy, w, a, b, seed, scale=scale, rate=rate)
