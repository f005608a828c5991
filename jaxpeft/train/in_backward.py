"""`update_in_backward`: a step whose layers are updated inside the backward pass (`jaxpeft.backward.in_backward`).

The optimizer is the run's. It works leaf by leaf, and on a stack layer by layer, so that of its state each layer's
part is updated with the layer, and the rest, with the counters, afterwards (`jaxpeft.train.places`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from jaxpeft import tree
from jaxpeft.backward import in_backward
from jaxpeft.backward.passes import Update
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Objective, View, is_layer_by_layer
from jaxpeft.model import Model
from jaxpeft.train.places import Places
from jaxpeft.train.state import TrainState

FOUND = "update_in_backward"  # in aux: `Done`

Change = Callable[[tree.Flat, tree.Flat, Any, Mapping[str, Any]], tuple[tree.Flat, Any]]


class Done(NamedTuple):
    """What the backward pass has updated.

    leaves: {path: leaf}.  states: their parts of the optimizer's state, one for each segment.
    squares: () float32, the sum of all squares of their gradients.
    """

    leaves: tree.Flat
    states: list[Any]
    squares: jax.Array

    def with_others(
        self, change: Change, grads: tree.Flat, beside: tree.Flat, state: TrainState, aux: dict[str, Any]
    ) -> tuple[tree.Flat, Any]:
        """(trained leaves, the optimizer's state) after the update of the others, given their gradients."""
        places = Places.of(state.opt_state, state.trainable)
        leaves, after = change(grads, beside, places.joined(places.parts(state.opt_state, beside)), aux)
        leaves = {**leaves, **self.leaves}
        whole = places.after(after).joined(places.parts(after, beside), *self.states)
        return {path: leaves[path] for path in state.trainable}, whole


def taken(aux: dict[str, Any]) -> Done:
    """What the backward pass has updated, taken out of `aux`."""
    return aux.pop(FOUND)


def check(model: Model, method: Method, accumulate: int, trained: Iterable[str]) -> list[str]:
    """The trained leaves of the layers.

    Args:
      model: adapted, under a plan.
      method: of the step.
      accumulate: micro-batches.
      trained: the paths of all trained leaves.

    Raises:
      InputError: for what a step with updates in its backward pass cannot be.
    """
    said = f"--update-in-backward: {method.name}"
    if accumulate > 1:
        raise InputError(
            f"--accumulate {accumulate}: with --update-in-backward a layer is updated before the next micro-batch "
            "could add to its gradient; let the plan take a few rows at a time in its place: --save blocks,tokens=2048"
        )
    if not is_layer_by_layer(method.gradient):
        raise InputError(f"{said} makes a step's gradients in a way of its own, or reads all of them; leave it out")
    if not is_layer_by_layer(method.update):
        raise InputError(f"{said} changes the optimizer in a way that needs all layers together; leave it out")
    in_backward.check_model(model)
    if not (inside := [path for path in trained if tree.stacked(path)]):
        raise InputError(f"{said} trains nothing in the layers; leave it out")
    return inside


def updating(
    model: Model, method: Method, loss: Callable[..., Any], accumulate: int, view: View, change: Change, state: Any
) -> Objective:
    """The objective of a step, which hands updated layers on in aux[FOUND] = (leaves, state, squares).

    Args:
      model: adapted, under a plan.
      method: of the step.
      loss: with the method's `loss` slot.
      accumulate: micro-batches.
      view: of the chain.
      change: (gradients, leaves, state, aux) -> (leaves, state), of any leaves.
      state: the optimizer's.

    Raises:
      InputError: as `check` does, and for an optimizer whose state has no part for each layer.
    """
    trained = list(view.trained)
    inside = check(model, method, accumulate, trained)
    _check_apart(change, view.trained, state, inside[0])

    def value(trainable, rest, batch, key):
        return loss(model, tree.combine(trainable, rest), batch, key)

    def value_and_grad(trainable, rest, batch, key, opt_state):
        segments = {path.split("/", 1)[0] for path in inside}
        updates = {}
        for segment in segments:
            paths = [path for path in inside if path.startswith(f"{segment}/")]
            updates[segment] = _update_of(paths, opt_state, trained, change, len(trainable[paths[0]]))
        found = in_backward.value_and_update(model, loss, trainable, rest, batch, key, updates)
        done = Done(found.leaves, list(found.state.values()), found.squares)
        return (found.loss, {**found.aux, FOUND: done}), found.gradients

    def on(change_of_model):
        del change_of_model
        raise InputError(f"--update-in-backward: {method.name} takes a step on a changed model")

    return Objective(value, value_and_grad, 1, on)


def _update_of(
    paths: list[str], state: Any, trained: Collection[str], change: Change, layers: int
) -> Callable[[dict[str, Any]], Update]:
    """aux -> the update of the leaves of one segment."""
    places = Places.of(state, trained)
    own = places.parts(state, paths)
    for place, leaf in jax.tree.leaves_with_path(own):
        if jnp.shape(leaf)[:1] != (layers,):
            raise InputError(
                f"--update-in-backward: the optimizer's state{jax.tree_util.keystr(place)} is {jnp.shape(leaf)}, and "
                f"should have an axis of {layers} layers first"
            )

    def update(aux):
        def of_layer(grads, leaves, own):
            leaves, after = change(grads, leaves, places.joined(own), aux)
            return leaves, places.parts(after, paths)

        return Update(frozenset(paths), own, of_layer)

    return update


def _check_apart(change: Change, shapes: Mapping[str, Any], state: Any, path: str) -> None:
    """Refuses an optimizer that needs the gradient of another leaf for the update of one."""

    def changed(grads, leaves, state):
        return change(grads, leaves, state, {})[0][path]

    closed = jax.make_jaxpr(changed)(dict(shapes), dict(shapes), state)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    others = [other for other, use in zip(sorted(shapes), used, strict=False) if use and other != path]
    if others:
        raise InputError(
            f"--update-in-backward: the optimizer reads the gradient of {others[0]} to update {path}, as clipping by "
            "the global norm does; give --clip None, or make_direction(clip=None)"
        )
