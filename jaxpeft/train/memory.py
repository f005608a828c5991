"""Who owns the bytes of the compiled step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxpeft import host, tree
from jaxpeft.backward.segments import Segment
from jaxpeft.executable import Memory, analysed
from jaxpeft.method import Method
from jaxpeft.model import Batch, Model
from jaxpeft.train.compiled import Program
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.state import TrainState
from jaxpeft.train.step import objective_of

CATEGORIES = ("weights", "adapters", "optimizer", "gradients", "activations", "workspace")


def step_memory(
    program: Program,
    model: Model,
    method: Method,
    state: TrainState,
    batch: Batch,
    base: Iterable[str],
    accumulate: int = 1,
    loss: Callable[..., Any] = completion_loss,
    update_in_backward: bool = False,
) -> dict[str, int]:
    """Bytes of one step by owner, and their total (see `jaxpeft.memory.account`).

    Args:
      program: of a train step.
      model: that the step trains.
      method: by which.
      state: of the shapes that it was compiled for.
      batch: likewise.
      base: the base model's paths.
      accumulate: micro-batches of the step.
      loss: that it minimises.
      update_in_backward: whether layers are updated inside the backward pass.
    """
    backward = objective_of(model, method, state.leaves, loss, accumulate).backward
    activations = activation_bytes(program.segments, model, state, batch, accumulate, loss) if backward else 0
    memory = analysed(jax.default_backend(), program.executable.memory_analysis())
    if jax.default_backend() != "cpu":  # whose memory is the host's
        state = on_device(state, jax.tree.map(host.holds, state))
    gradients = gradient_bytes(state.trainable, update_in_backward) if backward else 0
    owners = account(memory, state, base, activations, gradients)
    return {name: owners[name] for name in (*CATEGORIES, "total")}


def activation_bytes(
    segments: Mapping[str, Segment],
    model: Model,
    state: TrainState,
    batch: Mapping[str, Any],
    accumulate: int = 1,
    loss: Callable[..., Any] = completion_loss,
) -> int:
    """Bytes that a step keeps on the device for its backward pass.

    Args:
      segments: what its trace recorded; {} under plain autodiff.
      model: that it trains.
      state, batch: of arrays or shapes.
      accumulate: micro-batches, of which one is kept at a time.
      loss: that the step minimises.
    """
    if segments:
        return kept_bytes(segments)
    part = {name: jax.ShapeDtypeStruct((x.shape[0] // accumulate, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    return _autodiff_bytes(model, state, part, loss)


def kept_bytes(segments: Mapping[str, Segment], where: str = "device") -> int:
    """Bytes of all activations that layers keep on the device, or in the host's memory."""
    return sum(sum(segment.kept_bytes()[where].values()) for segment in segments.values())


def _autodiff_bytes(model: Model, state: TrainState, batch: Mapping[str, Any], loss: Callable[..., Any]) -> int:
    """Bytes that plain autodiff keeps, counted on the vjp's closure without the parameters."""

    def pull(trainable, rest, batch):
        value = lambda trainable: loss(model, tree.combine(trainable, rest), batch)[0]
        return jax.vjp(value, trainable)[1]

    rest = {**state.frozen, **state.moved}
    kept = jax.tree.leaves(jax.eval_shape(pull, state.trainable, rest, batch))
    given = [(x.shape, x.dtype) for x in jax.tree.leaves((state.trainable, rest, batch))]
    total = 0
    for x in kept:
        if (x.shape, x.dtype) in given:
            given.remove((x.shape, x.dtype))
        else:
            total += tree.num_bytes(x)
    return total


def on_device(state: TrainState, away: Any) -> TrainState:
    """The state without what lies in the host's memory; `away`: whether an array does."""
    moved = {path: leaf for path, leaf in state.moved.items() if not any(jax.tree.leaves(away.moved[path]))}
    here = [x for x, other in zip(*map(jax.tree.leaves, (state.opt_state, away.opt_state)), strict=True) if not other]
    return state._replace(moved=moved, opt_state=here)


def gradient_bytes(trainable: Mapping[str, Any], update_in_backward: bool = False) -> int:
    """Bytes of the gradients of trained leaves that exist at once: of layers that are updated in turn those of one."""
    if not update_in_backward:
        return tree.num_bytes(trainable)
    beside = {path: leaf for path, leaf in trainable.items() if not tree.stacked(path)}
    layers: dict[str, int] = {}
    for path in trainable.keys() - beside.keys():
        segment = path.split("/", 1)[0]
        layers[segment] = layers.get(segment, 0) + tree.num_bytes(trainable[path]) // trainable[path].shape[0]
    return tree.num_bytes(beside) + max(layers.values(), default=0)


def account(memory: Memory, state: TrainState, base: Iterable[str], activations: int, gradients: int) -> dict[str, int]:
    """Bytes of one step by owner: CATEGORIES, then arguments, temporaries and total.

    Args:
      memory: what the compiler says.
      state: of the shapes that it was compiled for.
      base: the base model's paths.
      activations: bytes kept for the backward pass.
      gradients: bytes of those that exist at once (`gradient_bytes`); 0 without a backward pass.
    """
    known = set(base)
    leaves = state.leaves
    weights = tree.num_bytes({path: leaf for path, leaf in leaves.items() if tree.canonical(path) in known})
    gradients = min(gradients, memory.temporaries)
    # A compiler may keep less than autodiff asks for, where fusing lets it compute an array twice.
    activations = min(activations, memory.temporaries - gradients)
    return {
        "weights": weights,
        "adapters": tree.num_bytes(leaves) - weights,
        "optimizer": tree.num_bytes(state.opt_state),
        "gradients": gradients,
        "activations": activations,
        "workspace": memory.temporaries - gradients - activations,
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "total": memory.total,
    }
