"""Packed kernels: 4- and 8-bit codes with one scale per group of inputs. The one place that defines the formats.

A kernel W (n, m) (inputs, outputs) is cut into groups of `group` inputs of one output. With c the code of an element,

    W[i, j] = value(c[i, j]) * scale[i // group, j]         scale (n / group, m) float32

    format  value(c)                                        scale                       codes
    nf4     the 16 quantiles of NF4 (Dettmers et al. 2023)  max |W| of the group        (n / 2, m) uint8
    int4    c - 8, c in 0..15 (1..15 are used)              max |W| / 7                 (n / 2, m) uint8
    int8    c                                               max |W| / 127               (n, m) int8

Two 4-bit codes share a byte. A tile is 128 inputs; byte [64 t + i, j], 0 <= i < 64, holds

    high nibble  c[128 t + i, j]            low nibble  c[128 t + 64 + i, j]

so the high nibbles of 64 rows of bytes are 64 neighbouring inputs, and the low ones the next 64: a kernel unpacks a
tile by a shift and a mask, without moving anything between rows. Where 128 does not divide n, the one tile is all of
n (n even): byte [i, j] holds c[i, j] and c[n / 2 + i, j].

Double quantization (QLoRA) stores the scales of `nf4` in 8 bits: their mean over the kernel is subtracted; blocks of
256 of them, in the order output, input group, are coded by the signed dynamic map with one float32 each:

    scale = mean + dynamic(scale_codes) * block_scale       4 + 8/64 + 32/(64 * 256) = 4.127 bits per element

Groups of 64 in the order output, input, the codebook, the order of its codes, and the double quantization are those of
bitsandbytes; only the places of the nibbles differ.

Source: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314; the signed dynamic map: Dettmers 2016, arXiv:1511.04561.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FORMATS = ("nf4", "int4", "int8")
HALF = 64  # rows of bytes of a tile
BLOCK = 256  # scales that share a block_scale
FLOAT32 = jnp.dtype("float32")

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "block_scales", "mean"),
    meta_fields=("format", "group", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed kernel; with leading axes, a stack of them.

    codes: (..., n / 2, m) uint8, or (..., n, m) int8.
    scales: (..., n / group, m) float32; with double quantization its codes, uint8.
    block_scales: (..., ceil(m n / group / 256)) float32, and mean (...) float32, with double quantization; else None.
    format: of FORMATS.  group: inputs that share a scale.
    dtype: that W had, and has again where it is unpacked for good.
    """

    codes: jax.Array
    scales: jax.Array
    block_scales: jax.Array | None = None
    mean: jax.Array | None = None
    format: str = "nf4"
    group: int = 64
    dtype: Any = FLOAT32

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n, m)."""
        *lead, rows, m = self.codes.shape
        return (*lead, rows * (1 if self.format == "int8" else 2), m)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Elements of W."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def doubled(self) -> bool:
        """Whether the scales are coded."""
        return self.block_scales is not None

    @property
    def unit(self) -> int:
        """Inputs that cannot be parted: those of a tile of codes, and of a group."""
        return math.lcm(1 if self.format == "int8" else 2 * HALF, self.group)


def nibbles(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) int32 of uint8 codes: the inputs of a tile's first and second half."""
    wide = codes.astype(jnp.int32)
    return jax.lax.shift_right_logical(wide, jnp.int32(4)), wide & 15


def _half(n: int) -> int:
    return HALF if n % (2 * HALF) == 0 else n // 2


