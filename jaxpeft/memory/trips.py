"""How often a compiled loop runs its body: what XLA has written beside it, or what its condition compares."""

from __future__ import annotations

import functools
import re

from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.hlo import Index, Instruction
from jaxpeft.memory.wire import Message

_KNOWN = re.compile(rb'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_SAME = ("copy", "bitcast", "convert", "reshape", "broadcast")  # of a scalar
_CONFIG, _DIRECTION, _LITERAL = 43, 63, 8  # fields of HloInstructionProto


def trips(flow: Dataflow, loop: Instruction) -> int | None:
    """How often a while runs its body; None where neither XLA nor the condition says.

    A condition is `counter < bound` (or <=, or the other way round) of a counter that goes by a constant, by one where
    the body does not tell: a loop that XLA has unrolled goes by more.
    """
    if found := _KNOWN.search(Message(loop.proto).raw(_CONFIG)):
        return int(found[1])
    a, b = loop.called[:2]
    condition = b if flow.body(loop) == a else a
    root = flow.program.instructions[flow.program.computations[condition][1]]
    while root.opcode in ("fusion", *_SAME):
        inside = flow.program.computations[root.called[0]][1] if root.opcode == "fusion" else root.operands[0]
        root = flow.program.instructions[inside]
    if root.opcode != "compare":
        return None
    first, last = (_constant(flow, operand) for operand in root.operands[:2])
    if first is None or last is None:
        return None
    direction = Message(root.proto).text(_DIRECTION)
    way = {"LT": last - first, "LE": last - first + 1, "GT": first - last, "GE": first - last + 1}.get(direction)
    return None if way is None else max(-(-way // _stride(flow, loop, root.operands[0])), 0)


def _stride(flow: Dataflow, loop: Instruction, counter: int) -> int:
    """By how much a scalar of the loop's state, as its condition reads it, goes with each turn, up or down."""
    instructions = flow.program.instructions
    of = instructions[counter]
    while of.opcode in (*_SAME, "parameter"):
        if of.opcode != "parameter":
            of = instructions[of.operands[0]]
            continue
        caller = flow.caller.get(of.computation)
        if caller is None or caller.opcode != "fusion":
            return 1
        of = instructions[caller.operands[of.number]]
    root = instructions[flow.program.computations[flow.body(loop)][1]]
    if of.opcode != "get-tuple-element" or root.opcode != "tuple":
        return 1
    after = instructions[root.operands[of.number]]
    while after.opcode in ("fusion", *_SAME):
        inside = after.opcode == "fusion" and flow.program.computations[after.called[0]][1]
        after = instructions[inside or after.operands[0]]
    if after.opcode not in ("add", "subtract"):
        return 1
    found = [abs(step) for step in map(functools.partial(_written, flow), after.operands) if step]
    return found[0] if len(found) == 1 else 1


def _written(flow: Dataflow, instruction: int) -> int | None:
    """The integer of a constant, which a fusion may be given; None for anything else."""
    of = flow.program.instructions[instruction]
    caller = flow.caller.get(of.computation)
    if of.opcode == "parameter" and caller is not None and caller.opcode == "fusion":
        return _written(flow, caller.operands[of.number])
    if of.opcode in _SAME:
        return _written(flow, of.operands[0])
    return _literal(of) if of.opcode == "constant" else None


def _constant(flow: Dataflow, instruction: int, index: Index = ()) -> int | None:
    """The integer that a scalar is before the loop, whose state it may be in."""
    for _ in range(1000):
        of = flow.program.instructions[instruction]
        if of.opcode == "constant":
            return _literal(of)
        caller = flow.caller.get(of.computation)
        if of.opcode == "get-tuple-element":
            instruction, index = of.operands[0], (of.number, *index)
        elif of.opcode == "tuple" and index:
            instruction, index = of.operands[index[0]], index[1:]
        elif of.opcode in _SAME:
            instruction = of.operands[0]
        elif of.opcode == "parameter" and caller is not None and caller.opcode in ("while", "fusion", "call"):
            instruction = caller.operands[0 if caller.opcode == "while" else of.number]
        else:
            return None
    return None


def _literal(constant: Instruction) -> int | None:
    if not constant.proto:
        return None
    literal = Message(constant.proto).message(_LITERAL)
    for field in (4, 5, 6, 7):  # s32, s64, u32, u64
        if numbers := literal.numbers(field):
            return numbers[0] - (1 << 64) if numbers[0] >> 63 else numbers[0]
    # An integer that is zero may be left out.
    return None if literal.raw(8) else 0
