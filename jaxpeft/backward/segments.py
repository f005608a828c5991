"""What was decided about the layers where they were traced, for those who plan; and which leaves have a gradient."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero

from jaxpeft import tree
from jaxpeft.backward.kept import stored
from jaxpeft.backward.plan import INPUT
from jaxpeft.backward.programs import Kept, Programs


class Segment(NamedTuple):
    """A stack of layers as it was traced under a plan.

    programs: of one layer and one group of rows.
    steps: layers times groups.
    actions: what is done with the activations that are kept.
    shapes: of one step's activations.
    """

    programs: Programs
    steps: int
    actions: dict[Kept, str]
    shapes: dict[Kept, Any]

    def stored_bytes(self, name: Kept, action: str) -> int:
        """Bytes of an activation in all layers, as it is stored."""
        return tree.num_bytes(stored(self.shapes[name], action)) * self.steps

    def kept_bytes(self) -> dict[str, dict[str, int]]:
        """{"device" or "host": {name: bytes of all layers}}."""
        found: dict[str, dict[str, int]] = {"device": {}, "host": {}}
        for name, action in self.actions.items():
            where = found["host" if action == "offload" else "device"]
            where[name[0]] = where.get(name[0], 0) + self.stored_bytes(name, action)
        return found

    def recompute_flops(self) -> float:
        """FLOPs of matrix products that the backward pass of all layers computes again."""
        return self.programs.recompute_flops(name for name in self.actions if name[0] != INPUT) * self.steps


_listeners: contextvars.ContextVar[tuple[dict[str, Segment], ...]] = contextvars.ContextVar("listeners", default=())


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Segment]]:
    """Collects the segments that are differentiated by what is traced inside, by name; the last trace is what runs.

    A function that JAX has traced before, for arguments like these, is not traced again, and records nothing.
    """
    found: dict[str, Segment] = {}
    token = _listeners.set((*_listeners.get(), found))
    try:
        yield found
    finally:
        _listeners.reset(token)


def record(name: str, segment: Any) -> None:
    """Tells whoever listens of a segment: something with `kept_bytes` and `recompute_flops`."""
    for found in _listeners.get():
        found[name] = segment


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def told(tell: Callable[[list[bool]], None], leaves: list[Any]) -> list[Any]:
    """The leaves; tells, where they are differentiated, which of them."""
    return leaves


def _told_forward(tell, leaves):
    tell([leaf.perturbed for leaf in leaves])
    return [leaf.value for leaf in leaves], None


def _told_backward(tell, _, d_leaves):
    return ([None if isinstance(d, SymbolicZero) else d for d in d_leaves],)


told.defvjp(_told_forward, _told_backward, symbolic_zeros=True)
