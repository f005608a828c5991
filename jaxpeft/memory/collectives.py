"""What the devices of a partitioned program send each other: its collectives, loops counted by their trips.

A program is that of each device. Of a collective among n devices, over an array of S bytes (what is gathered, summed up
or exchanged: the whole of it, not a device's part), each device sends and receives

    all-gather, reduce-scatter, all-to-all     S (n - 1) / n
    all-reduce                                 2 S (n - 1) / n, as it is a reduce-scatter and an all-gather
    all-gather as an all-reduce                as much: so a TPU's compiler gathers over all three axes of a torus
    collective-permute                         S, what one device sends to another

which no algorithm is below. Groups are numbers of devices in the order of the program's mesh (`mesh.devices.flat`).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.hlo import Instruction
from jaxpeft.memory.shapes import array, leaves
from jaxpeft.memory.trips import trips
from jaxpeft.memory.wire import Message

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_OPCODES = {name: kind for kind in KINDS for name in (kind, f"{kind}-start")}
_OPCODES |= {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}
_CHAIN = b"chain_id"  # an attribute of all instructions that stand for one collective
_PAIRS, _LISTED, _NESTED, _AXES = 52, 49, 87, 93  # fields of HloInstructionProto


class Collective(NamedTuple):
    """One instruction.

    kind: one of KINDS.  name, op_name: of the instruction.
    shapes: (dtype, dimensions) of what a device gives.
    group: numbers of devices that take part together, the first such group; of a permutation a sender and a receiver.
    bytes: of the whole array, each time.  times: that it runs in a call of the program.
    summed: whether an all-gather is carried out as an all-reduce, each device's part among zeros, which sends as much.
    """

    kind: str
    name: str
    op_name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group: tuple[int, ...]
    bytes: float
    times: int
    summed: bool = False

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all times together."""
        n = len(self.group)
        part = 1.0 if self.kind == "collective-permute" else (n - 1) / n
        return self.times * self.bytes * part * (2 if self.summed or self.kind == "all-reduce" else 1)


def collectives(flow: Dataflow, devices: int) -> tuple[tuple[Collective, ...], int]:
    """(the collectives of a program for so many devices, the number of loops around some whose length nothing says).

    The bodies of such loops count once; of the branches of a conditional the one that sends most counts. Collectives of
    a device with itself are left out.
    """
    walk = _Walk(flow, devices)
    found = tuple(walk.computation(flow.program.entry, 1))
    return found, len(walk.unknown)


def by_kind(found: tuple[Collective, ...]) -> dict[str, dict[str, float]]:
    """{kind: {"times", "bytes" (of the whole arrays), "sent" (by each device)}}, of the kinds that there are."""
    total: dict[str, dict[str, float]] = defaultdict(lambda: {"times": 0, "bytes": 0.0, "sent": 0.0})
    for one in found:
        row = total[one.kind]
        row["times"] += one.times
        row["bytes"] += one.times * one.bytes
        row["sent"] += one.sent
    return {kind: total[kind] for kind in KINDS if kind in total}


