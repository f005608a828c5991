"""A run of forward passes again, of its metrics alone: what `jaxpeft export --replay` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError, shown
from jaxpeft.method import Leaves, Method, Moment, View, shapes_of
from jaxpeft.train.state import TrainState
from jaxpeft.zeroth_order import SLOPE, own_of


def replay(
    method: Method, state: TrainState, rows: Iterable[Mapping[str, float]], weight_decay: float = 0.0
) -> TrainState:
    """The state after the steps that `rows` tell of, without a forward pass.

    Where the same device compiles it, bit for bit that of the run: z is a function of the run's key and the step, and
    the update is the run's.

    Args:
      method: of a chain in which nothing trains and these estimates alone move leaves.
      state: before the steps. It is used up.
      rows: of each step, in order, what its metrics say: "lr", and "slope" or, of several directions, "slope_0", ...
      weight_decay: of the run.

    Raises:
      InputError: for a chain in which something trains or nothing moves, or rows without a step's slopes.
    """
    view = View(None, method.specs, method.role, shapes_of(state.leaves))  # type: ignore[arg-type]
    told = {name: x for spec in method.specs for name, x in spec.config.items()}
    alone = not view.trained and 0 < len(own_of(view)) == len(view.moved)
    if not alone:
        raise InputError(f"{method.name}: its steps do not follow from their metrics, and cannot be replayed")
    if told.get("variant") == "blockwise":
        raise InputError(
            f"{method.name}: variant=blockwise has slopes that its metrics do not tell; it cannot be replayed"
        )
    n = told.get("seeds", 1)
    names = ["slope"] if n == 1 else [SLOPE.format(i) for i in range(n)]

    def one(state, frozen, slopes, rate):
        key = jax.random.fold_in(state.key, state.step)
        moment = Moment(state.step, key, rate, weight_decay, {"slopes": slopes}, frozen, view, {})
        return state._replace(step=state.step + 1, moved=method.move(Leaves({}, state.moved), moment).moved)

    compiled = jax.jit(one, donate_argnums=0)
    changing, frozen = state.parted
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in ("lr", *names) if row.get(name) is None]:
            raise InputError(f"{method.name}: step {number} cannot be replayed: its metrics have no {missing[0]}")
        for name in ("lr", *names):
            if not _is_number(row[name]):
                said = f"{name} {shown(row[name])} is not a finite number of float32"
                raise InputError(f"{method.name}: step {number} cannot be replayed: its metrics are damaged: {said}")
        slopes = jnp.array([row[name] for name in names], jnp.float32)
        changing = compiled(changing, frozen, slopes, jnp.float32(row["lr"]))
    return changing._replace(frozen=frozen)


def _is_number(value: Any) -> bool:
    """Whether a value of a step's metrics is one that a step can have said."""
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return whole and abs(value) <= float(jnp.finfo(jnp.float32).max)  # and no nan
