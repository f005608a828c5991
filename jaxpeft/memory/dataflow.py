"""Which arrays of a compiled function are one array, what wrote them, and who reads them.

After XLA's buffer assignment a loop's state lives in one place: the initial value, the parameter of the loop's body,
what the body yields and what the loop yields share a buffer, and a dynamic-update-slice writes into it. Such values
form a group. The layers' activations that a scan saves are a group: allocated before the forward loop, written there
row by row, read in the backward loop.
"""

from __future__ import annotations

import functools
from collections import defaultdict

from jaxpeft.memory.hlo import Index, Instruction, Key, Program

# Yield (a part of) their first operand as it is, or moved.
_ALIASES = ("bitcast", "optimization-barrier", "add-dependency", "domain", "copy-done", "async-done", "async-update")
_MOVES = (*_ALIASES, "copy", "copy-start", "reshape", "transpose", "dynamic-slice", "slice", "convert")
_PIECES = ("ConcatBitcast",)  # a TPU's array that was copied in pieces
_WIRING = ("get-tuple-element", "tuple", "while", "call", "parameter", "conditional", *_ALIASES)


class Dataflow:
    """Groups of values that share a buffer, and the questions that attribution asks about them."""

    def __init__(self, program: Program):
        self.program = program
        self._instructions = program.instructions
        self._keys = program.defined
        self._parent: dict[Key, Key] = {}
        self.caller = {  # computation -> the instruction that calls it
            called: instruction for instruction in self._instructions.values() for called in instruction.called
        }
        self._parameters = {
            (i.computation, i.number): i.id for i in self._instructions.values() if i.opcode == "parameter"
        }
        self._unite_loops()
        self._unite_updates()

    # Groups.

    def group(self, key: Key) -> Key:
        """The representative of the group that holds a value."""
        path = []
        while (up := self._parent.get(key, key)) != key:
            path.append(key)
            key = up
        for step in path:
            self._parent[step] = key
        return key

    def unite(self, a: Key | None, b: Key | None) -> None:
        """Says that two values share a buffer."""
        if a is not None and b is not None and (a := self.group(a)) != (b := self.group(b)):
            self._parent[max(a, b)] = min(a, b)

    def value(self, instruction: int, index: Index = ()) -> Key | None:
        """The value found at (instruction, index), followed to what defines it; None where there is none."""
        for _ in range(10_000):
            if (instruction, index) in self._keys:
                return instruction, index
            step = self._source(self._instructions[instruction], index)
            if step is None:
                return None
            instruction, index = step
        return None

    def _source(self, of: Instruction, index: Index) -> Key | None:
        if of.opcode == "get-tuple-element":
            return of.operands[0], (of.number, *index)
        if of.opcode == "tuple":
            return (of.operands[index[0]], index[1:]) if index else None
        if of.opcode == "copy-done":
            return of.operands[0], (0, *index)
        if of.opcode == "async-done":
            return of.operands[0], (1, *index)
        if of.opcode == "async-start" and index[:1] == (1,):  # (operands, result, ...) of what is called
            return self._root(of.called[0]), index[1:]
        if of.opcode == "while" or of.opcode in _ALIASES:
            return of.operands[0], index
        if of.opcode == "call":
            return self._root(of.called[0]), index
        caller = self.caller.get(of.computation)
        if of.opcode == "parameter" and caller is not None:
            return (caller.operands[0 if caller.opcode == "while" else of.number], index) if caller.operands else None
        return None

    def _root(self, computation: int) -> int:
        return self.program.computations[computation][1]

    def body(self, loop: Instruction) -> int:
        """The computation that a while repeats."""
        a, b = loop.called[:2]
        return b if self._instructions[self._root(a)].shape()[0] == "pred" else a

    def _unite_loops(self) -> None:
        for loop in [i for i in self._instructions.values() if i.opcode == "while"]:
            parameters = [self._parameters[(called, 0)] for called in loop.called[:2]]
            places = [loop.id, *parameters]
            for index in {index for (at, index) in self._keys if at in places}:
                first = self.value(loop.operands[0], index)
                for place in (*places, self._root(self.body(loop))):
                    self.unite(first, self.value(place, index))
        for call in [i for i in self._instructions.values() if i.opcode == "conditional"]:
            for index in {index for (at, index) in self._keys if at == call.id}:
                for branch in call.called:
                    self.unite((call.id, index), self.value(self._root(branch), index))

    def _unite_updates(self) -> None:
        for key in self._keys:
            update = self.update(key)
            if update is None:
                continue
            target = self.outside(update.operands[0])
            if target is not None and self.places.get(target) == self.places.get(key):
                self.unite(target, key)

    @functools.cached_property
    def places(self) -> dict[Key, tuple[int, int]]:
        """(allocation, offset) of the values in device memory."""
        return {value.key: (value.allocation, value.offset) for value in self.program.values}

    def update(self, key: Key) -> Instruction | None:
        """The dynamic-update-slice that yields a value, in a fusion or before a copy too; None if something else does.

        A TPU's compiler may keep a small array in VMEM through a loop's body and copy it back at the end.
        """
        instruction, index = self._instructions[key[0]], key[1]
        for _ in range(100):
            if instruction.opcode == "dynamic-update-slice":
                return instruction
            if instruction.opcode == "fusion":
                instruction = self._instructions[self._root(instruction.called[0])]
            elif instruction.opcode == "tuple" and index:
                instruction, index = self._instructions[instruction.operands[index[0]]], index[1:]
            elif instruction.opcode == "get-tuple-element":
                instruction, index = self._instructions[instruction.operands[0]], (instruction.number, *index)
            elif instruction.opcode in ("copy-start", "copy-done", "bitcast", "convert", "copy", "reshape"):
                instruction, index = self._instructions[instruction.operands[0]], ()
            else:
                return None
        return None

    def outside(self, instruction: int) -> Key | None:
        """The value that an operand inside a fusion stands for."""
        of = self._instructions[instruction]
        for _ in range(100):
            caller = self.caller.get(of.computation)
            if of.opcode == "parameter" and caller is not None and caller.opcode == "fusion":
                of = self._instructions[caller.operands[of.number]]
            elif of.opcode in ("bitcast", "convert", "copy", "reshape") and (of.id, ()) not in self._keys:
                of = self._instructions[of.operands[0]]
            else:
                break
        return self.value(of.id)

    # Who reads, who wrote.

    @functools.cached_property
    def members(self) -> dict[Key, list[Key]]:
        """The values of each group, by its representative; final once nothing more is united."""
        members: dict[Key, list[Key]] = defaultdict(list)
        for key in sorted(self._keys):
            members[self.group(key)].append(key)
        return members

    @functools.cached_property
    def readers(self) -> dict[Key, list[Instruction]]:
        """The instructions that read each group."""
        readers: dict[Key, list[Instruction]] = defaultdict(list)
        inside = {i.called[0] for i in self._instructions.values() if i.opcode == "fusion"}
        for instruction in self._instructions.values():
            if instruction.opcode in _WIRING or instruction.computation in inside:
                continue
            for operand in instruction.operands:
                key = self.value(operand)
                if key is not None:
                    readers[self.group(key)].append(instruction)
        return readers

    def writers(self, group: Key) -> list[Key]:
        """The values of a group that something writes: rows put into a loop's array if there are any, else all."""
        made = [key for key in self.members[group] if self._instructions[key[0]].opcode not in _WIRING]
        rows = [key for key in made if self.update(key) is not None]
        return rows or made

    def loops(self, instruction: Instruction) -> list[Instruction]:
        """The loops around an instruction, innermost first."""
        found = []
        caller = self.caller.get(instruction.computation)
        while caller is not None:
            if caller.opcode == "while":
                found.append(caller)
            caller = self.caller.get(caller.computation)
        return found

    def origin(self, instruction: int, index: Index = ()) -> list[Instruction]:
        """The instructions that a value passed through, the one that computed it last.

        Copies, casts, slices, fusions and loops are followed; a value that a loop's body only reads or moves is
        followed to before the loop. The last may be a parameter of the entry computation.
        """
        trail: list[Instruction] = []
        seen = set()
        before: list[Key] = []  # where the loops that were entered began
        while True:
            if (instruction, index) in seen:  # the body hands on what it was given
                if not before:
                    return trail
                instruction, index = before.pop()
                continue
            seen.add((instruction, index))
            of = self._instructions[instruction]
            loop = of if of.opcode == "while" else self.caller.get(of.computation) if of.opcode == "parameter" else None
            if loop is not None and loop.opcode == "while":
                before.append((loop.operands[0], index))
                step: Key | None = (self._root(self.body(loop)), index)
            elif of.opcode in _WIRING and of.opcode not in _MOVES:
                step = self._source(of, index)
            elif of.opcode in ("fusion", "async-start"):
                step = self._inside(of, index)
            else:
                trail.append(of)
                if of.opcode == "dynamic-update-slice":
                    step = of.operands[1], ()
                elif of.operands and (of.opcode in _MOVES or of.target in _PIECES):
                    step = self._source(of, index) or (of.operands[0], ())
                else:
                    return trail
            if step is None:
                return [*trail, of]
            instruction, index = step

    def _inside(self, of: Instruction, index: Index) -> Key:
        """What yields a result of a fusion, or of an operation that was started: (operands, result, ...)."""
        if of.opcode == "async-start" and index[:1] != (1,):
            return of.operands[index[1] if len(index) > 1 else 0], index[2:]
        return self._root(of.called[0]), index[1:] if of.opcode == "async-start" else index
