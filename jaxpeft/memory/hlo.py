"""What XLA writes about one compiled function: the scheduled program, its buffers, and when each is live.

Compiled with `compiler_options=DUMP_OPTIONS | {"xla_dump_to": folder}`, libtpu, the GPU compiler and the CPU compiler
all write, among much else,

    *after_optimizations.hlo.pb             an HloProto: the program with `op_name` metadata, and the buffer assignment
    *after_optimizations-live-range.txt     the flattened schedule, and the live range of every value in it

The field numbers below are those of xla/service/hlo.proto and xla/xla_data.proto.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jaxpeft import files
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.memory import shapes
from jaxpeft.memory.shapes import Index
from jaxpeft.memory.wire import Damaged, Message
from jaxpeft.source import Frame, nearest

_HOST = 5  # XLA's number ("color") of the host's memory; 0 is the device's
DUMP_OPTIONS = {"xla_dump_hlo_as_text": True, "xla_dump_hlo_as_proto": True}

Key = tuple[int, Index]  # (instruction id, index): an array that an instruction yields


class Instruction(NamedTuple):
    """One HLO instruction.

    called: ids of the computations it calls; (condition, body) as XLA orders them: body first for a while.
    number: the parameter's number, or the index of a get-tuple-element.
    computation: id of the computation it is in.
    frame: of the Python stack that made it, a key of `Program.sources`; 0 if the program does not say.
    proto: the HloInstructionProto itself, of the opcodes of which more is asked; else empty.
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
    frame: int = 0
    proto: bytes = b""

    def shape(self, index: Index = ()) -> tuple[str, tuple[int, ...]]:
        """(dtype, dimensions) of the array at `index`."""
        return shapes.array(self.shape_proto, index)


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
    sources: frame -> the nearest line of the user's code, such as "train.py:41 loss".
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
    sources: Mapping[int, str] = MappingProxyType({})


class Module(NamedTuple):
    """A compiled function among a folder's dumps: module_0012.jit_step. bytes: of its buffers."""

    name: str
    path: Path
    bytes: int

    @property
    def function(self) -> str:
        """The name without XLA's number: jit_step."""
        return re.sub(r"^module_\d+\.", "", self.name)


FLAGS = 'XLA_FLAGS="--xla_dump_to=DIR --xla_dump_hlo_as_text --xla_dump_hlo_as_proto"'
_SUFFIX = "after_optimizations.hlo.pb"
_MOST = 2**29  # bytes of one file; those of models with all their layers unrolled have 2^27


def modules(folder: Path) -> list[Module]:
    """The compiled functions that a folder of XLA's dumps describes, the one with the largest buffers first.

    Raises:
      InputError: if there is none, or a file is damaged.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        why = "is no folder" if os.path.lexists(folder) else "no such folder"
        raise InputError(f"{folder}: {why}; name the one that --xla_dump_to filled")
    found = []
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with whole(path):
            sizes = [allocation.number(2) for allocation in _load(path).message(3).messages(3)]
        if sizes:
            found.append(Module(_name(path), path, sum(sizes)))
    if not found and any(folder.glob("*after_optimizations.txt")):
        raise InputError(f"{folder}: has XLA's texts, but no *{_SUFFIX}; add --xla_dump_hlo_as_proto, as in {FLAGS}")
    if not found:
        raise InputError(
            f"{folder}: no *{_SUFFIX} with a buffer assignment; compile with compiler_options={DUMP_OPTIONS} and "
            f"xla_dump_to, or set {FLAGS}"
        )
    return sorted(found, key=lambda module: -module.bytes)


def choose(found: list[Module], folder: Path, name: str | None = None) -> Module:
    """The first (largest) of a folder's modules, or of those that `name` is the name or a part of the name of.

    Raises:
      InputError: if none has such a name.
    """
    if name is None:
        return found[0]
    exact = [one for one in found if name in (one.name, one.function)]
    chosen = exact or [one for one in found if name in one.name]
    if not chosen:
        near = did_you_mean(name, {one.function for one in found}) if len(found) <= _FEW else ""
        raise InputError(f"{folder}: no module is called {name!r}{near or f'; the largest are {listed(found)}'}")
    return chosen[0]


def read(folder: Path, module: str | None = None) -> Program:
    """The program that a folder of XLA's dumps describes; of several, the one with the largest buffers.

    Args:
      folder: of the dumps.
      module: the name of the only ones that are meant, or a part of it.

    Raises:
      InputError: if the folder lacks the dumps, they are damaged, or none has such a name.
    """
    return read_module(choose(modules(folder), folder, module))


def read_module(module: Module) -> Program:
    """The program that one of a folder's modules is.

    Raises:
      InputError: if its live ranges are missing, or a file is damaged.
    """
    path = module.path
    ranges = Path(str(path).removesuffix(".hlo.pb") + "-live-range.txt")
    missing = f"{path.parent}: {ranges.name} is missing; add --xla_dump_hlo_as_text, as in {FLAGS}"
    text = files.read_text(ranges, missing, _MOST)
    with whole(ranges):
        if "\n  Live ranges at " not in text:  # what follows the ranges themselves
            raise Damaged("cut short")
    with whole(path):
        return _program(_load(path), text, path.name)


_FEW = 8


def listed(found: list[Module], most: int = _FEW) -> str:
    """The names of modules as part of a line."""
    names = [module.name for module in found[:most]]
    return ", ".join(names) + (f" and {len(found) - most} more" if len(found) > most else "")


def _name(path: Path) -> str:
    """module_0012.jit_step.sm_9.0_gpu_after_optimizations.hlo.pb -> module_0012.jit_step."""
    return _COMPILER.sub("", path.name.removesuffix(_SUFFIX))


_COMPILER = re.compile(
    r"\.(?:cpu_|(?:sm_\d+(?:\.\w+)?|gfx\w+)_gpu_|gpu_|cl_\d+\.)?$"
)  # what follows the function's name


def _load(path: Path) -> Message:
    """A file's message; a file that is too large is refused before it is read."""
    if path.is_file() and path.stat().st_size > _MOST:
        raise InputError(f"{path}: has more than {_MOST} bytes; such a document has fewer")
    return Message(files.read_bytes(path, f"{path}: is gone", _MOST))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """What such a file cannot hold is said in one line."""
    try:
        yield
    except (Damaged, LookupError):
        raise InputError(damaged(path)) from None


