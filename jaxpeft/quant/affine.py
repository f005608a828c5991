"""Affine kernels: unsigned codes with a zero point and a scale per group of inputs, as integer hardware has them.

A kernel W (n, m) (inputs, outputs) is cut into G = n / group groups of inputs of one output. With c the code of an
element, of b bits,

    W[i, j] ~ (c[i, j] - z[g[i], j]) s[g[i], j]                     s (G, m), z (G, m) in 0..2^b - 1, g[i] = i // group
    c = clip(round(W / s) + z, 0, 2^b - 1)

z is that of the group's range, widened to hold zero, which stays exact: z = round(-min W / (max W - min W) (2^b - 1)).
s is the range over 2^b - 1 times the ratio of `RATIOS` with the least squared error, float32.

What others have quantized (GPTQ, AWQ) has scales of 16 bits, and where GPTQ has taken the inputs in the order of their
activations, a g of its own.

Codes lie in fields of 8, 4, 2 or 1 bits, one array each: 3 bits are a field of the low two and one of the high one. A
field of w bits is (n w / 8, m) uint8; the byte [i, j] holds inputs 8 i / w and those behind it, the first in its lowest
bits, so that neighbouring rows of bytes are neighbouring inputs, on whatever device they lie.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FIELDS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code -> bits of its fields, the lowest first
RATIOS = np.arange(1.0, 0.39, -0.02).astype(np.float32)  # of the whole range, which is tried first


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "zeros", "group_index"),
    meta_fields=("bits", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Affine:
    """A kernel of codes, zero points and scales; with leading axes, a stack of them.

    codes: fields of the codes, (..., n w / 8, m) uint8 each.
    scales: s (..., G, m) float32, or of 16 bits.  zeros: z (..., G, m) uint8.
    bits: of a code.
    dtype: that W had, and has again where it is unpacked for good.
    group_index: g (..., n) int32; None: i // group.
    """

    codes: tuple[jax.Array, ...]
    scales: jax.Array
    zeros: jax.Array
    bits: int
    dtype: Any
    group_index: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n, m)."""
        *lead, rows, m = self.codes[0].shape
        return (*lead, rows * 8 // FIELDS[self.bits][0], m)

    @property
    def ndim(self) -> int:
        return self.codes[0].ndim

    @property
    def size(self) -> int:
        """Elements of W."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and groups."""
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def groups(self) -> int:
        """G."""
        return self.scales.shape[-2]

    @property
    def unit(self) -> int:
        """Inputs that cannot be parted: those of a byte, or of a group where there are several."""
        return math.lcm(self.aligned(self.bits), self.shape[-2] // self.groups if self.groups > 1 else 1)

    def with_scales(self, scales: jax.Array) -> Affine:
        """The same codes and zero points with other scales (..., G, m)."""
        return dataclasses.replace(self, scales=scales)

    @staticmethod
    def aligned(bits: int) -> int:
        """What the number of inputs has to be a multiple of, for codes of so many bits."""
        return 8 // min(FIELDS[bits])


def pack(codes: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """(n, m) integers of 0..2^bits - 1 -> fields, (n w / 8, m) uint8 each; n a multiple of `Affine.aligned`."""
    n, m = codes.shape
    fields, below = [], 0
    for width in FIELDS[bits]:
        per = 8 // width
        parts = ((codes.astype(jnp.int32) >> below) & ((1 << width) - 1)).reshape(n // per, per, m)
        shifts = width * jnp.arange(per)[:, None]
        fields.append((parts << shifts).sum(1).astype(jnp.uint8))
        below += width
    return tuple(fields)


def unpack(fields: tuple[jax.Array, ...], bits: int) -> jax.Array:
    """The inverse of `pack`, int32."""
    codes, below = jnp.zeros((), jnp.int32), 0
    for field, width in zip(fields, FIELDS[bits], strict=True):
        shifts = width * jnp.arange(8 // width)[:, None]
        parts = (field.astype(jnp.int32)[:, None] >> shifts) & ((1 << width) - 1)
        codes = codes | (parts.reshape(-1, field.shape[-1]) << below)
        below += width
    return codes


def quantize(w: jax.Array, bits: int, group: int = 0) -> Affine:
    """An affine kernel.

    Args:
      w: (n, m) floating point; its dtype is kept in mind.
      bits: of FIELDS.
      group: inputs that share a scale and a zero point, a divisor of n; 0: all.

    Raises:
      ValueError: for other bits, a group that does not divide n, or an n that does not fill bytes.
    """
    n, m = w.shape
    group = group or n
    if bits not in FIELDS:
        raise ValueError(f"{bits} bits are not one of {', '.join(map(str, FIELDS))}")
    if group < 1 or n % group:
        raise ValueError(f"group {group} does not divide the {n} inputs")
    if n % Affine.aligned(bits):
        raise ValueError(f"{n} inputs are no multiple of {Affine.aligned(bits)}, as {bits} bits need")
    top = 2**bits - 1
    groups = w.astype(jnp.float32).reshape(-1, group, m)
    low, high = jnp.minimum(groups.min(1), 0), jnp.maximum(groups.max(1), 0)
    whole = jnp.where(high > low, (high - low) / top, 1.0)
    zeros = jnp.round(-low / whole)

    def codes_of(scales):
        return jnp.clip(jnp.round(groups / scales[:, None]) + zeros[:, None], 0, top)

    def better(best, ratio):
        scales = whole * ratio
        error = jnp.square((codes_of(scales) - zeros[:, None]) * scales[:, None] - groups).sum(1)
        less = error < best[0]
        return (jnp.where(less, error, best[0]), jnp.where(less, scales, best[1])), None

    (_, scales), _ = jax.lax.scan(better, (jnp.full(whole.shape, jnp.inf), whole), jnp.asarray(RATIOS))
    codes = codes_of(scales).astype(jnp.int32).reshape(n, m)
    return Affine(pack(codes, bits), scales, zeros.astype(jnp.uint8), bits, jnp.dtype(w.dtype))


def steps(w: Affine) -> jax.Array:
    """c - z (G, group, m) int16, of groups in the order of the inputs."""
    n, m = w.shape
    codes = unpack(w.codes, w.bits).reshape(w.groups, n // w.groups, m)
    return codes.astype(jnp.int16) - w.zeros.astype(jnp.int16)[:, None]


def dequantize(w: Affine, dtype: Any = jnp.float32) -> jax.Array:
    """W (n, m) in `dtype`: (c - z) s in float32, then rounded once."""
    if w.group_index is None:
        return (steps(w) * w.scales.astype(jnp.float32)[:, None]).reshape(w.shape).astype(dtype)
    difference = unpack(w.codes, w.bits) - w.zeros.astype(jnp.int32)[w.group_index]
    return (difference * w.scales.astype(jnp.float32)[w.group_index]).astype(dtype)


@jax.custom_vjp
def product(x: jax.Array, w: Affine) -> jax.Array:
    """x W, x (..., n), W (n, m) frozen: the kernel is unpacked in both passes and kept in neither."""
    return x @ dequantize(w, x.dtype)


product.defvjp(lambda x, w: (product(x, w), w), lambda w, dy: (dy @ dequantize(w, dy.dtype).T, None))


@jax.custom_vjp
def scaled_product(x: jax.Array, w: Affine, scales: jax.Array) -> jax.Array:
    """x W with scales (G, m) float32 in the place of its own, with respect to which it is differentiated.

    ds[g, j] = sum over i in the group of (c - z)[i, j] dW[i, j], dW = x^T dy: one group's dW (group, m) at a time, in
    float32. x (..., n) is kept, and no kernel is.
    """
    return x @ dequantize(w.with_scales(scales), x.dtype)


def _save(x, w, scales):
    return scaled_product(x, w, scales), (x, w, scales)


def _back(saved, dy):
    x, w, scales = saved
    group, lead = w.shape[0] // w.groups, tuple(range(x.ndim - 1))

    def of_group(inputs):
        number, step = inputs
        part = jax.lax.dynamic_slice_in_dim(x, number * group, group, axis=-1)
        dw = jnp.tensordot(part, dy, (lead, lead), preferred_element_type=jnp.float32)
        return (step * dw).sum(0)

    d_scales = jax.lax.map(of_group, (jnp.arange(w.groups), steps(w)))
    return dy @ dequantize(w.with_scales(scales), dy.dtype).T, None, d_scales


scaled_product.defvjp(_save, _back)
