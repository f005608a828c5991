"""Kernels of GPTQ's and AWQ's checkpoints, read as affine ones: the codes in another order, not one of them changed.

A module of n inputs and m outputs, of b bits in G groups of inputs, has in place of `weight` (m, n)

    tensor    shape         type      holds
    qweight   (n b / 32, m) int32     GPTQ: a column is the codes of an output in the order of its inputs, b bits each,
                                      without a gap, the first in the lowest bits (of 3 bits, 32 codes in 3 integers)
              (n, m / 8)    int32     AWQ: of 4 bits, [i, j] holds those of input i and outputs 8 j + ORDER[k], the k-th
                                      4 k bits up
    qzeros    (G, m b / 32) int32     zero points: GPTQ: along a row as codes along a column; AWQ: as codes
    scales    (G, m)        16 bits   s
    g_idx     (n,)          int32     the group of each input; where it is missing, i // group

    W[i, j] = (c[i, j] - z[g[i], j]) s[g[i], j]

GPTQ's first format stores z - 1, modulo 2^b; `gptq_v2` and AWQ store z. What comes of it is an `Affine`, of as many
bits: its codes lie along the inputs, its zero points take a byte each.

Formats: Frantar et al. 2022, "GPTQ", arXiv:2210.17323, as AutoGPTQ and GPTQModel write it; Lin et al. 2023, "AWQ",
arXiv:2306.00978, as AutoAWQ's GEMM version.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import models, tree
from jaxpeft.errors import InputError
from jaxpeft.gguf import Stored
from jaxpeft.models.quantized import Scheme, scheme_of
from jaxpeft.quant import Affine
from jaxpeft.quant.affine import FIELDS

PARTS = ("qweight", "qzeros", "scales", "g_idx")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ's, of the outputs that share an integer
KIND = "packed"  # of a tensor that is put together of parts


# What a checkpoint is going to hold.


def shapes_of(config: Mapping[str, Any], own: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: shape}` of a base's parameters as its checkpoint holds them, by what config.json says alone.

    Args:
      config: parsed.  own: the family's configuration of it.
      shapes: of its parameters, plain.
    """
    scheme = scheme_of(config)
    if scheme is None:
        return dict(shapes)
    found = dict(shapes)
    for path, leaf in shapes.items():
        if path.endswith("/kernel") and tree.stacked(path):
            module = models.hf_name(own, path)[0].removesuffix(".weight")
            if scheme.quantizes(module.format(i=0)):
                found[path] = shape_of(leaf, scheme)
    return found


