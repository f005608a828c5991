"""Whose a buffer is: categories, module paths and activation names. See `jaxpeft.memory.profile`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.memory import hlo, name_stack
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.hlo import Instruction
from jaxpeft.memory.owners import ACTIVATIONS, Buffer, Owner, Owners


class Attribution:
    """The owner of every buffer of a program."""

    _least_axes = 2  # of an array whose shape says that it is of a leaf

    def __init__(self, program: hlo.Program, flow: Dataflow, owners: Owners):
        self._program, self._flow, self._owners = program, flow, owners
        self._instructions = program.instructions
        self._position = {name: position for position, name in enumerate(program.order)}
        self._arguments = self._match_arguments()
        self._modules = _modules(owners)
        self._activations = [(re.compile(p), name) for p, name in (*owners.activations, *ACTIVATIONS)]
        self._loss = re.compile(owners.loss)
        self._trainable = self._find_trainable()
        self._loss_loops = self._find_loss_loops()
        backward = [
            self._position.get(i.name, -1)
            for i in program.instructions.values()
            if name_stack.phase(i.op_name) == "backward"
        ]
        self._backward = min((p for p in backward if p >= 0), default=len(program.order)), max(backward, default=-1)

    def _find_trainable(self) -> dict[tuple[int, ...], set[str]]:
        """The shapes of trainable leaves, and their paths."""
        arguments = self._owners.arguments
        leaves = {owner.path for owner in arguments if owner.category in ("weights", "adapters")}
        trained = {owner.category for owner in arguments} & {"adapters", "optimizer"} or {"weights"}
        found: dict[tuple[int, ...], set[str]] = {}
        for i in self._instructions.values():
            if (owner := self._argument(i)) and (owner.category in trained or owner.moved):
                paths = found.setdefault(without_ones(i.shape()[1]), set())
                paths |= {own for own in leaves if owner.path == own or owner.path.endswith(f"/{own}")}
        return found

    def _match_arguments(self) -> dict[int, Owner]:
        """{parameter number: owner}; jit drops arguments that nothing reads, so that numbers can be fewer."""
        owners = self._owners
        ids, _ = self._program.computations[self._program.entry]
        parameters = {i.number: i for i in map(self._instructions.__getitem__, ids) if i.opcode == "parameter"}
        if len(parameters) == len(owners.arguments):
            return {number: owners.arguments[number] for number in parameters}
        by_name = dict(zip(owners.names, owners.arguments, strict=True)) if owners.names else {}
        matched = {}
        for number, parameter in parameters.items():
            name = next((name for name in by_name if parameter.op_name.endswith(name)), None)
            if name is None:
                raise InputError(
                    f"{self._program.name}: owners name {len(owners.arguments)} arguments, the compiled function has "
                    f"{len(parameters)}, and its {parameter.op_name or parameter.name!r} is none of them"
                )
            matched[number] = by_name[name]
        return matched

    def _argument(self, instruction: Instruction) -> Owner | None:
        if instruction.opcode != "parameter" or instruction.computation != self._program.entry:
            return None
        return self._arguments.get(instruction.number)

    def _find_loss_loops(self) -> set[int]:
        """Loops whose own instructions belong to the loss, none around the layers (as of micro-batches)."""
        found, around = set(), set()
        # Scalars are left out: functions of reductions are shared, and named after whoever came first.
        for instruction in (i for i in self._instructions.values() if i.shape()[1]):
            if self._loss.search(name_stack.without_root(instruction.op_name)):
                found |= {loop.id for loop in self._flow.loops(instruction)[:1]}
            elif tree.stacked(tree.canonical(self._module(instruction.op_name))):
                around |= {loop.id for loop in self._flow.loops(instruction)}
        return found - around

    # Arguments, results, constants.

    def allocation(self, allocation: hlo.Allocation, end: int) -> Buffer:
        """The buffer of an allocation that is not of temporaries."""
        if allocation.kind == "parameter":
            owner = self._arguments[allocation.parameter]
            return self._fixed(allocation, owner, f"parameter {allocation.parameter}", end)
        if allocation.kind == "constant":
            return self._fixed(allocation, Owner("constants"), "constant", end)
        root = self._program.computations[self._program.entry][1]
        count = len(self._instructions[root].operands) if self._is_tuple(root) else 1
        if count != len(self._owners.outputs):
            known = len(self._owners.outputs)
            raise InputError(f"{self._program.name}: owners name {known} results, the compiled function has {count}")
        held = {self._flow.group(v.key) for v in self._program.values if v.allocation == allocation.number}
        for number, owner in enumerate(self._owners.outputs):
            key = self._flow.value(root, (number,) if self._is_tuple(root) else ())
            if key is not None and self._flow.group(key) in held:
                return self._fixed(allocation, self._result(owner, key), f"result {number}", end, key)
        return self._fixed(allocation, Owner("workspace"), "table of results", end)

    def _result(self, owner: Owner, key: hlo.Key) -> Owner:
        """What a result is, which the caller calls `owner`."""
        return owner

    def _is_tuple(self, instruction: int) -> bool:
        return self._instructions[instruction].shape()[0] == "tuple"

    def _fixed(self, allocation, owner, name, end, key=None) -> Buffer:
        key = key or next((v.key for v in self._program.values if v.allocation == allocation.number), None)
        shape = _shape_text(self._instructions[key[0]], key[1]) if key else ""
        return Buffer(allocation.bytes, name, shape, "", 0, end, owner.category, owner.path)

    # Temporaries.

    def temporary(self, group: hlo.Key, pieces: list[tuple[int, int, int]]) -> Buffer:
        """The buffer of a group of temporaries, live in `pieces` (bytes, first, last)."""
        flow = self._flow
        writers = flow.writers(group) or flow.members[group]
        size = max(piece[0] for piece in pieces)
        key = max(writers, key=lambda key: len(name_stack.words(self._best_name(key)[0])))
        op_name, origin = self._best_name(key)
        writer = self._instructions[key[0]]
        trail = [i for w in (key, *writers) for i in flow.origin(*w)]
        names = [*(i.op_name for i in trail), op_name, writer.op_name]
        scopes: dict[str, str] = {}
        for kind, name in (scope for found in names for scope in name_stack.SCOPE.findall(found)):
            scopes.setdefault(kind, name)  # the nearest
        module, activation = self._module(op_name), self._activation(op_name)
        category = self._category(group, writers, origin, op_name, scopes)
        alike = self._trainable.get(without_ones(writer.shape(key[1])[1]), set())
        if "grad" in scopes:
            module, activation = scopes["grad"], ""
        elif category == "gradients" and len(alike) == 1:
            module, activation = next(iter(alike)), ""
        elif category == "gradients":
            module, activation = self._summed(writers) or module, ""
        elif named := scopes.get("save", scopes.get("read")):
            module, activation = self._known(module) or self._site(named), named
        elif owner := self._argument(origin):
            module, activation = owner.path, ""
        elif any("/stream/" in name for name in names):
            module, activation = self._known(module), "stream"
        elif category != "saved activations" and writer.opcode != "dynamic-slice":
            activation = ""
        if activation in (parts := module.split("/")):
            module = "/".join(parts[: parts.index(activation) + 1])
        text = _shape_text(writer, key[1])
        first, last = min(piece[1] for piece in pieces), max(piece[2] for piece in pieces)
        return Buffer(size, writer.name, text, op_name, first, last, category, module, activation)

    def array(self, group: hlo.Key) -> str:
        """The category of an array wherever it is kept; what is copied along a loop's state is what it was before."""
        for instruction, _ in self._flow.members[group]:
            if owner := self._argument(self._instructions[instruction]):
                return owner.category
        return self.temporary(group, [(1, 0, 0)]).category

    def module(self, op_name: str) -> str:
        """The module that a name stack tells of, or ""; what is kept or summed up is of the module that it is for."""
        for kind, name in name_stack.SCOPE.findall(op_name):
            if path := name if kind == "grad" else self._site(name):
                return self._known(path)
        return self._known(self._module(op_name)) if name_stack.words(op_name) else ""

    def site(self, instruction: Instruction, key: hlo.Key | None) -> str:
        """The module that an instruction works for where it yields `key`, which says so where its name does not."""
        names = [instruction.op_name]
        if key is not None and instruction.opcode == "fusion" and key[1]:  # one of several results
            names = [i.op_name for i in self._flow.origin(*key)] + names
        if found := next(filter(None, map(self.module, names)), ""):
            return found
        return "" if key is None else self._known(self.temporary(self._flow.group(key), [(1, 0, 0)]).module)

    def _best_name(self, key: hlo.Key) -> tuple[str, Instruction]:
        """(the most telling op_name of what a value passed through, the instruction that computed it).

        What XLA adds has no metadata: then the name is that of its operands, else of its readers.
        """
        trail = self._flow.origin(*key)
        origin = trail[-1]
        casts = [i for i in trail if i.opcode == "convert"]  # a copy in another type belongs to who asked for it
        for instruction in (*casts, origin, *reversed(trail), self._instructions[key[0]]):
            if name_stack.words(instruction.op_name) and instruction.opcode != "parameter":
                return instruction.op_name, origin
        if self._argument(origin):
            return origin.op_name, origin
        named = [i.op_name for i in (*reversed(trail), self._instructions[key[0]]) if i.op_name]
        if not named:
            near = [self._instructions[o] for i in (origin, self._instructions[key[0]]) for o in i.operands]
            near += self._flow.readers.get(self._flow.group(key), [])
            named = [i.op_name for i in near if i.op_name]
            named += [i.op_name for o in near for i in self._flow.origin(o.id) if i.op_name]
        return (named[0] if named else ""), origin

    def _category(self, group, writers, origin, op_name, scopes) -> str:
        flow = self._flow
        instructions = [self._instructions[key[0]] for key in writers]
        rows = any(flow.update(key) is not None for key in writers)
        shape = self._instructions[writers[0][0]].shape(writers[0][1])[1]
        like_leaf = len(shape) >= self._least_axes and without_ones(shape) in self._trainable
        # Gone after one step of the backward loop.
        passing = any(
            name_stack.phase(loop.op_name) == "backward" for i in instructions for loop in flow.loops(i)
        ) and not any(self._instructions[key[0]].opcode == "while" for key in flow.members[group])
        if "grad" in scopes:
            return "gradients" if rows or like_leaf or not passing else "workspace"
        if "save" in scopes and (rows or any("save:" in i.op_name for i in instructions)):
            return "saved activations"
        if any(self._instruction_phase(i) == "forward" for w in writers if (i := self._kept_elsewhere(w))):
            return "saved activations"
        if not op_name:
            return "unattributed"
        phases = {self._instruction_phase(i) for i in instructions}
        trained = like_leaf and not passing and not self._argument(origin) and self._outlives(group)
        if trained and "backward" in phases:
            return "gradients"
        loops = [loop.id for i in instructions for loop in flow.loops(i)[:1]]
        if self._is_loss(op_name) or any(loop in self._loss_loops for loop in loops):
            return "loss"
        if self._argument(origin):
            return "workspace"  # a copy of an argument
        if "backward" not in phases and "forward" in phases and shape:  # a scalar is a loop's counter
            saved = any(self._instruction_phase(i) == "backward" for i in flow.readers.get(group, []))
            return "saved activations" if saved else "workspace"
        return "optimizer" if trained and "after" in phases else "workspace"

    def _outlives(self, group: hlo.Key) -> bool:
        """Whether an array of a leaf's shape can be more than the backward pass's own: its users' layout says so."""
        return True

    def _is_loss(self, op_name: str) -> bool:
        return self._loss.search(name_stack.without_root(op_name)) is not None

    def _kept_elsewhere(self, key: hlo.Key) -> Instruction | None:
        """The update that filled the array of which a value is a whole copy, if it is one.

        A CPU's compiler casts whole stacks before the loop that reads them; a TPU's moves them between its memories.
        """
        size = math.prod(self._instructions[key[0]].shape(key[1])[1])
        if self._flow.update(key) is not None:
            return None
        for step in self._flow.origin(*key):
            if step.opcode == "dynamic-update-slice":
                return step if math.prod(step.shape()[1]) == size else None
        return None

    def _instruction_phase(self, instruction: Instruction) -> str:
        """forward, backward, after (both) or ""; of what carries no mark, the phase of its loop or its position."""
        for around in (instruction, *self._flow.loops(instruction)):
            if phase := name_stack.phase(around.op_name):
                return phase
        position = self._position.get(instruction.name)
        if position is None or not self._backward[1] >= 0:
            return ""
        first, last = self._backward
        return "forward" if position < first else "backward" if position <= last else "after"

    def _module(self, op_name: str) -> str:
        """The module path in a name stack, completed to a path of the parameters where that is possible."""
        words = name_stack.words(op_name)
        classes = [word for word in words if word[0].isupper()]
        path = "/".join(word for word in words if not word[0].isupper())
        if not path:
            return "/".join(_ROOTS.get(name, name) for name in classes[:1])
        words = path.split("/")
        for count in range(len(words), 0, -1):  # scopes below the last module stay
            module = "/".join(words[:count])
            for known in self._modules:
                if f"/{known}".endswith(f"/{module}"):
                    return "/".join([known, *words[count:]])
        return path

    def _summed(self, writers: Sequence[hlo.Key]) -> str:
        """The path of the gradient that an accumulator of micro-batches adds up, or ""."""
        nearest, seen = [self._flow.origin(*key)[-1] for key in writers], set[int]()
        while nearest and len(seen) < 50:
            instruction = nearest.pop(0)
            for trail in [self._flow.origin(operand) for operand in instruction.operands]:
                for step in trail:
                    if found := [path for kind, path in name_stack.SCOPE.findall(step.op_name) if kind == "grad"]:
                        return found[0]
                if trail and trail[-1].id not in seen:
                    seen.add(trail[-1].id)
                    nearest.append(trail[-1])
        return ""

    def _known(self, module: str) -> str:
        """A module path without the scopes below the last module that has parameters (such as a kernel's name)."""
        found = [path for path in self._modules if f"{module}/".startswith(f"{path}/")]
        return max(found, key=len, default=module)

    def _site(self, name: str) -> str:
        """The only module of a name, or ""."""
        found = [path for path in self._modules if path.endswith(f"/{name}")]
        return found[0] if len(found) == 1 else ""

    def _activation(self, op_name: str) -> str:
        for pattern, name in self._activations:
            if (found := pattern.search(op_name)) and not name_stack.HOW.fullmatch(found.expand(name)):
                return found.expand(name)
        return ""


# Flax calls the outermost module by its class; ours hold these parameters.
_ROOTS = {"Block": "layers", "Head": "head", "Embed": "embed_tokens"}


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that matter, in an order that no transposition changes."""
    return tuple(sorted(n for n in shape if n > 1))


def _shape_text(instruction: Instruction, index: hlo.Index) -> str:
    kind, dims = instruction.shape(index)
    return f"{kind}[{','.join(map(str, dims))}]"


def _modules(owners: Owners) -> list[str]:
    """Every module path above a parameter, shortest first."""
    found = set()
    for owner in owners.arguments:
        if owner.category in ("weights", "adapters"):
            parts = tree.canonical(owner.path).split("/")
            found |= {"/".join(parts[:n]) for n in range(1, len(parts))}
    return sorted(found, key=lambda path: (path.count("/"), path))
