"""Owners in programs that know nothing of this library: from their arguments' paths, name scopes and lines of code.

Nothing of our models' layout is assumed. A module is the scopes of the name stack as they stand; where there are none,
the line of the user's code. A gradient is an array of a trained leaf's shape that the backward pass writes and that
something outside of it reads; what only the backward pass reads is its workspace, whatever its shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from jaxpeft.errors import InputError
from jaxpeft.memory import hlo, name_stack
from jaxpeft.memory.attribution import Attribution, without_ones
from jaxpeft.memory.hlo import Instruction
from jaxpeft.memory.owners import CATEGORIES, Buffer, Owner, Owners

Categories = Callable[[str], str | None]

_GUESSES = (  # a word of the path -> its category; the first that matches
    (r"opt_state|optimizer_state|mu|nu", "optimizer"),
    (r"grads|gradients", "gradients"),
    (r"lora.*|adapters?", "adapters"),
    (r"params|trainable|frozen|weights", "weights"),
    (r"batch", "batch"),
    (r"(kv_)?cache", "cache"),
)
_LEAVES = re.compile(r".+/(kernel|bias|scale|embedding)(/value)?")  # as Flax calls parameters
_LOSS = re.compile(r"\w*loss|\w*cross_entropy\w*")
_KEY = re.compile(r"\.(\w+)|\[(?:'([^']*)'|\"([^\"]*)\"|<flat index (\d+)>|([^\]]*))\]")


def guess(path: str) -> str:
    """The category of an argument by its path, such as state/params/dense/kernel; "arguments" where none is known."""
    words = path.split("/")
    for pattern, category in _GUESSES:
        if any(re.fullmatch(pattern, word) for word in words):
            return category
    return "weights" if _LEAVES.fullmatch(path) else "arguments"


def category(path: str, categories: Categories | None = None) -> str:
    """The category of a path: what `categories` says; what it leaves open (None) is guessed.

    Raises:
      InputError: for a category that is not known.
    """
    said = categories(path) if categories is not None else None
    if said is None:
        return guess(path)
    if said not in CATEGORIES:
        raise InputError(f"categories({path!r}) is {said!r}: must be None or one of {', '.join(CATEGORIES)}")
    return said


def path_of(name: str) -> str:
    """An argument's name as JAX writes it, as a path: state.params['dense']['kernel'] -> state/params/dense/kernel."""
    first = re.match(r"\w*", name)
    words = [first[0]] if first and first[0] else []
    return "/".join(words + ["".join(filter(None, found)) for found in _KEY.findall(name[len("".join(words)) :])])


def owners_of(program: hlo.Program, categories: Categories | None = None) -> Owners:
    """The owners that a program alone tells: its parameters have JAX's names of the arguments, its results numbers."""
    ids, root = program.computations[program.entry]
    parameters = [i for i in map(program.instructions.__getitem__, ids) if i.opcode == "parameter"]
    parameters.sort(key=lambda i: i.number)
    paths = [path_of(i.op_name) or f"{i.number}" for i in parameters]
    of_root = program.instructions[root]
    results = [f"output/{n}" for n in range(len(of_root.operands))] if of_root.shape()[0] == "tuple" else ["output"]
    return Owners([Owner(category(p, categories), p) for p in paths], [Owner("outputs", p) for p in results])


def output_owners(paths: Sequence[tuple[str, tuple[int, ...]]], arguments: Sequence[tuple[Owner, tuple[int, ...]]]):
    """The owners of results (path, shape): each is of the category of the argument whose path ends most alike.

    The argument has the same shape, and its last word is the same; of several, the one with the fewest other words.
    """
    found = []
    for path, shape in paths:
        words, best, kind = path.split("/"), (0, 0), "outputs"
        for owner, own in arguments:
            others = owner.path.split("/")
            same = next((n for n, (a, b) in enumerate(zip(words[::-1], others[::-1], strict=False)) if a != b), None)
            same = min(len(words), len(others)) if same is None else same
            if own == shape and same and (same, same - len(others)) > best:
                best, kind = (same, same - len(others)), owner.category
        found.append(Owner(kind if kind in ("weights", "adapters", "optimizer", "cache") else "outputs", path))
    return found