def damaged(path: Path) -> str:
    """The line for a file that tells of no program."""
    return f"{path}: damaged or cut short; compile again with an empty xla_dump_to"


def _program(proto: Message, ranges: str, name: str) -> Program:
    module, assignment = proto.message(1), proto.message(3)
    instructions, computations = {}, {}
    for computation in module.messages(3):
        own, ids = computation.number(5), []
        for raw in computation.raws(2):
            instruction = _instruction(raw, own)
            instructions[instruction.id] = instruction
            ids.append(instruction.id)
        computations[own] = tuple(ids), computation.number(6)
    _check(instructions, computations, module.number(6))
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
        sources=_sources(module.message(17)),
    )


def _check(instructions: dict[int, Instruction], computations: dict[int, tuple[tuple[int, ...], int]], entry: int):
    """Raises Damaged if something is named that is not there."""
    named = {o for i in instructions.values() for o in i.operands} | {root for _, root in computations.values()}
    called = {c for i in instructions.values() for c in i.called} | {entry}
    if not named <= instructions.keys() or not called <= computations.keys():
        raise Damaged("instructions are missing")


_ASKED = ("while", "dot", "convolution", "custom-call", "compare")
_COLLECTIVES = ("all-", "collective-", "reduce-scatter", "ragged-all")


def _instruction(raw: bytes, computation: int) -> Instruction:
    message = Message(raw)
    opcode = message.text(2)
    asked = opcode in _ASKED or opcode.startswith(_COLLECTIVES) or (opcode == "constant" and len(raw) < 256)
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
        frame=metadata.number(15),
        proto=raw if asked else b"",
    )


def _sources(index: Message) -> dict[int, str]:
    """{frame: the nearest line of the user's code} of a module's StackFrameIndexProto, whose ids count from 1."""
    names, functions = index.texts(1), index.texts(2)
    places = [
        Frame(_at(names, place.number(1)), _at(functions, place.number(2)), place.number(3))
        for place in index.messages(3)
    ]
    stack = [(frame.number(1), frame.number(2)) for frame in index.messages(4)]
    found = {}
    for number in range(1, len(stack) + 1):
        frames: list[Frame] = []
        at = number
        while 0 < at <= len(stack) and len(frames) < 200:
            place, at = stack[at - 1]
            if 0 < place <= len(places):
                frames.append(places[place - 1])
        if frame := nearest(frames):
            found[number] = str(frame)
    return found


def _at(texts: list[str], number: int) -> str:
    return texts[number - 1] if 0 < number <= len(texts) else ""


def _allocation(message: Message) -> Allocation:
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
