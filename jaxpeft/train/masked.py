"""Freezing by `optax.masked`, for loops that differentiate the whole parameter tree.

    tx = jp.masked(method, optax.adam(1e-3))
    opt_state = tx.init(params)
    grads = jax.grad(loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)

The trained leaves have the optimizer's state, all others a zero update, so that in one compiled step nothing reads a
frozen leaf's gradient, and the compiler never makes it. One logged `optax.global_norm(grads)` reads them all, and they
all come back; structural freezing (`jp.setup`, `jp.make_train_step`) has nothing that could be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, unchanged, view_of
from jaxpeft.model import Model
from jaxpeft.quant import is_packed


def trainable_mask(method: Method, params: Mapping[str, Any]) -> tree.Params:
    """A tree like `params` of booleans: True where the method trains.

    Args:
      method: the method.
      params: nested parameters or their shapes, adapters among them: `jp.combine(trainable, rest)` of `setup`.

    Raises:
      InputError: if no leaf trains, as where the adapters are missing.
    """
    mask = {path: method.trainable(path) for path in tree.flatten(params)}
    if not any(mask.values()):
        raise InputError(
            f"{method.name}: none of {len(mask)} leaves trains; give all of the adapted model's, "
            f"jp.combine(trainable, rest) of jp.setup"
        )
    return tree.unflatten(mask)


def masked(method: Method, optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer over the whole parameter tree that changes what the method trains, and nothing else.

    Two `optax.masked`: the method's own form of the optimizer (LoRA+'s rates, ...) on the trained leaves, zeros on all
    others. Given the same gradients, the leaves are those of `make_train_step` with the same optimizer to the bit. (Two
    programs may round gradients differently: most methods' are equal compiled, too.)

    Args:
      method: the method.
      optimizer: an optax optimizer, rate and all.

    Returns:
      A transform over nested parameters as `setup` made them: trained leaves are masters, float32 unless the method
      says otherwise. Integer leaves, whose gradients `jax.grad(..., allow_int=True)` gives as float0, stay.

    Raises:
      InputError: for a method whose step does more than an optimizer can. In `init`: for a tree without trained leaves,
        or with packed kernels, which have no gradient.
    """
    slots = [slot for slot in ("gradient", "move") if getattr(method, slot) is not unchanged]
    if slots:
        raise InputError(
            f"{method.name}: an optax transform cannot do its own {' and '.join(slots)}; use jp.make_train_step"
        )

    def both(params: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        mask = trainable_mask(method, params)
        view = view_of(Model(None, None), method, params)  # type: ignore[arg-type]
        frozen = jax.tree.map(lambda trains: not trains, mask)
        own = _flat(optax.with_extra_args_support(method.update(optimizer, view)))
        return optax.chain(optax.masked(own, mask), optax.masked(_zeros(), frozen))

    def init(params):
        if packed := [path for path, leaf in tree.flatten(params).items() if is_packed(leaf)]:
            raise InputError(
                f"{method.name}: {packed[0]} is packed and cannot be differentiated; use jp.make_train_step, which "
                f"differentiates the trained leaves alone"
            )
        return both(params).init(params)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("masked: update needs the parameters too")
        return both(params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _flat(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """A transform over {path: trained leaf}, as methods know them, over a nested tree with holes."""

    def present(nested: Any) -> tree.Flat:
        return {path: x for path, x in tree.flatten(nested).items() if not isinstance(x, optax.MaskedNode)}

    def init(params):
        return inner.init(present(params))

    def update(updates, state, params=None, **extra):
        found, state = inner.update(present(updates), state, present(params), **extra)
        return tree.unflatten({**tree.flatten(updates), **found}), state

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros() -> optax.GradientTransformation:
    """`optax.set_to_zero`, also where a gradient is float0, to which nothing can be added."""
    zero = optax.set_to_zero()

    def update(updates, state, params=None):
        def like(update, leaf):
            return jnp.zeros(leaf.shape, leaf.dtype) if update.dtype == jax.dtypes.float0 else update

        return zero.update(jax.tree.map(like, updates, params), state, params)

    return optax.GradientTransformation(zero.init, update)
