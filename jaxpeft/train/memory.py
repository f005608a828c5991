"""Who owns the bytes of one compiled step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxpeft import tree
from jaxpeft.train.state import TrainState


def step_memory(compiled: Any, state: TrainState, base: Iterable[str]) -> dict[str, int]:
    """Bytes of one step, by owner.

        weights            leaves of the base, frozen or trained
        adapters           leaves that the method added
        optimizer_state
        gradients          one number for each trainable one, in its type
        saved_activations  what the compiler sets aside besides: activations kept for the backward pass, and workspace
        total              what the executable needs: arguments, results that reuse no argument, and temporaries

    The first three are exact sums over arrays. The compiler reports its temporaries as one figure; the gradients' size
    is taken off it, also where the compiler fuses a gradient into its update and never holds the whole of it.

    Args:
      compiled: the executable of a train step, `jit(step).lower(state, batch).compile()`.
      state: of the shapes that it was compiled for.
      base: the base model's paths.
    """
    known = set(base)
    leaves = {**state.frozen, **state.trainable}
    of_base = {path: leaf for path, leaf in leaves.items() if tree.canonical(path) in known}
    gradients = tree.num_bytes(state.trainable)
    analysis = compiled.memory_analysis()
    temporary = int(analysis.temp_size_in_bytes)
    new_results = int(analysis.output_size_in_bytes) - int(analysis.alias_size_in_bytes)
    return {
        "weights": tree.num_bytes(of_base),
        "adapters": tree.num_bytes(leaves) - tree.num_bytes(of_base),
        "optimizer_state": tree.num_bytes(state.opt_state),
        "gradients": gradients,
        "saved_activations": max(temporary - gradients, 0),
        "total": int(analysis.argument_size_in_bytes) + new_results + temporary,
    }
