"""The container: a header of typed fields, a table of tensors, and the tensors' bytes at offsets.

    magic "GGUF", version, number of tensors, number of fields (uint32, uint32, uint64, uint64; little-endian)
    fields     key, type, value
    tensors    name, number of dimensions, dimensions (the innermost first), type, offset
    bytes      of each tensor, counted from the next multiple of general.alignment

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.) Block sizes and the mathematics of the quantized types are
the `gguf` package's. Its reader is not used: it makes two to four arrays of each string (4.6 s and 160 MiB for a
vocabulary of 49,152), and reads beyond the end of a truncated file without noticing.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.errors import InputError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
# Types of fields by their number; 8 is a string, 9 an array.
_SCALARS = dict(enumerate("u1 i1 u2 i2 u4 i4 f4 ?".split())) | {10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9
# Types of tensors that are read: plain numbers, and what `gguf.dequantize` knows.
KINDS = (
    "F32 F16 BF16 F64 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S "
    "IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4"
).split()
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """Where a tensor lies.

    kind: its type's name: F32, Q4_K.
    shape: the outermost dimension first, as numpy has it.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def read(self) -> np.ndarray:
        """The values: F32, F16 and F64 as they are, other types dequantized to float32."""
        import gguf

        with self.file.open("rb") as opened:
            stored = np.fromfile(opened, np.uint8, self.num_bytes, offset=self.offset)
        stored = stored.reshape(*self.shape[:-1], -1)
        plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
        if self.kind in plain:
            return stored.view(plain[self.kind])
        return gguf.dequantize(stored, gguf.GGMLQuantizationType[self.kind])


class Container(NamedTuple):
    """The header of a file, or of a file and the rest of its shards: fields and tensors by name."""

    file: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is of a GGUF file: a file that is called so or begins so."""
    try:
        if not path.is_file():  # a pipe would keep its reader waiting
            return False
        with path.open("rb") as opened:
            return path.suffix.lower() == SUFFIX or opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(file: Path) -> Container:
    """The header of a GGUF file; if it is the first of several shards, with the tensors of all.

    Raises:
      InputError: for a file that is none, is damaged or truncated, or one that is not the first shard or lacks others.
    """
    first = _read_one(file)
    count = first.fields.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return first
    named = _SHARD.fullmatch(file.name)
    if named is None or first.fields.get("split.no") != 0:
        raise InputError(f"{file}: is one of {count} shards; name the first, ...-00001-of-{count:05}{SUFFIX}")
    tensors = dict(first.tensors)
    for i in range(2, count + 1):
        shard = file.with_name(f"{named[1]}-{i:05}-of-{count:05}{SUFFIX}")
        if not shard.is_file():
            raise InputError(f"{file}: the shard {shard.name} is absent")
        tensors |= _read_one(shard).tensors
    return Container(file, first.fields, tensors)


def _read_one(file: Path) -> Container:
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size < len(MAGIC):
                raise InputError(f"{file}: is not a GGUF file: it is empty or nearly so")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(file, data)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    except _Damaged as error:
        raise InputError(f"{file}: not a whole GGUF file (truncated or damaged): {error}") from None


class _Damaged(Exception):
    """What about a file cannot be so."""


class _Cursor:
    """A place in the header that moves on as values are read; nothing beyond the end is."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _Damaged(f"the header goes on at byte {self.at}, the file ends at {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack("<" + kind, self.take(struct.calcsize(kind)))
        return value

    def text(self) -> str:
        begin = self.at
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"the text at byte {begin} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _Damaged(f"a field of type {kind} at byte {self.at}; types go up to {max(_SCALARS)}")
        of, count = self.number("I"), self.number("Q")
        if of == _ARRAY:
            raise _Damaged(f"an array of arrays at byte {self.at}")
        if of in _SCALARS:
            dtype = np.dtype(_SCALARS[of]).newbyteorder("<")
            return np.frombuffer(self.take(dtype.itemsize * count), dtype).tolist()
        return [self.value(of) for _ in range(count)]


def _parse(file: Path, data: mmap.mmap) -> Container:
    import gguf

    cursor = _Cursor(data)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise InputError(f"{file}: is not a GGUF file: it does not begin with {MAGIC.decode()}")
    version = cursor.number("I")
    if version not in VERSIONS:
        other = " (of a big-endian machine)" if version and version % 2**16 == 0 else ""
        raise InputError(f"{file}: is GGUF version {version}{other}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    fields = {}
    for _ in range(num_fields):
        key = cursor.text()
        fields[key] = cursor.value(cursor.number("I"))
    entries = []
    for _ in range(num_tensors):
        name, rank = cursor.text(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(rank))[::-1] if rank <= 4 else ()
        number, offset = cursor.number("I"), cursor.number("Q")
        if not 1 <= rank <= 4 or math.prod(shape) == 0:
            raise _Damaged(f"{name} has {rank} dimensions{f', {shape}' if shape else ''}")
        entries.append((name, shape, number, offset))
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Damaged(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, number, offset in entries:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise InputError(f"{file}: {name} is of type {number}, which the gguf package does not know") from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _Damaged(f"{name} has rows of {shape[-1]}, no multiple of the {block} of a block of {kind.name}")
        num_bytes = math.prod(shape) // block * size
        if start + offset + num_bytes > len(data):
            raise _Damaged(f"{name} ends at byte {start + offset + num_bytes}, the file at {len(data)}")
        tensors[name] = Tensor(file, name, kind.name, shape, start + offset, num_bytes)
    return Container(file, fields, tensors)
