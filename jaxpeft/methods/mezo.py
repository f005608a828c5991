"""MeZO: the gradient from two forward passes along one random direction; no backward pass.

    slope = (L(theta + eps z) - L(theta - eps z)) / (2 eps),   z ~ N(0, I)
    theta <- theta - rate (slope z + decay theta)

z is a function of the step's key, the leaf's path, the layer and the element (`jaxpeft.noise`), and is made where it is
used: in the evaluations inside the block, on one layer's part of a stack, and in the update once more. Nothing is kept
for a backward pass, there are no gradients of weights, and no optimizer state: a step needs what a forward pass needs.

In a chain, theta is what the other methods train, in float32, and slope z is its gradient. Alone, theta is the weights
that `which` names: they are moved leaves, in their own dtype.

Paper: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333.

Deviations: parameters are not changed in place and restored, which adds rounding errors four times a step, but are
perturbed as they are read: vectors in float32, matrices rounded to their dtype. Moved bfloat16 weights are rounded
stochastically, so that steps below half of their last place, which most are, are not lost (`rounding="nearest"` as in
the paper). Micro-batches of a step share z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import noise, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, Leaves, Method, Moment, Objective, Role, Spec, View
from jaxpeft.methods.full import full
from jaxpeft.model import Context, Model, reads_stacks, runs_through_blocks
from jaxpeft.train.optimizer import decays
from jaxpeft.train.step import mean_over
from pallas_kernels.stacked import taken

ROUNDINGS = ("stochastic", "nearest")
_OWN = Role("moved")  # known by its identity among the moved leaves of a chain


def mezo(which: str = "all", eps: float = 1e-3, rounding: str = "stochastic") -> Method:
    """MeZO on what the other methods of a chain train, or, alone, on the weights that `which` names.

    Args:
      which: alone: as in `full`: "all", "biases", "norms", "head", "embeddings", "last:K" or a regular expression.
      eps: how far the two evaluations lie from the parameters. The paper has 1e-3 for weights, 1e-2 for LoRA, 1e-1 for
        prefixes.
      rounding: of moved bfloat16 weights: "stochastic", or "nearest".

    Returns:
      The method, a modifier.

    Raises:
      InputError: for an eps that is not above 0, an unknown rounding, or what `full` refuses. When a step is traced:
        for weights that are quantized, or a step without a learning rate of its own.
    """
    if not (eps > 0 and math.isfinite(eps)):
        raise InputError(f"mezo: eps {eps} must be above 0")
    if rounding not in ROUNDINGS:
        raise InputError(f"mezo: rounding {rounding!r} is not one of {', '.join(ROUNDINGS)}")
    weights = full(which)

    def gradient(objective: Objective, view: View) -> Objective:
        _check(view)
        paths = frozenset(view.trained) | frozenset(_own(view))

        def value_and_grad(trainable, rest, batch, key, opt_state):
            del opt_state
            words = noise.draw(key)

            def side(_, sign):
                noisy = objective.on(lambda model: perturbed(model, paths, words, sign * eps))
                part = lambda batch, key: noisy.value(trainable, rest, batch, None)
                return None, mean_over(part, batch, key, objective.parts)

            _, (values, aux) = jax.lax.scan(side, None, jnp.array([1.0, -1.0]))
            slope = (values[0] - values[1]) / (2 * eps)
            grads = {path: (slope * _z(words, path, leaf)).astype(leaf.dtype) for path, leaf in trainable.items()}
            return (jnp.mean(values), {**jax.tree.map(lambda x: jnp.mean(x, axis=0), aux), "slope": slope}), grads

        return objective._replace(value_and_grad=value_and_grad, backward=False)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        own = {path: leaves.moved[path] for path in _own(moment.view)}
        if own and moment.rate is None:
            raise InputError("mezo: moves the weights itself and needs the step's learning rate: give the step a rate")
        words = noise.draw(moment.key)
        for path, leaf in own.items():
            keys, index = _places(words, path, leaf)
            wide = leaf.astype(jnp.float32)
            step = moment.aux["slope"] * noise.normal(keys, index)
            if moment.decay and decays(path, leaf):
                step = step + moment.decay * wide
            wide = wide - moment.rate * step
            nearest = rounding == "nearest"
            own[path] = wide.astype(leaf.dtype) if nearest else noise.rounded(wide, leaf.dtype, keys, index)
        return leaves._replace(moved={**leaves.moved, **own})

    return Method(
        prepare=weights.prepare,
        gradient=gradient,
        move=move,
        merge=weights.merge,
        specs=(Spec("mezo", {"which": which, "eps": eps, "rounding": rounding}),),
        alone=lambda path: _OWN if weights.trainable(path) else FROZEN,
    )


def _own(view: View) -> list[str]:
    return [path for path in view.shapes if view.role(path) is _OWN]


def _check(view: View) -> None:
    for path in _own(view):
        leaf = view.shapes[path]
        if not (isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise InputError(f"mezo: {path} is quantized and cannot move; name others by `which`, or add an adapter")


# z of whole leaves.


def _places(words: jax.Array, path: str, leaf: Any) -> tuple[jax.Array, jax.Array]:
    """(keys, numbers) of a leaf's elements; those of a stack are counted in each layer."""
    if not tree.stacked(path):
        return noise.of_leaf(words, path), noise.numbers(leaf.shape)
    ((_, first, end),) = tree.segments({path.split("/")[0]: leaf})
    keys = noise.of_leaf(words, path, jnp.arange(first, end))
    return keys.reshape(3, end - first, *[1] * (leaf.ndim - 1)), noise.numbers(leaf.shape[1:])


