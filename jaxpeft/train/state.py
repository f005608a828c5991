"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import host, tree
from jaxpeft.method import Method, view_of
from jaxpeft.model import Model


class TrainState(NamedTuple):
    """Everything that a step reads and writes: a pytree, so it shards, donates and checkpoints as one.

    step: () int32, steps done.
    trainable: {path: leaf}, masters of what is differentiated.
    frozen: {path: leaf}, never differentiated, never changed.
    opt_state: the optimizer's state.
    key: PRNG key of the run; step i uses `fold_in(key, i)`.
    moved: {path: leaf}, changed by the method between steps, never differentiated.
    params: nested parameters as the model computes with them now.
    """

    step: jax.Array
    trainable: tree.Flat
    frozen: tree.Flat
    opt_state: Any
    key: jax.Array
    moved: tree.Flat = {}  # noqa: RUF012 - never changed in place

    @property
    def leaves(self) -> tree.Flat:
        """All leaves, flat."""
        return {**self.frozen, **self.moved, **self.trainable}

    @property
    def parted(self) -> tuple[TrainState, tree.Flat]:
        """(the state without its frozen leaves, these)."""
        return self._replace(frozen={}), self.frozen

    @property
    def params(self) -> tree.Params:
        """All leaves, nested."""
        return tree.combine(self.trainable, {**self.frozen, **self.moved})


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    trainable: tree.Flat,
    rest: tree.Flat,
    key: jax.Array,
    model: Model | None = None,
) -> TrainState:
    """The state before the first step; `make_train_step` must be given the same method and optimizer.

    It may be donated: no buffer is in it twice, and types are strong, as a step returns them.

    Args:
      method: of the run.
      optimizer: an optax transform over the flat trainable dict.
      trainable: from `setup`, flat or nested.
      rest: from `setup`, flat or nested.
      key: PRNG key of the run.
      model: the adapted model, for a method whose `update` slot asks the view for the base.
    """
    trainable, rest = tree.flatten(trainable), tree.flatten(rest)
    moved = lying(method, {path: leaf for path, leaf in rest.items() if method.role(path).name == "moved"})
    frozen = {path: leaf for path, leaf in rest.items() if path not in moved}
    view = view_of(model or Model(None, None), method, {**rest, **trainable})  # type: ignore[arg-type]
    opt_state = method.update(optimizer, view).init(trainable)
    seen: set[int] = set()

    def own(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        leaf = jax.lax.convert_element_type(leaf, leaf.dtype) if leaf.weak_type else leaf
        leaf = host.copied(leaf) if id(leaf) in seen else leaf
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, TrainState(jnp.zeros((), jnp.int32), trainable, frozen, opt_state, key, moved))


def lying(method: Method, moved: tree.Flat) -> tree.Flat:
    """The moved leaves, those that the method keeps in the host's memory there."""
    return {path: host.put(leaf) if method.role(path).host else leaf for path, leaf in moved.items()}
