"""XLA's shapes, ShapeProto of xla/xla_data.proto: the type, the axes, the layout and the memory of arrays."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from jaxpeft.memory.wire import Message

Index = tuple[int, ...]  # the place of an array in a nested tuple; () for an array

_DTYPES = (
    "invalid pred s8 s16 s32 s64 u8 u16 u32 u64 f16 f32 f64 tuple opaque c64 bf16 token c128 f8e5m2 f8e4m3fn s4 u4"
).split()


@functools.lru_cache(maxsize=65536)
def array(proto: bytes, index: Index) -> tuple[str, tuple[int, ...]]:
    """(dtype, dimensions) of the array at `index`."""
    message = Message(proto)
    for i in index:
        parts = list(message.messages(4))
        if i >= len(parts):
            return "invalid", ()
        message = parts[i]
    kind = message.number(2)
    return _DTYPES[kind] if kind < len(_DTYPES) else f"type{kind}", message.numbers(3)


class Leaf(NamedTuple):
    """An array of a shape that may be a nested tuple.

    at: its place there.
    space: XLA's number of the memory that it is in; order: of its axes, the one that varies fastest first.
    bytes: in that layout; a TPU's arrays come in whole tiles.
    content: bytes of the elements alone.
    """

    at: Index
    dtype: str
    elements: int
    space: int
    order: tuple[int, ...]
    bytes: float
    content: float


@functools.lru_cache(maxsize=65536)
def leaves(proto: bytes, at: Index = ()) -> list[Leaf]:
    """The arrays of a shape that is itself at some place."""
    message = Message(proto)
    kind = _DTYPES[message.number(2)] if message.number(2) < len(_DTYPES) else "f8"
    if kind == "tuple":
        return [leaf for n, part in enumerate(message.raws(4)) for leaf in leaves(part, (*at, n))]
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind.partition("e")[0]) or 0)  # f8e5m2 has 8, token none
    dims, layout = message.numbers(3), message.message(5)
    order = layout.numbers(1)
    placed = [dims[axis] for axis in reversed(order)] if len(order) == len(dims) else list(dims)
    for tile in list(layout.messages(6))[:1]:
        sizes = tile.numbers(1)[-len(placed) :] if placed else ()
        for n, size in enumerate(reversed(sizes), 1):
            placed[-n] = -(-placed[-n] // size) * size
    elements, padded = math.prod(dims), math.prod(placed)
    return [Leaf(at, kind, elements, layout.number(8), order, padded * bits / 8, elements * bits / 8)]