def _z(words: jax.Array, path: str, leaf: Any) -> jax.Array:
    return jnp.broadcast_to(noise.normal(*_places(words, path, leaf)), leaf.shape)


# The model at theta + eps z.


def perturbed(model: Model, paths: frozenset[str], words: jax.Array, eps: jax.Array) -> Model:
    """The model that computes at theta + eps z, of the parameters theta that it is given.

    Args:
      model: any.
      paths: of theta's leaves.
      words: the draw of z (`noise.draw`).
      eps: () float32; its sign is that of the evaluation.
    """
    stack = model.stack
    inside = runs_through_blocks(stack.run)

    def outer(params):
        """All leaves outside the layers perturbed; a matrix there may be a table, of which no copy is made."""
        flat = tree.flatten(params)
        for path in paths & flat.keys():
            leaf = flat[path]
            if inside and tree.stacked(path):
                continue
            if inside and leaf.ndim == 2 and path.endswith(("embedding", "kernel")):
                flat[path] = noise.Noisy(leaf, noise.of_leaf(words, path), eps)
            else:
                keys, index = _places(words, path, leaf)
                flat[path] = noise.perturbed(leaf, keys, eps, index)
        return tree.unflatten(flat)

    def head(params, x):
        return stack.head(outer(params), x)

    if not inside:  # a run that may read its layers in any way gets whole leaves
        run = lambda _, params, batch, key=None, cache=None: stack.run(stack, outer(params), batch, key, cache)
        return model._replace(stack=stack._replace(run=run, head=head))

    def embed(params, batch, key):
        x, ctx = stack.embed(outer(params), batch, key)
        return x, ctx.add(shared={"mezo": {"words": words, "eps": eps}})

    def layer(function: Callable[..., Any]):
        def call(layer, x, ctx: Context, cache, segment):
            told, flat = ctx.shared["mezo"], tree.flatten(layer)
            for path, leaf in flat.items():
                if (full := f"{segment}/{path}") in paths:
                    keys = noise.of_leaf(told["words"], full, ctx.layer)
                    flat[path] = noise.perturbed(taken(leaf), keys, told["eps"])
            return function(tree.unflatten(flat), x, ctx, cache, segment)

        return reads_stacks(call, like=function)

    return model._replace(stack=stack.map_layers(layer)._replace(embed=embed, head=head))


def state(view: View, **_) -> int:
    """Numbers of the optimizer's state: none."""
    del view
    return 0


ABOUT = About(
    summary="two forward passes along a random direction in place of a backward pass",
    level="step",
    trains="alone: the weights that it names, in their own dtype; else what the rest of the chain trains",
    saves="all that a forward pass does not need: activations, gradients, optimizer state, float32 masters",
    reference="Malladi et al. 2023, arXiv:2305.17333",
    example={},
    promises=Promises(backward=False, state=state, falls=0.05, lr=1e-3),
    defaults=Defaults(lr=1e-6, lr_with={"lora": 5e-5, "prefix": 1e-2}, direction="sgd"),
)