class ForeignAttribution(Attribution):
    """The owner of every buffer of a program that knows nothing of this library."""

    _least_axes = 1

    def temporary(self, group: hlo.Key, pieces: list[tuple[int, int, int]]) -> Buffer:
        buffer = super().temporary(group, pieces)
        if buffer.category in ("workspace", "optimizer") and (owner := self._carried(group)):
            buffer = buffer._replace(category=owner.category, module=owner.path, activation="")
        if buffer.module or buffer.activation or buffer.category == "unattributed":
            return buffer
        keys = self._flow.writers(group) or self._flow.members[group]
        made = [i for key in keys for i in (self._instructions[key[0]], *self._flow.origin(*key))]
        lines = (self._program.sources.get(i.frame) for i in made)
        line = next(filter(None, lines), "")
        if buffer.category != "saved activations":
            line = line or f"{buffer.op_name.rsplit('/', 1)[-1]} {buffer.shape}"
        return buffer._replace(module=line)

    def _find_trainable(self) -> dict[tuple[int, ...], set[str]]:
        """Leaves with a state of the optimizer's; where there is none, the adapters, the weights, or any argument."""
        leaves: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for i in self._instructions.values():
            if owner := self._argument(i):
                leaves.setdefault(owner.category, []).append((owner.path, without_ones(i.shape()[1])))
        kinds = ("adapters", "weights", "arguments")
        self._leaf_shapes = {shape for kind in kinds for _, shape in leaves.get(kind, [])}
        states = leaves.get("optimizer", [])
        found: dict[tuple[int, ...], set[str]] = {}
        for kind in kinds:
            own = leaves.get(kind, [])
            for path, shape in own:
                end = "/" + path.partition("/")[2] if "/" in path else f"/{path}"
                if any(shape == other and _alike(end, state) for state, other in states):
                    found.setdefault(shape, set()).add(path)
        if found:
            return found
        first = next((leaves[kind] for kind in kinds if kind in leaves), [])
        for path, shape in first:
            found.setdefault(shape, set()).add(path)
        return found

    def _find_loss_loops(self) -> set[int]:
        """None: a loop with a loss in it may be one of micro-batches or of steps."""
        self._backward_loops = {
            loop.id
            for i in self._instructions.values()
            if name_stack.phase(i.op_name) == "backward"
            for loop in self._flow.loops(i)
        }
        return set()

    def _is_loss(self, op_name: str) -> bool:
        words = name_stack.words(op_name)
        return bool(words) and _LOSS.fullmatch(words[-1]) is not None

    def _instruction_phase(self, instruction: Instruction) -> str:
        """As JAX marks it; what has a name without a mark is before, or after, the backward pass."""
        loops = self._flow.loops(instruction)
        for around in (instruction, *loops):
            if phase := name_stack.phase(around.op_name):
                return phase
        if any(loop.id in self._backward_loops for loop in loops):
            return "backward"  # as the sum over micro-batches
        position, first = self._position.get(instruction.name), self._backward[0]
        if not instruction.op_name or position is None or self._backward[1] < 0:
            return super()._instruction_phase(instruction)
        return "forward" if position < first else "after"

    def _outlives(self, group: hlo.Key) -> bool:
        readers = self._flow.readers.get(group, [])
        if any(not name_stack.phase(i.op_name) and i.op_name for i in readers):
            return True
        root = self._program.computations[self._program.entry][1]
        results = [self._flow.value(o) for o in self._instructions[root].operands] or [self._flow.value(root)]
        return any(key is not None and self._flow.group(key) == group for key in results)

    def _result(self, owner: Owner, key: hlo.Key) -> Owner:
        """A result that the backward pass computes and that has a leaf's shape is its gradient, whatever its path."""
        made = self._flow.origin(*key)[-1]
        marked = name_stack.phase(made.op_name) == "backward"
        if marked and without_ones(self._instructions[key[0]].shape(key[1])[1]) in self._leaf_shapes:
            return owner._replace(category="gradients")
        return owner

    def _carried(self, group: hlo.Key) -> Owner | None:
        """The parameter, optimizer's state or cache that a loop carries along and changes, as one over steps does."""
        for instruction, index in self._flow.members[group]:
            loop = self._instructions[instruction]
            if loop.opcode == "while" and loop.operands:
                owner = self._argument(self._flow.origin(loop.operands[0], index)[-1])
                if owner and owner.category in ("weights", "adapters", "optimizer", "cache"):
                    return owner
        return None

    def _module(self, op_name: str) -> str:
        return "/".join(name_stack.words(op_name))

    def _site(self, name: str) -> str:
        return ""


def _alike(end: str, state: str) -> bool:
    """Whether a state's path ends as a parameter's does, which may be in one more box (state/params/...)."""
    short = "/" + end[1:].partition("/")[2]
    return f"/{state}".endswith(end) or (short != "/" and f"/{state}".endswith(short))
