"""How uncertain a model is of examples: STAR's two measures, for a run whose data grow in rounds.

    predictive    U = -sum_t log p(y_t | y_<t, x)
    entropy       U = sum_t H(p(. | y_<t, x))                 over the tokens that are trained on

    choice of round t + 1    U_full lambda + U_base (1 - lambda),   lambda = (t + 1) / rounds

U_base is that of the model before the first step, U_full the mean over three passes with dropout of the model as it is,
so that a model that has seen little is trusted little. Both are scaled to [0, 1]. Where the method drops nothing out
(`lora` drops out with `dropout=`), the three passes are alike.

Paper: Zhang et al. 2024, "STAR: Constraint LoRA with Dynamic Active Learning for Data-Efficient Fine-Tuning of Large
Language Models", arXiv:2403.01165. Deviations: its published code trains a new model in each round, and scales U_base
alone; here one run goes on, and both are scaled. lambda there is 0.1 (t + 1), of ten rounds. What it does to LoRA, a
weight decay of B alone, is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxpeft import shares
from jaxpeft.model import Batch, Model
from jaxpeft.train.loss import by_row, completion_loss, for_head, in_chunks
from jaxpeft.train.state import TrainState
from jaxpeft.tree import Params

PASSES = 3  # with dropout


def mean_entropy(
    model: Model, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean entropy of the next token over the tokens that count, as `completion_loss` has its loss."""
    x = model.hidden(params, batch, key)
    weight = jnp.sum(batch["loss_weights"], dtype=jnp.float32)
    vocabulary = jax.eval_shape(model.head, params, x[0]).shape[-1]
    parts = in_chunks(vocabulary, x, batch["loss_weights"] / jnp.maximum(weight, 1e-9))
    own = for_head(params)

    def add(total, chunk):
        x, share = chunk
        likely = jax.nn.log_softmax(model.head(own, x).astype(jnp.float32))
        return total - jnp.sum(share * jnp.sum(jnp.exp(likely) * likely, axis=-1)), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0], {"weight": weight}


MEASURES: dict[str, Callable[..., Any]] = {"predictive": completion_loss, "entropy": mean_entropy}


def make_uncertainty(model: Model, measure: str, passes: int = PASSES) -> Callable[[TrainState, Batch], jax.Array]:
    """A pure (state, batch) -> U (B,), the mean over passes with dropout; without passes of one without dropout."""

    def of_pass(state, batch, key):
        return by_row(lambda batch: MEASURES[measure](model, state.params, batch, key), batch)

    def uncertainty(state: TrainState, batch: Batch) -> jax.Array:
        if not passes:
            return of_pass(state, batch, None)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0x57A2)
        keys = jax.random.split(key, passes)
        return jax.lax.scan(lambda _, key: (None, of_pass(state, batch, key)), None, keys)[1].mean(axis=0)

    return uncertainty


def uncertainties(
    step: Callable[..., Any], state: TrainState, batches: Iterable[tuple[Batch, Any]], count: int
) -> npt.NDArray[np.float64]:
    """U (n,) of the examples of batches, one a row; rows behind the last are empty."""
    found = shares.all_on_host([{"u": step(state, batch)} for batch, _ in batches])
    return np.concatenate([np.empty(0), *(np.asarray(part["u"], np.float64) for part in found)])[:count]
