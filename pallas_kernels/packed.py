"""Packed kernels: codes of 2 to 8 bits with one scale per group of inputs. The one place that defines the formats.

A kernel W (n, m) (inputs, outputs) is cut into groups of `group` inputs of one output. With c the code of an element,

    W[i, j] = value(c[i, j]) * scale[i // group, j]         scale (n / group, m) float32

    format  value(c)                                        scale                       codes
    nf4     the 16 quantiles of NF4 (Dettmers et al. 2023)  max |W| of the group        (n / 2, m) uint8
    nf3     8 quantiles, by the same rule                   max |W|                     (3 n / 8, m) uint8
    nf2     4 quantiles                                     max |W|                     (n / 4, m) uint8
    int8    c                                               max |W| / 127               (n, m) int8
    int4    c - 8, c in 0..15 (1..15 are used)              max |W| / 7                 (n / 2, m) uint8
    int3    c - 4, c in 1..7                                of `RATIOS` max |W| / 3     (3 n / 8, m) uint8
    int2    c - 2, c in 1..3                                of `RATIOS` max |W|         (n / 4, m) uint8

With 7 or 3 values the largest number of a group is a poor scale: int3 and int2 take the ratio of it with the least
squared error, and clip what is beyond.

Two 4-bit codes share a byte. A tile is 128 inputs; byte [64 t + i, j], 0 <= i < 64, holds

    high nibble  c[128 t + i, j]            low nibble  c[128 t + 64 + i, j]

so the high nibbles of 64 rows of bytes are 64 neighbouring inputs, and the low ones the next 64: a kernel unpacks a
tile by a shift and a mask, without moving anything between rows. Where 128 does not divide n, the one tile is all of
n (n even): byte [i, j] holds c[i, j] and c[n / 2 + i, j].

Four 2-bit codes share a byte, [t, j] that of the inputs 4 t to 4 t + 3, the first in its lowest bits. Eight 3-bit codes
share three: [3 t, j] and [3 t + 1, j] hold the low two bits of the inputs 8 t to 8 t + 7 as 2-bit codes, [3 t + 2, j]
the eight high bits, the first in its lowest.

Double quantization (QLoRA) stores the scales of nf4, nf3 and nf2 in 8 bits: their mean over the kernel is subtracted;
blocks of 256 of them, in the order output, input group, are coded by the signed dynamic map with one float32 each:

    scale = mean + dynamic(scale_codes) * block_scale       b + 8/64 + 32/(64 * 256) = b + 0.127 bits per element

Groups of 64 in the order output, input, NF4's codebook, the order of its codes, and the double quantization are those
of bitsandbytes; only the places of the nibbles differ. NF3 and NF2 are the rule of NF4's codebook with 2^(b-1) + 1 and
2^(b-1) quantiles on the two sides of zero, as LQ-LoRA (Guo et al. 2023, arXiv:2311.12023) has them.

The fused products (`quant_lora_matmul`) read the formats of `FUSED`; the others are unpacked before a product.

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

BITS = {"nf4": 4, "nf3": 3, "nf2": 2, "int8": 8, "int4": 4, "int3": 3, "int2": 2}  # of a code
FORMATS = tuple(BITS)
FUSED = ("nf4", "int4", "int8")
ALIGNED = {8: 1, 4: 2, 3: 8, 2: 4}  # bits -> inputs that share bytes
RATIOS = np.arange(1.0, 0.29, -0.02).astype(np.float32)  # of max |W|, which is tried first
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
NF3 = (
    -1.0,
    -0.4786291718482971,
    -0.21714182198047638,
    0.0,
    0.16093020141124725,
    0.33791524171829224,
    0.5626170039176941,
    1.0,
)
NF2 = (-1.0, 0.0, 0.33791524171829224, 1.0)
CODEBOOKS = {"nf4": NF4, "nf3": NF3, "nf2": NF2}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "block_scales", "mean"),
    meta_fields=("format", "group", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed kernel; with leading axes, a stack of them.

    codes: (..., n b / 8, m) uint8, b bits of a code; of int8 (..., n, m) int8.
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
        return (*lead, rows * 8 // self.bits, m)

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.format]

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
        return math.lcm(2 * HALF if self.bits == 4 else ALIGNED[self.bits], self.group)


def nibbles(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) int32 of uint8 codes: the inputs of a tile's first and second half."""
    wide = codes.astype(jnp.int32)
    return jax.lax.shift_right_logical(wide, jnp.int32(4)), wide & 15


def _half(n: int) -> int:
    return HALF if n % (2 * HALF) == 0 else n // 2


