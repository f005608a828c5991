"""Who owns the bytes of the compiled step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxpeft.memory import planner, targets
from jaxpeft.model import Batch, Model
from jaxpeft.train.compiled import Program
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.state import TrainState


def step_memory(
    program: Program,
    model: Model,
    state: TrainState,
    batch: Batch,
    base: Iterable[str],
    accumulate: int = 1,
    loss: Callable[..., Any] = completion_loss,
) -> dict[str, int]:
    """Bytes of one step by owner, and their total (see `jaxpeft.memory.planner.account`).

    Args:
      program: of a train step.
      model: that the step trains.
      state: of the shapes that it was compiled for.
      batch: likewise.
      base: the base model's paths.
      accumulate: micro-batches of the step.
      loss: that it minimises.
    """
    activations = planner.activation_bytes(program.segments, model, state, batch, accumulate, loss)
    memory = targets.analysed(jax.default_backend(), program.executable.memory_analysis())
    owners = planner.account(memory, state, base, activations)
    return {name: owners[name] for name in (*planner.CATEGORIES, "total")}
