"""A function of (state, batch), compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.model import Batch
from jaxpeft.train.state import TrainState


class Compiled:
    """Compiles once for each width of batch, and keeps the executables to ask for the memory of what really runs.

    Args:
      function: (state, batch) -> result, pure.
      donate: whether the state's buffers become the result's.
    """

    def __init__(self, function: Callable[[TrainState, Batch], Any], donate: bool = False):
        self._jitted = jax.jit(function, donate_argnums=(0,) if donate else ())
        self._executables: dict[int, Any] = {}

    def executable(self, state: TrainState, batch: Batch) -> Any:
        """What runs for such a batch."""
        width = jnp.shape(batch["tokens"])[1]
        if width not in self._executables:
            self._executables[width] = self._jitted.lower(state, batch).compile()
        return self._executables[width]

    def widest(self) -> Any:
        """The executable of the widest batch so far; None before the first."""
        return self._executables[max(self._executables)] if self._executables else None

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        return self.executable(state, batch)(state, batch)