def pack(codes: jax.Array, bits: int = 4) -> jax.Array:
    """(n, m) integers of 0..2^bits - 1 -> (n bits / 8, m) uint8; bits 2, 3 or 4, n a multiple of ALIGNED[bits]."""
    n, m = codes.shape
    codes = codes.astype(jnp.uint8)
    if bits == 4:
        tiles = codes.reshape(-1, 2, _half(n), m)
        return ((tiles[:, 0] << 4) | tiles[:, 1]).reshape(n // 2, m)
    if bits == 2:
        return _in_bytes(codes.reshape(-1, 4, m), 2)
    low = _in_bytes((codes & 3).reshape(-1, 4, m), 2).reshape(-1, 2, m)
    high = _in_bytes((codes >> 2).reshape(-1, 8, m), 1)
    return jnp.concatenate([low, high[:, None]], axis=1).reshape(3 * n // 8, m)


def unpack(codes: jax.Array, bits: int = 4) -> jax.Array:
    """The inverse of `pack`, int32."""
    rows, m = codes.shape
    n = rows * 8 // bits
    if bits == 4:
        return jnp.stack(nibbles(codes.reshape(-1, _half(n), m)), axis=1).reshape(n, m)
    if bits == 2:
        return _of_bytes(codes, 2).reshape(n, m)
    three = codes.reshape(-1, 3, m)
    low, high = _of_bytes(three[:, :2], 2).reshape(-1, 8, m), _of_bytes(three[:, 2], 1)
    return (low | (high << 2)).reshape(n, m)


def _in_bytes(codes: jax.Array, width: int) -> jax.Array:
    """(..., 8 / width, m) uint8 codes of `width` bits -> (..., m), the first in the lowest bits."""
    shifts = width * jnp.arange(8 // width, dtype=jnp.uint8)[:, None]
    return (codes << shifts).sum(-2, dtype=jnp.uint8)


def _of_bytes(packed: jax.Array, width: int) -> jax.Array:
    """The inverse of `_in_bytes`, int32."""
    shifts = width * jnp.arange(8 // width)[:, None]
    return (packed.astype(jnp.int32)[..., None, :] >> shifts) & ((1 << width) - 1)


def quantize(w: jax.Array, format: str = "nf4", group: int | None = None, double: bool | None = None) -> Packed:
    """A packed kernel.

    Args:
      w: (n, m) floating point; its dtype is kept in mind.
      format: of FORMATS.
      group: inputs that share a scale, a divisor of n; None: 64 for nf, 128 for int (n if it is not divisible).
      double: double quantization of the scales; None: for nf.

    Raises:
      ValueError: for another format, a group that does not divide n, an n that is no multiple of ALIGNED, or double
        with int formats.
    """
    n, m = w.shape
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    book, bits = CODEBOOKS.get(format), BITS[format]
    if group is None:
        group = 64 if book else 128
        group = group if n % group == 0 else n
    if group < 1 or n % group:
        raise ValueError(f"group {group} does not divide the {n} inputs")
    if n % ALIGNED[bits]:
        raise ValueError(f"{format} packs inputs in {ALIGNED[bits]}s; {n} is no multiple of it")
    if double and not book:
        raise ValueError(f"double quantization is of {', '.join(CODEBOOKS)}, not of {format}")
    groups = w.astype(jnp.float32).reshape(n // group, group, m)
    codes, scales = _nearest(groups, book) if book else _uniform(groups, bits)
    codes = codes.reshape(n, m)
    meta: dict[str, Any] = {"format": format, "group": group, "dtype": jnp.dtype(w.dtype)}
    if format == "int8":
        return Packed(codes.astype(jnp.int8), scales, **meta)
    packed = pack(codes if book else codes + 2 ** (bits - 1), bits)
    if double is False or not book:
        return Packed(packed, scales, **meta)
    return Packed(packed, *_encode_scales(scales), **meta)


def _nearest(groups: jax.Array, book: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """(codes (G, group, m) int32, scales (G, m)) of groups (G, group, m), the nearest values of a codebook."""
    top = jnp.abs(groups).max(1)
    edges = jnp.asarray((np.array(book[1:], np.float32) + np.array(book[:-1], np.float32)) / 2)
    scaled = groups / jnp.where(top > 0, top, 1.0)[:, None]
    return jnp.searchsorted(edges, scaled, side="left").astype(jnp.int32), top


def _uniform(groups: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """(codes -L..L (G, group, m) int32, scales (G, m)), L = 2^(bits-1) - 1; of 2 and 3 bits the best of RATIOS."""
    levels = 2 ** (bits - 1) - 1
    top = jnp.abs(groups).max(1)
    whole = jnp.where(top > 0, top, 1.0) / levels
    codes_of = lambda scales: jnp.clip(jnp.round(groups / scales[:, None]), -levels, levels)

    def better(best, ratio):
        scales = whole * ratio
        error = jnp.square(codes_of(scales) * scales[:, None] - groups).sum(1)
        less = error < best[0]
        return (jnp.where(less, error, best[0]), jnp.where(less, scales, best[1])), None

    if bits < 4:
        whole = jax.lax.scan(better, (jnp.full(whole.shape, jnp.inf), whole), jnp.asarray(RATIOS))[0][1]
    return codes_of(whole).astype(jnp.int32), jnp.where(top > 0, whole, 0.0)


def dequantize(packed: Packed, dtype=jnp.float32) -> jax.Array:
    """W (n, m) in `dtype`: value * scale in float32, then rounded once."""
    n, m = packed.shape
    groups = values(packed).reshape(n // packed.group, packed.group, m) * scales(packed)[:, None]
    return groups.reshape(n, m).astype(dtype)


def values(packed: Packed) -> jax.Array:
    """value(c) (n, m) float32."""
    if packed.format == "int8":
        return packed.codes.astype(jnp.float32)
    codes = unpack(packed.codes, packed.bits)
    if book := CODEBOOKS.get(packed.format):
        return _looked_up(codes, book)
    return (codes - 2 ** (packed.bits - 1)).astype(jnp.float32)


def _looked_up(codes: jax.Array, book: tuple[float, ...]) -> jax.Array:
    """book[codes], float32, by a tree of selects over the bits: XLA fuses no look-up with what reads it."""
    if len(book) == 1:
        return jnp.float32(book[0])
    half = len(book) // 2
    return jnp.where(codes & half != 0, _looked_up(codes, book[half:]), _looked_up(codes, book[:half]))


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
