"""A function of (state, batch), compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import shares
from jaxpeft.backward.segments import Segment, recorded
from jaxpeft.compilation import compiled
from jaxpeft.model import Batch
from jaxpeft.train.state import TrainState
from jaxpeft.train.step import in_place, keeps_unused


class Program(NamedTuple):
    """What runs for batches of one width.

    executable: compiled.
    segments: the layers that it differentiates, with what they keep; empty under plain autodiff.
    """

    executable: Any
    segments: dict[str, Segment]


class Compiled:
    """Compiles once for each width of batch, and keeps the executables to ask for the memory of what really runs.

    Args:
      function: (state, batch) -> result, pure; a train step, or what only reads the state.
      steps: whether it is a train step: what it changes takes the place of what it was (`step.in_place`).
      mesh: over which batches are divided by rows; the state lies on it already, and stays as it lies.
      rows: of a batch, those that it is given by this process; None: all of them.
    """

    def __init__(
        self,
        function: Callable[[TrainState, Batch], Any],
        steps: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        rows: shares.Rows | None = None,
    ):
        self._function, self._steps, self._mesh, self._rows = function, steps, mesh, rows
        self._programs: dict[int, Program] = {}

    def _arguments(self, state: TrainState, batch: Batch) -> tuple[Any, ...]:
        batch = shares.batch_of(self._mesh, batch, self._rows)
        return (*state.parted, batch) if self._steps else (state, batch)

    def _lowered(self, *args: Any) -> Any:
        if not self._steps:
            return jax.jit(self._function).lower(*args)
        there = None if self._mesh is None else (jax.tree.map(lambda leaf: leaf.sharding, args[0]), None)
        options: dict[str, Any] = {"donate_argnums": 0, "out_shardings": there, "keep_unused": keeps_unused(args[0])}
        return jax.jit(in_place(self._function), **options).lower(*args)

    def program(self, state: TrainState, batch: Batch) -> Program:
        """What runs for such a batch."""
        width = jnp.shape(batch["tokens"])[1]
        if width not in self._programs:
            with recorded() as segments:
                lowered = self._lowered(*self._arguments(state, batch))
            self._programs[width] = Program(compiled(lowered), segments)
        return self._programs[width]

    def widest(self) -> Program | None:
        """The program of the widest batch so far; None before the first."""
        return self._programs[max(self._programs)] if self._programs else None

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        result = self.program(state, batch).executable(*self._arguments(state, batch))
        if not self._steps:
            return result
        changed, metrics = result
        return changed._replace(frozen=state.frozen), metrics