class _Walk:
    def __init__(self, flow: Dataflow, devices: int):
        self._flow, self._devices = flow, devices
        self._instructions, self._computations = flow.program.instructions, flow.program.computations
        self.unknown: set[int] = set()

    def computation(self, computation: int, times: int) -> Iterator[Collective]:
        for i in map(self._instructions.__getitem__, self._computations[computation][0]):
            if i.opcode == "while":
                count = trips(self._flow, i)
                inside = list(self.computation(self._flow.body(i), times * (1 if count is None else count)))
                if inside and count is None:
                    self.unknown.add(i.id)
                yield from inside
            elif i.opcode in ("call", "async-start", "fusion"):
                scattered = i.opcode == "fusion" and self._sliced(i)
                for one in self.computation(i.called[0], times):
                    yield one._replace(kind="reduce-scatter") if scattered and one.kind == "all-reduce" else one
            elif i.opcode == "conditional":
                branches = [list(self.computation(branch, times)) for branch in i.called]
                yield from max(branches, key=lambda branch: sum(one.sent for one in branch))
            elif (kind := _OPCODES.get(i.opcode)) is not None and self._begins(i):
                if len((one := self._collective(i, kind, times)).group) > 1:
                    yield one

    def _begins(self, i: Instruction) -> bool:
        """Whether it does not go on with what a TPU's program has begun elsewhere, beside what a fusion computes."""
        if _CHAIN not in i.proto:
            return True
        beside = map(self._instructions.__getitem__, self._computations[i.computation][0])
        return any(other.target == "AsyncCollectiveStart" and i.id in other.operands for other in beside)

    def _sliced(self, fusion: Instruction) -> bool:
        """Whether of what a fusion sums up it yields a slice: so a TPU's compiler writes a reduce-scatter."""
        root = self._instructions[self._computations[fusion.called[0]][1]]
        while root.opcode in ("bitcast", "copy", "convert", "reshape"):
            root = self._instructions[root.operands[0]]
        return root.opcode == "dynamic-slice"

    def _collective(self, i: Instruction, kind: str, times: int) -> Collective:
        permutes = kind == "collective-permute"
        given = [self._instructions[operand].shape_proto for operand in i.operands[: 1 if permutes else None]]
        shapes = tuple(array(shape, leaf.at) for shape in given for leaf in leaves(shape))
        size = sum(leaf.content for shape in given for leaf in leaves(shape))
        group = _group(Message(i.proto), self._devices, permutes)
        if kind == "all-reduce" and all(map(self._among_zeros, i.operands)):
            return Collective("all-gather", i.name, i.op_name, shapes, group, size, times, summed=True)
        whole = size * len(group) if kind == "all-gather" else size
        return Collective(kind, i.name, i.op_name, shapes, group, whole, times)

    def _among_zeros(self, operand: int) -> bool:
        """Whether an array is a part that has been put into one of a constant."""
        update = self._flow.update((operand, ()))
        return update is not None and self._flow.origin(update.operands[0])[-1].opcode in ("broadcast", "constant")


def _group(message: Message, devices: int, permutes: bool) -> tuple[int, ...]:
    """The first of a collective's largest groups."""
    if permutes:
        pairs = ((pair.number(1), pair.number(2)) for pair in message.messages(_PAIRS))
        return next((pair for pair in pairs if pair[0] != pair[1]), ())
    if message.raw(_AXES):
        return _of_axes(message.message(_AXES))
    nested = message.message(_NESTED)
    listed = [group.numbers(1) for group in (*message.messages(_LISTED), *nested.messages(1))]
    if listed:
        return max(listed, key=len)
    if nested.raw(2):
        return _of_iota(nested.message(2))
    return tuple(range(devices))


def _of_axes(message: Message) -> tuple[int, ...]:
    """The first group of a MeshAxesReplicaGroupListProto: a mesh, and the axes (or parts of them) of a group."""
    mesh = message.message(1)
    sizes = [axis.number(2) for axis in mesh.messages(1)]
    ids = np.asarray(mesh.numbers(2) or range(math.prod(sizes))).reshape(sizes)
    chosen: list[Any] = [[0]] * len(sizes)
    for axis in message.messages(2):
        number = axis.number(1)
        if axis.raw(2):  # a part: the axis is (before, part, after)
            before, part = axis.message(2).number(1), axis.message(2).number(2)
            step = sizes[number] // (before * part)
            chosen[number] = sorted({a + b * step for a, b in itertools.product(chosen[number], range(part))})
        else:
            chosen[number] = range(sizes[number])
    return tuple(int(n) for n in ids[np.ix_(*chosen)].ravel())


def _of_iota(message: Message) -> tuple[int, ...]:
    """The first group of an IotaReplicaGroupListProto: devices in a transposed order, cut into groups."""
    ids = np.arange(message.number(1) * message.number(2)).reshape(message.numbers(3))
    return tuple(int(n) for n in ids.transpose(message.numbers(4)).ravel()[: message.number(2)])
