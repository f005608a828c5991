"""What each instruction of a compiled program reads and writes in memory, loops counted by their trips.

An instruction reads its operands and writes its results once. Of these rules a few say less:

    fusion                its arguments and results; of an argument that it only slices, the slice
    update in place       of a dynamic-update-slice (or a scatter) into its own array, the update
    slice, gather         what is taken out
    kernel of Pallas      of a stack of layers, handed over whole beside a layer's number (s32[1]), one layer
    bitcast, tuple, ...   nothing, as nothing is done
    start and done        of an asynchronous operation: once

What a cache spares, and what a kernel reads twice, no program says. Scalars in a loop's condition are left out; of the
branches of a conditional the one that moves most counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxpeft.memory import products
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.hlo import Instruction, Key
from jaxpeft.memory.shapes import Index, leaves
from jaxpeft.memory.trips import trips

COPIES = ("slice", "update", "transpose", "layout", "convert", "join", "whole")
KINDS = (  # in the order of tables
    "product",
    "kernel",
    "attention",
    "elementwise",
    *(f"copy: {name}" for name in COPIES),
    "fill",
    "on chip",
    "host",
    "collective",
)
AVOIDABLE = frozenset(kind for kind in KINDS if kind.startswith("copy: ") or kind == "fill")

_NOTHING = frozenset(
    "bitcast tuple get-tuple-element parameter constant optimization-barrier add-dependency domain after-all "
    "partition-id replica-id copy-done async-done async-update all-reduce-done all-gather-done "
    "collective-permute-done send-done recv-done".split()
)
_NO_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "annotate_device_placement")
_COLLECTIVES = ("all-", "collective-", "reduce-scatter", "ragged-all", "send", "recv")
_PALLAS = ("mosaic_gpu", "mosaic_gpu_v2", "tpu_custom_call", "__gpu$xla.gpu.triton")
# What moves or makes up elements without computing any.
_MOVES = {
    "dynamic-update-slice": "copy: update",
    "dynamic-slice": "copy: slice",
    "slice": "copy: slice",
    "concatenate": "copy: join",
    "pad": "copy: join",
    "transpose": "copy: transpose",
    "reverse": "copy: transpose",
    "convert": "copy: convert",
    "copy": "copy: whole",
    "copy-start": "copy: whole",
    "reshape": "copy: layout",
    "broadcast": "fill",
    "iota": "fill",
}
_ATTENTION = re.compile(r"attention|mha")  # in the kernel's own name, the last of its name stack
_WITHIN = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "fusion")
_HOST = 5  # XLA's number of the host's memory
_FEW = 16  # bytes of a scalar: what is written from no more is a fill


class Access(NamedTuple):
    """Bytes read or written of an array. key: the value, or None; space: "device", "host" or "chip"."""

    key: Key | None
    bytes: float
    space: str


class Move(NamedTuple):
    """What an instruction moves each time.

    kind: one of KINDS.  times: that it runs in a call of the program.  flops: of its products, each time; None of
      a kernel that does not say.
    """

    instruction: Instruction
    kind: str
    times: int
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    flops: float | None


def moves(flow: Dataflow) -> tuple[list[Move], int]:
    """(everything that moves, the number of loops of unknown length, whose bodies count once)."""
    return _Walk(flow).found()


class _Walk:
    def __init__(self, flow: Dataflow):
        self._flow, self._program = flow, flow.program
        self._instructions = flow.program.instructions
        self._unknown: set[int] = set()

    def found(self) -> tuple[list[Move], int]:
        found = list(self._computation(self._program.entry, 1))
        return found, len(self._unknown)

    def _computation(self, computation: int, times: int) -> Iterator[Move]:
        for i in map(self._instructions.__getitem__, self._program.computations[computation][0]):
            if i.opcode == "while":
                count = trips(self._flow, i)
                if count is None:
                    self._unknown.add(i.id)
                yield from self._computation(self._flow.body(i), times * (1 if count is None else count))
            elif i.opcode in ("call", "async-start"):
                yield from self._computation(i.called[0], times)
            elif i.opcode == "conditional":
                yield from max((list(self._computation(branch, times)) for branch in i.called), key=_total)
            elif (move := self._move(i, times)) is not None:
                yield move

    def _move(self, i: Instruction, times: int) -> Move | None:
        if i.opcode in _NOTHING or i.target in _NO_CALLS:
            return None
        place = self._flow.places.get(self._flow.value(i.id) or (-1, ()))
        if i.opcode == "copy" and place and place == self._flow.places.get(self._flow.value(i.operands[0]) or (-1, ())):
            return None
        reads, writes = tuple(self._reads(i)), tuple(self._writes(i))
        kind = self._kind(i, reads, writes)
        flops = products.of_kernel(i) if kind in ("kernel", "attention") else products.flops(self._program, i)
        return Move(i, kind, times, reads, writes, flops)

    # Bytes.

    def _reads(self, i: Instruction) -> Iterator[Access]:
        shares = self._shares(i)
        for operand, share in zip(i.operands, shares, strict=True):
            for leaf in leaves(self._instructions[operand].shape_proto):
                if size := share * leaf.bytes:
                    yield Access(self._flow.value(operand, leaf.at), size, self._space(leaf.space))

    def _shares(self, i: Instruction) -> list[float]:
        """Of each operand, the part that is read."""
        if i.opcode == "fusion":
            updates = {update.id for update in self._updates(i).values()}
            need = _needs(self._flow, i.called[0], {}, updates)
            return [min(need.get(number, 0.0), 1.0) for number in range(len(i.operands))]
        shares = [1.0] * len(i.operands)
        if i.opcode in ("dynamic-slice", "gather"):
            shares[0] = min(1.0, _elements(i) / max(self._size(i.operands[0]), 1))
        elif i.opcode == "slice":
            shares[0] = _elements(i) / max(self._size(i.operands[0]), 1)
        elif self._updates(i):
            shares[0] = 0.0
        elif i.target in _PALLAS:
            given = [self._instructions[operand] for operand in i.operands]
            if any(operand.shape() == ("s32", (1,)) for operand in given):
                shares = [1 / o.shape()[1][0] if self._is_stack(o) else 1.0 for o in given]
        return shares

    def _is_stack(self, operand: Instruction) -> bool:
        origin = self._flow.origin(operand.id)[-1]
        argument = origin.opcode == "parameter" and origin.computation == self._program.entry
        return argument and len(operand.shape()[1]) > 2 and operand.shape()[1] == origin.shape()[1]

    def _writes(self, i: Instruction) -> Iterator[Access]:
        updates = self._updates(i)
        results = leaves(i.shape_proto)
        if i.opcode == "copy-start":
            results = [leaf for leaf in results if leaf.at == (0,)]
        elif i.opcode.endswith("-start") and any(leaf.at[:1] == (1,) for leaf in results):
            results = [leaf for leaf in results if leaf.at[:1] == (1,)]
        elif i.target.startswith("__cu"):  # what follows is its workspace
            results = [leaf for leaf in results if leaf.dtype not in ("u8", "s8") or leaf.at in ((), (0,))]
        for leaf in results:
            size = leaf.bytes
            if leaf.at in updates:
                update = updates[leaf.at]
                part = self._size(update.operands[2 if update.opcode == "scatter" else 1])
                size = leaf.bytes * min(1.0, part / max(leaf.elements, 1))
            if size:
                yield Access(self._flow.value(i.id, leaf.at), size, self._space(leaf.space))

    def _updates(self, i: Instruction) -> dict[Index, Instruction]:
        """{index of a result: the update that writes it in its operand's own place}."""
        found = {}
        for leaf in leaves(i.shape_proto) if i.opcode in ("fusion", "dynamic-update-slice", "scatter") else ():
            update = i if i.opcode == "scatter" else self._flow.update((i.id, leaf.at))
            key = self._flow.value(i.id, leaf.at)
            if update is None or key is None:
                continue
            target = self._flow.outside(update.operands[0])
            place = self._flow.places.get(key)
            apart = self._space(leaf.space) != "device"  # where the places of values are not known
            if target is not None and (apart or (place is not None and place == self._flow.places.get(target))):
                found[leaf.at] = update
        return found

    def _size(self, instruction: int) -> int:
        return _elements(self._instructions[instruction])

    def _space(self, number: int) -> str:
        if number == _HOST:
            return "host"
        return "chip" if number and self._program.platform == "tpu" else "device"

    # Kinds.

    def _kind(self, i: Instruction, reads: tuple[Access, ...], writes: tuple[Access, ...]) -> str:
        spaces = {access.space for access in (*reads, *writes) if access.bytes > _FEW}
        if i.opcode.startswith(_COLLECTIVES):
            return "collective"
        if "host" in spaces:
            return "host"
        if i.opcode == "custom-call":
            if "fmha" in i.target or _ATTENTION.search("/".join(i.op_name.split("/")[-2:])):
                return "attention"
            return "product" if i.target.startswith("__cu") else "kernel"
        computes = _computes(self._flow, i)
        if "dot" in computes or "convolution" in computes:
            return "product"
        if computes - _MOVES.keys() or all(access.bytes <= _FEW for access in writes):
            return "elementwise"
        if "chip" in spaces:
            return "on chip"
        if sum(access.bytes for access in reads) <= _FEW:
            return "fill"
        kind = next((kind for opcode, kind in _MOVES.items() if opcode in computes), "copy: whole")
        order = {_order(self._instructions[o]) for o in i.operands} | {_order(i)}
        if kind == "copy: whole" and i.opcode in ("copy", "copy-start") and len(order) > 1:
            return "copy: layout"
        return "copy: join" if kind == "fill" else kind


def _order(i: Instruction) -> tuple[int, ...]:
    return leaves(i.shape_proto)[0].order


def _computes(flow: Dataflow, i: Instruction) -> set[str]:
    """The opcodes of a fusion's (or an instruction's) own arrays; arithmetic on an index is none."""
    if i.opcode != "fusion":
        return {i.opcode}
    found = set()
    for inside in map(flow.program.instructions.__getitem__, flow.program.computations[i.called[0]][0]):
        if inside.opcode == "fusion":
            found |= _computes(flow, inside)
        elif inside.opcode not in _WITHIN and _elements(inside) > 1:
            found.add(inside.opcode)
    return found


def _elements(i: Instruction) -> int:
    return math.prod(i.shape()[1])


def _total(branch: list[Move]) -> float:
    return sum(move.times * access.bytes for move in branch for access in (*move.reads, *move.writes))


def _needs(flow: Dataflow, computation: int, of_root: dict[int, float], updates: set[int]) -> dict[int, float]:
    """{number of a parameter: the part of it that a fusion's results need}, slices summed.

    of_root: the part of the root that is needed: {} for all of it, {0: part} in a fusion within a fusion.
    updates: the dynamic-update-slices that write in place, and so read nothing of what they update.
    """
    ids, root = flow.program.computations[computation]
    instructions = flow.program.instructions
    need = dict.fromkeys(ids, 0.0) | {root: of_root.get(0, 1.0)}
    found: dict[int, float] = {}
    for i in map(instructions.__getitem__, reversed(ids)):  # users before what they use
        part = min(need[i.id], 1.0)
        if i.opcode == "parameter":
            found[i.number] = part
        elif i.opcode == "fusion" and part:
            inner = _needs(flow, i.called[0], {0: part}, updates)
            for number, operand in enumerate(i.operands):
                need[operand] += inner.get(number, 0.0)
        elif part:
            for number, operand in enumerate(i.operands):
                need[operand] += part * _operand_share(i, number, instructions[operand], i.id in updates)
    return found


def _operand_share(i: Instruction, number: int, operand: Instruction, in_place: bool) -> float:
    """How much of an operand it takes to have all of what a fusion's instruction yields."""
    if i.opcode in ("dynamic-slice", "slice", "gather", "broadcast") and number == 0:
        return _elements(i) / max(_elements(operand), 1)
    return 0.0 if in_place and number == 0 else 1.0
