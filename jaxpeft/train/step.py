"""The pure train step.

    state, metrics = step(state, batch)

    (loss, aux), gradients = objective.value_and_grad(...)         the method's `loss` and `gradient` slots
    directions             = optimizer.update(gradients, ...)      its `update` slot
    leaf                  <- leaf - rate(step) (direction + decay leaf)
    trained, moved         = move(trained, moved)                  its `move` slot

With `update_in_backward` the second and the third line are done for each layer inside the backward pass.

It assumes nothing about devices: batch and state may be sharded in any way. `jit_step` compiles it such that what
changes takes the place of what it was, and frozen leaves are only read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from jaxpeft import host, tree
from jaxpeft.backward.residuals import check_kept
from jaxpeft.errors import InputError, shown
from jaxpeft.method import Leaves, Method, Moment, Objective, view_of
from jaxpeft.model import Batch, Model
from jaxpeft.train import host_state, in_backward
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.optimizer import decays
from jaxpeft.train.reach import check_reached
from jaxpeft.train.state import TrainState, lying

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: Model,
    method: Method,
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any] = completion_loss,
    accumulate: int = 1,
    rate: optax.Schedule | float | None = None,
    weight_decay: float = 0.0,
    update_in_backward: bool = False,
) -> Step:
    """The step of a method.

    Args:
      model: the adapted model, from `setup`.
      method: the method.
      optimizer: an optax transform over the flat trainable dict. With a `rate`, it gives directions
        (`optax.scale_by_adam()`, see `make_direction`); without, updates: an optax optimizer of your own, rate and all.
      loss: (model, params, batch, key) -> (loss, aux), aux["weight"] being what the loss is a mean over.
      accumulate: micro-batches per step; the batch's leading axis is divided by it. The result is that of the whole
        batch: losses and gradients are averaged by weight.
      rate: learning rate, a number or a function of the steps done.
      weight_decay: decoupled, times the rate, on the leaves that `decays` names; needs a rate.
      update_in_backward: update each layer inside the backward pass (`jaxpeft.backward.in_backward`), so that the
        gradients of all layers never exist; the model is under a plan (`remat`). The optimizer treats each leaf, and
        each layer of a stack, by itself: `make_direction(kind, clip=None)`.

    Returns:
      A pure step(state, batch) -> (state, metrics). Metrics are float32 scalars: loss, grad_norm (of the trainable
      leaves, after the method's gradient slot, before clipping), lr where there is a rate, and the scalars of aux.

    Raises:
      InputError: when traced, for a batch that is none (`check_batch`); for a loss that gives no (loss, aux); for
        adapters of a model without visible layers that the loss does not depend on; for updates in the backward pass
        that a method, a model or an optimizer cannot have; for a memory plan that keeps activations where there is no
        backward pass.
      ValueError: for a weight decay without a rate. When traced: for a batch that `accumulate` does not divide.
      AssertionError: when traced, for gradients of other shapes than the trained leaves.
    """
    if weight_decay and rate is None:
        raise ValueError("weight_decay needs a rate: an optimizer of your own has its own decay")
    schedule = rate if callable(rate) or rate is None else optax.constant_schedule(rate)
    loss = _with_aux(loss)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        check_batch(batch)
        now = None if schedule is None else jnp.asarray(schedule(state.step), jnp.float32)
        view = view_of(model, method, state.leaves, now)
        state = state._replace(moved=lying(method, state.moved))  # a program for a device that is described is told
        optimised = method.update(optimizer, view)
        state = state._replace(opt_state=host_state.put(state.opt_state, host_state.lies(optimised, view.trained)))
        update = optax.with_extra_args_support(optimised).update

        def change(grads, leaves, opt_state, aux):
            updates, opt_state = update(grads, opt_state, leaves, aux=aux)
            if now is None:
                return optax.apply_updates(leaves, updates), opt_state
            stepped = {
                path: _stepped(leaf, updates[path], now, weight_decay if decays(path, leaf) else 0.0)
                for path, leaf in leaves.items()
            }
            return stepped, opt_state

        if update_in_backward:
            whole = method.loss(loss, view)
            own = in_backward.updating(model, method, whole, accumulate, view, change, state.opt_state)
            objective = method.gradient(own, view)
        else:
            objective = objective_of(model, method, state.leaves, loss, accumulate, now)

        key = jax.random.fold_in(state.key, state.step)
        rest = {**state.frozen, **state.moved}
        if not model.stack.layered:  # our own layers call every adapter
            check_reached(method, objective, state.trainable, rest, batch, key)
        (value, aux), grads = objective.value_and_grad(state.trainable, rest, batch, key, state.opt_state)
        done = in_backward.taken(aux) if update_in_backward else None
        beside = {path: leaf for path, leaf in state.trainable.items() if done is None or path not in done.leaves}
        chex.assert_trees_all_equal_shapes(grads, beside)
        metrics = {name: x for name, x in aux.items() if jnp.ndim(x) == 0}
        norm = optax.global_norm(grads) if grads else jnp.zeros(())
        metrics |= {"loss": value, "grad_norm": norm if done is None else jnp.sqrt(norm**2 + done.squares)}
        if now is not None:
            metrics["lr"] = now
        if done is None:
            trainable, opt_state = change(grads, state.trainable, state.opt_state, aux)
        else:
            trainable, opt_state = done.with_others(change, grads, beside, state, aux)
        moment = Moment(state.step, key, now, weight_decay, aux, state.frozen, view, state.trainable)
        leaves = method.move(Leaves(trainable, state.moved), moment)
        new = state._replace(step=state.step + 1, trainable=leaves.trained, moved=leaves.moved, opt_state=opt_state)
        return new, metrics

    return step


def check_batch(batch: Batch) -> None:
    """Refuses what is no batch: a dict of arrays whose first axis is the row.

    Raises:
      InputError: for a batch that is no dict, or without rows; for a scalar; for an array of other rows than the first.
    """
    if not isinstance(batch, Mapping) or not jax.tree.leaves(batch):
        raise InputError(f"batch: is {shown(batch)}; it should be a dict of arrays whose first axis is the row")
    arrays = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree.leaves_with_path(dict(batch))}
    (first, shape), *_ = arrays.items()
    for name, other in arrays.items():
        if not other:
            raise InputError(f"batch{name}: is a scalar; the first axis of all should be the row (broadcast it)")
        if other[0] != shape[0]:
            raise InputError(f"batch{name}: has shape {other} beside {shape} of batch{first}; all should have its rows")
    if not shape[0]:
        raise InputError(f"batch{first}: has shape {shape}; a step needs at least one row")


def in_place(step: Step) -> Callable[[TrainState, tree.Flat, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A step as (what it changes, the frozen leaves, batch) -> (what it changes, metrics), see `TrainState.parted`.

    For `jax.jit(..., donate_argnums=0)`: only what changes can be donated, and only it is a result. To donate frozen
    leaves gains nothing, and costs a copy of those whose memory is not JAX's own: a checkpoint's, on a CPU.
    """

    def parted(changing: TrainState, frozen: tree.Flat, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = step(changing._replace(frozen=frozen), batch)
        return state._replace(frozen={}), metrics

    return parted


def keeps_unused(state: TrainState) -> bool:
    """Of a program that is given a state to keep: whether what it does not read must be an argument of it too.

    JAX gives a result the place of the first argument of its shape that is left, whichever memory that lies in. Those
    of a state and of what becomes of it pair, as long as none is missing.
    """
    return any(map(host.holds, jax.tree.leaves(state)))


def jit_step(step: Step) -> Step:
    """The step, compiled: what changes is donated, so that the state given is used up; frozen leaves stay as they are.

    step = jp.jit_step(jp.make_train_step(model, method, optimizer))
    for batch in batches:
        state, metrics = step(state, batch)
    """
    compiled = functools.cache(lambda keeps: jax.jit(in_place(step), donate_argnums=0, keep_unused=keeps))

    def call(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        changed, metrics = compiled(keeps_unused(state))(*state.parted, batch)
        return changed._replace(frozen=state.frozen), metrics

    return call


def _stepped(leaf: jax.Array, direction: jax.Array, rate: jax.Array, decay: float) -> jax.Array:
    wide = leaf.astype(jnp.float32)
    return (wide - rate * (direction + decay * wide if decay else direction)).astype(leaf.dtype)


def objective_of(
    model: Model,
    method: Method,
    leaves: tree.Flat,
    loss: Callable[..., Any] = completion_loss,
    accumulate: int = 1,
    rate: Any = None,
) -> Objective:
    """What a step of a method minimises; `leaves` are all of the model's, or their shapes.

    Raises:
      InputError: for trained leaves that no gradient would reach, or a memory plan that keeps activations for no
        backward pass.
    """
    view = view_of(model, method, leaves, rate)
    objective = method.gradient(make_objective(model, method.loss(loss, view), accumulate), view)
    dead = [path for path in view.trained if tree.stacked(path)] if model.stack.frozen_layers else []
    if dead and objective.backward:
        raise InputError(
            f"{method.name}: {dead[0]} would train without effect: the network beside differentiates no layer"
        )
    if not objective.backward:
        check_kept(model, method.name)
    return objective


def _with_aux(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of the user's own, refused where it is no (loss, aux)."""

    @functools.wraps(loss)
    def checked(*args, **named):
        found = loss(*args, **named)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            raise InputError(
                f"make_train_step: the loss gives a {type(found).__name__}; it should give (loss, aux), aux a dict in "
                'which "weight" is what the loss is a mean over'
            )
        return found

    return checked


def make_objective(model: Model, loss: Callable[..., Any], accumulate: int = 1) -> Objective:
    """The loss of any batch, and its value and gradient micro-batch by micro-batch."""

    def value(trainable, rest, batch, key):
        return loss(model, tree.combine(trainable, rest), batch, key)

    def value_and_grad(trainable, rest, batch, key, opt_state):
        del opt_state
        function = jax.value_and_grad(value, has_aux=True)

        def part(batch, key):
            (mean, aux), grads = function(trainable, rest, batch, key)
            return (mean, grads), aux

        (mean, grads), aux = mean_over(part, batch, key, accumulate)
        return (mean, aux), grads

    on = lambda change: make_objective(change(model), loss, accumulate)
    return Objective(value, value_and_grad, accumulate, on)


def mean_over(function: Callable[..., Any], batch: Batch, key: jax.Array, parts: int) -> tuple[Any, dict[str, Any]]:
    """function(part, key) -> (tree, aux) averaged by aux["weight"] over the parts of the batch; weights add up."""
    if parts == 1:
        return function(batch, key)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows is not divided by accumulate={parts}")
    # Part i takes every parts-th row, so that a batch sharded by rows stays where it is.
    split = jax.tree.map(lambda x: x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, inputs):
        index, part = inputs
        result, aux = function(part, jax.random.fold_in(key, index))
        weighted = jax.tree.map(lambda x: aux["weight"] * x, (result, {**aux, "weight": jnp.ones(())}))
        return jax.tree.map(jnp.add, total, weighted), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], split), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (result, aux), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    weight = aux["weight"]
    mean = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), (result, aux))
    return mean[0], {**mean[1], "weight": weight}
