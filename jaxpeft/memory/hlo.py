"""What XLA writes about one compiled function: the scheduled program, its buffers, and when each is live.

Compiled with `compiler_options=DUMP_OPTIONS | {"xla_dump_to": folder}`, libtpu, the GPU compiler and the CPU compiler
all write, among much else,

    *after_optimizations.hlo.pb             an HloProto: the program with `op_name` metadata, and the buffer assignment
    *after_optimizations-live-range.txt     the flattened schedule, and the live range of every value in it

The field numbers below are those of xla/service/hlo.proto and xla/xla_data.proto. Protocol buffers never renumber
fields, so a decoder of the wire format that takes the needed fields by number does not age and needs no protobuf.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.errors import InputError

_HOST = 5  # XLA's number ("color") of the host's memory; 0 is the device's
DUMP_OPTIONS = {"xla_dump_hlo_as_text": True, "xla_dump_hlo_as_proto": True}

_DTYPES = (
    "invalid pred s8 s16 s32 s64 u8 u16 u32 u64 f16 f32 f64 tuple opaque c64 bf16 token c128 f8e5m2 f8e4m3fn s4 u4"
).split()

Index = tuple[int, ...]  # the place of an array in a nested tuple; () for an array
Key = tuple[int, Index]  # (instruction id, index): an array that an instruction yields


class Instruction(NamedTuple):
    """One HLO instruction.

    called: ids of the computations it calls; (condition, body) as XLA orders them: body first for a while.
    number: the parameter's number, or the index of a get-tuple-element.
    computation: id of the computation it is in.
    """

    id: int
    name: str
    opcode: str
    op_name: str
    operands: tuple[int, ...]
    called: tuple[int, ...]
    number: int
    target: str
    computation: int
    shape_proto: bytes

    def shape(self, index: Index = ()) -> tuple[str, tuple[int, ...]]:
        """(dtype, dimensions) of the array at `index`."""
        return _shape(self.shape_proto, index)


class Value(NamedTuple):
    """An array placed in memory: `bytes` from `offset` on in an allocation, live from schedule position to position."""

    key: Key
    allocation: int
    offset: int
    bytes: int
    first: int
    last: int


class Allocation(NamedTuple):
    """One block of memory. kind: parameter, output, constant or temporary; parameter: its number, or -1."""

    number: int
    bytes: int
    kind: str
    parameter: int


class Program(NamedTuple):
    """A compiled function.

    instructions: by id.
    computations: by id, (ids of its instructions, id of its root).
    entry: id of the entry computation.
    order: names of the instructions in the flattened schedule; a position is an index of it.
    defined: the keys of all values, wherever they are kept.
    allocations, values: those in device memory (on a TPU: HBM; what is in VMEM or SMEM takes no HBM).
    platform: tpu, gpu or cpu.
    host_bytes: allocated in the host's memory.
    """

    name: str
    platform: str
    instructions: dict[int, Instruction]
    computations: dict[int, tuple[tuple[int, ...], int]]
    entry: int
    order: list[str]
    defined: frozenset[Key]
    allocations: dict[int, Allocation]
    values: list[Value]
    host_bytes: int


def read(folder: Path) -> Program:
    """The program that a folder of XLA's dumps describes; of several, the one with the largest buffers.

    Raises:
      InputError: if the folder lacks the dumps.
    """
    found = []
    for path in sorted(Path(folder).glob("*after_optimizations.hlo.pb")):
        try:
            proto = _Message(path.read_bytes())
            sizes = [allocation.number(2) for allocation in proto.message(3).messages(3)]
        except IndexError:
            raise InputError(f"{path}: damaged or cut short; compile again with an empty xla_dump_to") from None
        if sizes:
            found.append((sum(sizes), path, proto))
    if not found:
        raise InputError(
            f"{folder}: no *after_optimizations.hlo.pb with a buffer assignment; compile with "
            f"compiler_options={DUMP_OPTIONS} and xla_dump_to"
        )
    path, proto = max(found, key=lambda item: item[0])[1:]
    ranges = Path(str(path).removesuffix(".hlo.pb") + "-live-range.txt")
    if not ranges.is_file():
        raise InputError(f"{folder}: {ranges.name} is missing; compile with compiler_options={DUMP_OPTIONS}")
    return _program(proto, ranges.read_text(), path.name)


def _program(proto: _Message, ranges: str, name: str) -> Program:
    module, assignment = proto.message(1), proto.message(3)
    instructions, computations = {}, {}
    for computation in module.messages(3):
        own, ids = computation.number(5), []
        for message in computation.messages(2):
            instruction = _instruction(message, own)
            instructions[instruction.id] = instruction
            ids.append(instruction.id)
        computations[own] = tuple(ids), computation.number(6)
    order, live = _live_ranges(ranges)
    allocations, values, host = {}, [], 0
    defined = {}
    for message in assignment.messages(1):
        place = message.message(3)
        defined[message.number(1)] = place.number(4), place.numbers(3)
    for message in assignment.messages(3):
        if message.number(8) == _HOST:
            host += message.number(2)
        if message.number(8) or message.number(3):  # not device memory; a scalar inside a reduction
            continue
        allocation = _allocation(message)
        allocations[allocation.number] = allocation
        for part in message.messages(9):
            key = defined[part.number(1)]
            label = f"{instructions[key[0]].name}{{{','.join(map(str, key[1]))}}}"
            first, last = live.get(label, (0, -1))  # a value that nothing reads has no range
            values.append(Value(key, allocation.number, part.number(2), part.number(3), first, last))
    platform = "gpu" if "gpu_after" in name else "cpu" if "cpu_after" in name else "tpu"
    return Program(
        name=module.text(1),
        platform=platform,
        instructions=instructions,
        computations=computations,
        entry=module.number(6),
        order=order,
        defined=frozenset(defined.values()),
        allocations=allocations,
        values=values,
        host_bytes=host,
    )


def _instruction(message: _Message, computation: int) -> Instruction:
    opcode = message.text(2)
    metadata = message.message(7)
    return Instruction(
        id=message.number(35),
        name=message.text(1),
        opcode=opcode,
        op_name=metadata.text(2).replace("\\'", "'"),
        operands=message.numbers(36),
        called=message.numbers(38),
        number=message.number(9) if opcode == "parameter" else message.number(13),
        target=message.text(28),
        computation=computation,
        shape_proto=message.raw(3),
    )


def _allocation(message: _Message) -> Allocation:
    parameter = message.number(5)
    kind = "parameter" if parameter else "constant" if message.number(12) else "temporary"
    if kind == "temporary" and message.number(7):
        kind = "output"
    return Allocation(message.number(1), message.number(2), kind, message.number(6) if parameter else -1)


def _live_ranges(text: str) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """(the schedule, {"name{index}": (first, last)})."""
    schedule, _, rest = text.partition("BufferLiveRange:")
    order = re.findall(r"^\s+\d+:(\S+)$", schedule, re.MULTILINE)
    live = re.findall(r"^\s+(\S+\{[\d,]*\}):(\d+)-(\d+)$", rest, re.MULTILINE)
    return order, {label: (int(first), int(last)) for label, first, last in live}


@functools.lru_cache(maxsize=65536)
def _shape(proto: bytes, index: Index) -> tuple[str, tuple[int, ...]]:
    message = _Message(proto)
    for i in index:
        parts = list(message.messages(4))
        if i >= len(parts):
            return "invalid", ()
        message = parts[i]
    kind = message.number(2)
    return _DTYPES[kind] if kind < len(_DTYPES) else f"type{kind}", message.numbers(3)


class _Message:
    """One message of the wire format, its fields by number."""

    def __init__(self, data: bytes):
        self._fields: dict[int, list[Any]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def number(self, field: int) -> int:
        return self._fields.get(field, [0])[-1]

    def raw(self, field: int) -> bytes:
        return self._fields.get(field, [b""])[-1]

    def text(self, field: int) -> str:
        return self.raw(field).decode(errors="replace")

    def message(self, field: int) -> _Message:
        return _Message(self.raw(field))

    def messages(self, field: int) -> Iterator[_Message]:
        return map(_Message, self._fields.get(field, []))

    def numbers(self, field: int) -> tuple[int, ...]:
        """A repeated integer, packed or not."""
        found: list[int] = []
        for value in self._fields.get(field, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                number, at = _varint(value, at)
                found.append(number)
        return tuple(found)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        size = 8
        if kind == 2:
            size, at = _varint(data, at)
        elif kind == 5:
            size = 4
        elif kind != 1:
            raise IndexError(f"wire type {kind} at byte {at}: not a protocol buffer")
        if at + size > end:
            raise IndexError(f"{size} bytes at {at} end after {end}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
