"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree
from jaxpeft.method import Method


class Mutable(NamedTuple):
    """Leaves that a method changes between steps without differentiating them: indices, masks, sampled layers.

    They live in the optimizer state, where the method's `update` changes them, and lie over the frozen leaves wherever
    the model is computed.

    leaves: {path: leaf}.
    """

    leaves: tree.Flat


class TrainState(NamedTuple):
    """Everything that a step reads and writes: a pytree, so it shards, donates and checkpoints as one.

    step: () int32, steps done.
    trainable: {path: leaf}, float32 masters.
    frozen: {path: leaf}, never differentiated, never changed.
    opt_state: the optimizer's state, the one place for state between steps.
    key: PRNG key of the run; step i uses `fold_in(key, i)`.
    params: nested parameters as the model computes with them now.
    """

    step: jax.Array
    trainable: tree.Flat
    frozen: tree.Flat
    opt_state: Any
    key: jax.Array

    @property
    def params(self) -> tree.Params:
        """Everything, nested, with the method's changes between steps."""
        return tree.combine(self.trainable, {**self.frozen, **mutable(self.opt_state)})


def mutable(opt_state: Any) -> tree.Flat:
    """The leaves of every `Mutable` in an optimizer state."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Mutable))
    return {path: leaf for node in found if isinstance(node, Mutable) for path, leaf in node.leaves.items()}


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    trainable: tree.Flat,
    frozen: tree.Flat,
    key: jax.Array,
) -> TrainState:
    """The state before the first step; `make_train_step` must be given the same method and optimizer.

    It may be donated: no buffer is in it twice, and types are strong, as a step returns them.
    """
    opt_state = method.update(optimizer).init(trainable)
    seen: set[int] = set()

    def own(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        leaf = jax.lax.convert_element_type(leaf, leaf.dtype) if leaf.weak_type else leaf
        leaf = jnp.copy(leaf) if id(leaf) in seen else leaf
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, TrainState(jnp.zeros((), jnp.int32), trainable, frozen, opt_state, key))