def pack(codes: jax.Array) -> jax.Array:
    """(n, m) integers of 0..15 -> (n / 2, m) uint8."""
    n, m = codes.shape
    tiles = codes.astype(jnp.uint8).reshape(-1, 2, _half(n), m)
    return ((tiles[:, 0] << 4) | tiles[:, 1]).reshape(n // 2, m)


def unpack(codes: jax.Array) -> jax.Array:
    """The inverse of `pack`, int32."""
    rows, m = codes.shape
    tiles = codes.reshape(-1, _half(2 * rows), m)
    return jnp.stack(nibbles(tiles), axis=1).reshape(2 * rows, m)


def quantize(w: jax.Array, format: str = "nf4", group: int | None = None, double: bool | None = None) -> Packed:
    """A packed kernel.

    Args:
      w: (n, m) floating point; its dtype is kept in mind.
      format: "nf4", "int4" or "int8".
      group: inputs that share a scale, a divisor of n; None: 64 for nf4, 128 for the others (n if it is not divisible).
      double: double quantization of the scales; None: for nf4.

    Raises:
      ValueError: for another format, a group that does not divide n, an odd n in 4 bits, or double with int formats.
    """
    n, m = w.shape
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if group is None:
        group = 64 if format == "nf4" else 128
        group = group if n % group == 0 else n
    if group < 1 or n % group:
        raise ValueError(f"group {group} does not divide the {n} inputs")
    if format != "int8" and n % 2:
        raise ValueError(f"{format} packs pairs of inputs; {n} is odd")
    if double and format != "nf4":
        raise ValueError(f"double quantization is of nf4, not of {format}")
    meta: dict[str, Any] = {"format": format, "group": group, "dtype": jnp.dtype(w.dtype)}
    groups = w.astype(jnp.float32).reshape(n // group, group, m)
    top = jnp.abs(groups).max(1)
    safe = jnp.where(top > 0, top, 1.0)[:, None]
    if format == "nf4":
        edges = jnp.asarray((np.array(NF4[1:], np.float32) + np.array(NF4[:-1], np.float32)) / 2)
        codes = jnp.searchsorted(edges, groups / safe, side="left").astype(jnp.int32)
        scales = top
    else:
        levels = 7 if format == "int4" else 127
        codes = jnp.round(groups / (safe / levels)).astype(jnp.int32)
        scales = top / levels
    codes = codes.reshape(n, m)
    if format == "int8":
        return Packed(codes.astype(jnp.int8), scales, **meta)
    packed = pack(codes + 8 if format == "int4" else codes)
    if double is False or format != "nf4":
        return Packed(packed, scales, **meta)
    return Packed(packed, *_encode_scales(scales), **meta)


def dequantize(packed: Packed, dtype=jnp.float32) -> jax.Array:
    """W (n, m) in `dtype`: value * scale in float32, then rounded once."""
    n, m = packed.shape
    groups = values(packed).reshape(n // packed.group, packed.group, m) * scales(packed)[:, None]
    return groups.reshape(n, m).astype(dtype)


def values(packed: Packed) -> jax.Array:
    """value(c) (n, m) float32."""
    if packed.format == "int8":
        return packed.codes.astype(jnp.float32)
    codes = unpack(packed.codes)
    return _nf4(codes) if packed.format == "nf4" else (codes - 8).astype(jnp.float32)


def _nf4(codes: jax.Array, bit: int = 3, first: int = 0) -> jax.Array:
    """NF4[first + codes mod 2^(bit + 1)], float32, by a tree of selects: XLA fuses no look-up with what reads it."""
    if bit < 0:
        return jnp.float32(NF4[first])
    upper = (codes >> bit) & 1 == 1
    return jnp.where(upper, _nf4(codes, bit - 1, first + (1 << bit)), _nf4(codes, bit - 1, first))


def scales(packed: Packed) -> jax.Array:
    """The scales (n / group, m) float32, decoded where they are coded."""
    return _decode_scales(packed.scales, packed.block_scales, packed.mean) if packed.doubled else packed.scales


def decoded(packed: Packed) -> Packed:
    """The same kernel with float32 scales: those of double quantization depend on where in the kernel they lie."""
    return dataclasses.replace(packed, scales=scales(packed), block_scales=None, mean=None)


# The scales' own codes.


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the signed dynamic 8-bit map, ascending, float32.

    An exponent e in -6..0 has 2^(e+6) values on each side of 0: the middles of as many equal parts of [0.1, 1], times
    10^e. With 0 and 1 they are 256.
    """
    side = []
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        side += list((edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (i - 6)))
    return np.array(sorted([*side, *(-x for x in side), 0.0, 1.0]), np.float32)


def _encode_scales(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(codes (n / group, m) uint8, block_scales, mean)."""
    mean = scales.mean()
    flat = (scales - mean).T.reshape(-1)
    padding = -flat.size % BLOCK
    blocks = jnp.pad(flat, (0, padding)).reshape(-1, BLOCK)
    top = jnp.abs(blocks).max(1)
    levels = dynamic_map()
    edges = jnp.asarray((levels[1:] + levels[:-1]) / 2)
    codes = jnp.searchsorted(edges, blocks / jnp.where(top > 0, top, 1.0)[:, None], side="left").astype(jnp.uint8)
    return codes.reshape(-1)[: flat.size].reshape(scales.shape[::-1]).T, top, mean


def _decode_scales(codes: jax.Array, block_scales: jax.Array, mean: jax.Array) -> jax.Array:
    groups, m = codes.shape
    block = (jnp.arange(m)[None, :] * groups + jnp.arange(groups)[:, None]) // BLOCK
    return mean + jnp.asarray(dynamic_map())[codes.astype(jnp.int32)] * block_scales[block]