def shape_of(like: Any, scheme: Scheme) -> Affine:
    """An `Affine` of shapes, of a kernel (..., n, m); what does not fill bytes or groups is left to reading."""
    *lead, n, m = like.shape
    group = scheme.group or n
    shape = lambda *own, dtype: jax.ShapeDtypeStruct((*lead, *own), dtype)
    ordered = scheme.ordered and n > group
    return Affine(
        tuple(shape(n * width // 8, m, dtype=jnp.uint8) for width in FIELDS[scheme.bits]),
        shape(n // group, m, dtype=jnp.float16),
        shape(n // group, m, dtype=jnp.uint8),
        scheme.bits,
        jnp.dtype(like.dtype),
        shape(n, dtype=jnp.int32) if ordered else None,
    )


# What it holds.


def joined(where: Any, stored: Iterable[Stored], scheme: Scheme, names: Iterable[str]) -> Iterator[Stored]:
    """The tensors of a checkpoint, the parts of each quantized module as one, of which the kernel can be read.

    Args:
      where: the folder, for messages.
      stored: its tensors.
      scheme: how they are quantized.
      names: of the tensors that the model has; a bias that it has not and that is zero everywhere, as AutoGPTQ adds
        them, is left out.

    Raises:
      InputError: for parts that are missing or do not fit each other.
    """
    modules: dict[str, dict[str, Stored]] = {}
    biases: list[Stored] = []
    for tensor in stored:
        module, _, part = tensor.name.rpartition(".")
        if part in PARTS:
            modules.setdefault(module, {})[part] = tensor
        elif part == "bias":
            biases.append(tensor)
        else:
            yield tensor
    if not modules:
        raise InputError(f"{where}: config.json says that the weights are quantized, and no tensor is a qweight")
    for tensor in biases:
        if tensor.name in set(names) or tensor.name.removesuffix(".bias") not in modules or tensor.read().any():
            yield tensor
    for module, parts in modules.items():
        yield _joined(where, module, parts, scheme)


def _joined(where: Any, module: str, parts: Mapping[str, Stored], scheme: Scheme) -> Stored:
    """One tensor of the parts of a module."""
    if lacking := [part for part in PARTS[:3] if part not in parts]:
        raise InputError(f"{where}: {module} has a {next(iter(parts))} and lacks {' and '.join(lacking)}")
    expected = dict.fromkeys(("qweight", "qzeros", "g_idx"), ("I32",)) | {"scales": ("F16", "BF16", "F32")}
    for part, tensor in parts.items():
        if tensor.kind not in expected[part]:
            raise InputError(f"{where}: {module}.{part} is {tensor.kind}, expected {' or '.join(expected[part])}")
        if len(tensor.shape) != 1 + (part != "g_idx"):
            axes = 1 if part == "g_idx" else 2
            raise InputError(f"{where}: {module}.{part} has shape {tensor.shape}, expected {axes} axes")
    rows, columns = parts["qweight"].shape
    n, m = (rows * 32 // scheme.bits, columns) if scheme.method == "gptq" else (rows, columns * 8)
    group = scheme.group or n
    if n % group:
        raise InputError(f"{where}: {module} has {n} inputs, of which group_size {group} is no divisor")
    if n * scheme.bits % 32 or m * scheme.bits % 32:
        raise InputError(f"{where}: {module} is {n} x {m}, of which {scheme.bits} bits fill no whole integers")
    shapes = {"qzeros": (n // group, m * scheme.bits // 32), "scales": (n // group, m), "g_idx": (n,)}
    for part, shape in shapes.items():
        if part in parts and parts[part].shape != shape:
            raise InputError(f"{where}: {module}.{part} has shape {parts[part].shape}, expected {shape}")
    packed = functools.partial(_kernel, f"{where}: {module}", parts, scheme)
    dtype = parts["scales"].dtype
    return Stored(f"{module}.weight", KIND, dtype, (m, n), functools.partial(_plain, packed), packed=packed)


def _kernel(where: str, parts: Mapping[str, Stored], scheme: Scheme) -> Affine:
    """The kernel of a module, in numpy, with the groups of its inputs."""
    words, zeros, scales = (parts[part].read() for part in PARTS[:3])
    if scheme.method == "gptq":
        codes, zeros = _unpacked(words, scheme.bits), _unpacked(zeros.T, scheme.bits).T
    else:
        codes, zeros = _reordered(words), _reordered(zeros)
    zeros = (zeros + scheme.offset) & (2**scheme.bits - 1)
    n, group = len(codes), scheme.group or len(codes)
    index = parts["g_idx"].read() if "g_idx" in parts else np.arange(n) // group
    if (strange := index[(index < 0) | (index >= n // group)]).size:
        raise InputError(f"{where}.g_idx has group {strange[0]}, expected 0 to {n // group - 1}")
    for part, values in (("scales", scales), ("qzeros", zeros)):
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(f"{where}.{part} holds a number that is not finite")
    fields = _fields(codes, scheme.bits)
    return Affine(fields, scales, zeros.astype(np.uint8), scheme.bits, scales.dtype, index.astype(np.int32))


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """(rows, m) int32 -> codes (32 rows / bits, m) uint8: a column is a stream of bits, the lowest first."""
    rows, m = words.shape
    stream = np.ascontiguousarray(words.T.astype("<i4")).view(np.uint8)
    if bits == 8:
        return stream.T
    own = np.unpackbits(stream, axis=1, bitorder="little").reshape(m, 32 * rows // bits, bits)
    return np.packbits(own, axis=2, bitorder="little")[:, :, 0].T


def _reordered(words: np.ndarray) -> np.ndarray:
    """AWQ's (rows, m / 8) int32 -> (rows, m) uint8."""
    rows, columns = words.shape
    codes = np.empty((rows, columns, 8), np.uint8)
    for k, place in enumerate(ORDER):
        codes[:, :, place] = (words >> 4 * k) & 15
    return codes.reshape(rows, columns * 8)


def _fields(codes: np.ndarray, bits: int) -> tuple[np.ndarray, ...]:
    """(n, m) codes -> the fields of an `Affine` (`affine.pack`), on the host."""
    n, m = codes.shape
    fields, below = [], 0
    for width in FIELDS[bits]:
        per = 8 // width
        parts = ((codes >> below) & ((1 << width) - 1)).reshape(n // per, per, m)
        fields.append(np.bitwise_or.reduce(parts << (width * np.arange(per, dtype=np.uint8))[:, None], axis=1))
        below += width
    return tuple(fields)


def _plain(packed: Any) -> np.ndarray:
    """The weight (m, n) in the scales' type."""
    from jaxpeft.quant import dense

    kernel = packed()
    return np.asarray(dense(jax.tree.map(jnp.asarray, kernel), kernel.dtype)).T


# Read.


def stacked(where: Any, path: str, like: Any, tensors: Sequence[Stored]) -> Affine:
    """The leaf of the packed kernels of its layers, on the host.

    Args:
      where: the checkpoint, for messages.
      path: of the leaf.
      like: its shape (L, n, m), and the dtype that it has where it is unpacked for good.
      tensors: one for each layer.

    Raises:
      InputError: for a leaf that is not one of the layers, or of which some layers are packed and some are not.
    """
    plain = [tensor.name for tensor in tensors if tensor.packed is None]
    if plain or not tree.stacked(path):
        what = f"{plain[0]} is not quantized, and other layers are" if plain else f"{tensors[0].name} is quantized"
        raise InputError(f"{where}: {what}; a kernel is packed in all layers alike, and in the layers alone")
    stack: Any = None
    for row, tensor in enumerate(tensors):
        kernel = tensor.packed()  # type: ignore[misc]
        if stack is None:
            stack = jax.tree.map(lambda x: np.empty((len(tensors), *x.shape), x.dtype), kernel)
        for whole, part in zip(jax.tree.leaves(stack), jax.tree.leaves(kernel), strict=True):
            whole[row] = part
    n, groups = like.shape[-2], stack.scales.shape[-2]
    in_turn = (stack.group_index == np.arange(n) * groups // n).all()
    index = None if in_turn else stack.group_index
    return dataclasses.replace(stack, dtype=jnp.dtype(like.dtype), group_index=index)
