"""Who owns the bytes of the compiled step."""

from __future__ import annotations

from collections.abc import Iterable

import jax

from jaxpeft import tree
from jaxpeft.memory import planner, targets
from jaxpeft.model import Batch, Model
from jaxpeft.train.compiled import Program
from jaxpeft.train.state import TrainState


def step_memory(program: Program, model: Model, state: TrainState, batch: Batch, base: Iterable[str]) -> dict[str, int]:
    """Bytes of one step by owner, and their total (see `jaxpeft.memory.planner.account`).

    Args:
      program: of a train step.
      model: that the step trains.
      state: of the shapes that it was compiled for.
      batch: likewise.
      base: the base model's paths.
    """
    if program.segments:
        count = len(tree.segments(jax.eval_shape(lambda state: state.params, state)))
        activations = planner.kept_bytes(program.segments[-count:])
    else:
        activations = planner.autodiff_bytes(model, state, batch)
    memory = targets.analysed(jax.default_backend(), program.executable.memory_analysis())
    owners = planner.account(memory, state, base, activations)
    return {name: owners[name] for name in (*planner.CATEGORIES, "total")}
