"""The pure train step.

    state, metrics = step(state, batch)

It assumes nothing about devices: batch and state may be sharded in any way, and `jax.jit(step, donate_argnums=0)`
reuses the state's buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree
from jaxpeft.method import Method, Objective
from jaxpeft.model import Batch, Model
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.state import TrainState, mutable

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: Model,
    method: Method,
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any] = completion_loss,
    accumulate: int = 1,
) -> Step:
    """The step of a method.

    Args:
      model: the adapted model, from `setup`.
      method: the method; its `gradient` and `update` slots act here.
      optimizer: an optax transform over the flat trainable dict.
      loss: (model, params, batch, key) -> (loss, aux), aux["weight"] being what the loss is a mean over.
      accumulate: micro-batches per step; the batch's leading axis is divided by it. The result is that of the whole
        batch: losses and gradients are averaged by weight.

    Returns:
      A pure step(state, batch) -> (state, metrics). Metrics are float32 scalars: loss, grad_norm (of the trainable
      leaves, after the method's gradient slot, before clipping) and the scalars of aux.

    Raises:
      ValueError: when traced with a batch that `accumulate` does not divide.
    """
    objective = method.gradient(_objective(model, loss, accumulate))
    update = optax.with_extra_args_support(method.update(optimizer)).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        frozen = {**state.frozen, **mutable(state.opt_state)}
        (value, aux), grads = objective.value_and_grad(state.trainable, frozen, batch, key, state.opt_state)
        updates, opt_state = update(grads, state.opt_state, state.trainable, aux=aux)
        metrics = {name: x for name, x in aux.items() if jnp.ndim(x) == 0}
        metrics |= {"loss": value, "grad_norm": optax.global_norm(grads)}
        new = state._replace(
            step=state.step + 1,
            trainable=optax.apply_updates(state.trainable, updates),
            opt_state=opt_state,
        )
        return new, metrics

    return step


def _objective(model: Model, loss: Callable[..., Any], accumulate: int) -> Objective:
    """The loss of any batch, and its value and gradient micro-batch by micro-batch."""

    def value(trainable, frozen, batch, key):
        return loss(model, tree.combine(trainable, frozen), batch, key)

    def value_and_grad(trainable, frozen, batch, key, opt_state):
        del opt_state
        function = jax.value_and_grad(value, has_aux=True)

        def part(batch, key):
            (mean, aux), grads = function(trainable, frozen, batch, key)
            return (mean, grads), aux

        (mean, grads), aux = _mean(part, batch, key, accumulate)
        return (mean, aux), grads

    return Objective(value, value_and_grad)


def _mean(function: Callable[..., Any], batch: Batch, key: jax.Array, parts: int) -> tuple[Any, dict[str, Any]]:
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
