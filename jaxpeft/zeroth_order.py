"""Gradients from forward passes alone: what `mezo`, `sparse_mezo` and `qzo` share.

    slope_i = (L(theta + eps d_i) - L(theta - eps d_i)) / (2 eps),   i = 1 ... n
    g       = 1/n sum_i slope_i d_i

d_i is z_i ~ N(0, I), or a part of it that is a function of theta (`jaxpeft.noise.Direction`). It is made of the step's
key, the leaf's path, the layer and the element where it is used: in the evaluations inside the block, on one layer's
part of a stack, and in the update once more. Evaluations are a scan, so that n directions need the memory of one.

What other methods of a chain train gets g as its gradient. Leaves with the role `OWN` are moved, theta <- theta -
rate (g + decay theta) in their own dtype: their gradient is never an array of its own.

How far a leaf is perturbed is one number, or one for each block (1 + L,): of what lies outside the layers, and of each
layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import noise, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Leaves, Method, Moment, Objective, Role, View
from jaxpeft.model import Context, Model, reads_stacks, runs_through_blocks
from jaxpeft.quant import is_packed
from jaxpeft.train.optimizer import decays
from jaxpeft.train.step import mean_over
from pallas_kernels.stacked import taken

ROUNDINGS = ("stochastic", "nearest")
OWN = Role("moved")  # known by its identity among the moved leaves of a chain


class Settings(NamedTuple):
    """How a method estimates.

    name: of the method.  eps: how far the evaluations lie from theta.  seeds: n.
    rounding: of moved bfloat16 leaves: "stochastic" or "nearest".
    kept, relative: of `noise.Direction`.
    scope: where the thresholds of a leaf lie, as `scope + path`, () or (L,) float32; "": there are none.
    clip: of a slope, to [-clip, clip].  floor: of moved leaves, after a step.
    others: whether it estimates for what other methods of a chain train, too.
    """

    name: str
    eps: float
    seeds: int = 1
    rounding: str = "stochastic"
    kept: float = 1.0
    relative: bool = False
    scope: str = ""
    clip: float = math.inf
    floor: float = -math.inf
    others: bool = True

    def check(self) -> None:
        """Raises InputError for a value that cannot be."""
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise InputError(f"{self.name}: eps {self.eps} must be above 0")
        if self.seeds < 1:
            raise InputError(f"{self.name}: seeds {self.seeds} must be at least 1")
        if self.rounding not in ROUNDINGS:
            raise InputError(f"{self.name}: rounding {self.rounding!r} is not one of {', '.join(ROUNDINGS)}")


def estimated(settings: Settings) -> Method:
    """The slots `gradient` and `move` of a method that estimates; it gives `OWN` to what it moves itself.

    Raises:
      InputError: for a value that cannot be. When a step is traced: for leaves of its own that are quantized, or a step
        without a learning rate of its own.
    """
    settings.check()
    name, eps, n = settings.name, settings.eps, settings.seeds

    def gradient(objective: Objective, view: View) -> Objective:
        _check(objective, view, settings)
        paths = frozenset(view.trained) | frozenset(own_of(view))

        def value_and_grad(trainable, rest, batch, key, opt_state):
            del opt_state
            draws = noise.draw(key, n)

            def evaluate(_, point):
                words, amount = point
                noisy = objective.on(lambda model: perturbed(model, paths, words, amount, settings))
                part = lambda batch, key: noisy.value(trainable, rest, batch, None)
                return None, mean_over(part, batch, key, objective.parts)

            points = jnp.repeat(draws, 2, axis=0), jnp.tile(jnp.array([eps, -eps]), n)
            _, (values, aux) = jax.lax.scan(evaluate, None, points)
            slopes = (values[0::2] - values[1::2]) / (2 * eps)
            slopes = jnp.clip(slopes, -settings.clip, settings.clip)
            leaves = {**rest, **trainable}
            grads = {
                path: _mean(draws, slopes, path, leaf, leaves, settings)[0].astype(leaf.dtype)
                for path, leaf in trainable.items()
            }
            said = {"slopes": slopes, "slope": jnp.mean(slopes)}
            return (jnp.mean(values), {**jax.tree.map(lambda x: jnp.mean(x, axis=0), aux), **said}), grads

        return objective._replace(value_and_grad=value_and_grad, backward=False)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        own = {path: leaves.moved[path] for path in own_of(moment.view)}
        if own and moment.rate is None:
            raise InputError(f"{name}: moves leaves itself and needs the step's learning rate: give the step a rate")
        draws = noise.draw(moment.key, n)
        others = {**moment.frozen, **leaves.moved}
        for path, leaf in own.items():
            wide = leaf.astype(jnp.float32)
            step, keys, index = _mean(draws, moment.aux["slopes"], path, leaf, others, settings)
            if moment.decay and decays(path, leaf):
                step = step + moment.decay * wide
            wide = jnp.maximum(wide - moment.rate * step, settings.floor)
            nearest = settings.rounding == "nearest"
            own[path] = wide.astype(leaf.dtype) if nearest else noise.rounded(wide, leaf.dtype, keys, index)
        return leaves._replace(moved={**leaves.moved, **own})

    return Method(gradient=gradient, move=move)


def own_of(view: View) -> list[str]:
    """The paths of the leaves that the estimate moves itself."""
    return [path for path in view.shapes if view.role(path) is OWN]


def state_numbers(view: View, **_) -> int:
    """Numbers of the optimizer's state: none."""
    del view
    return 0


def check_moves(name: str, path: str, leaf: Any) -> None:
    """Raises InputError for a leaf that has no steps of its own."""
    if not (hasattr(leaf, "dtype") and not is_packed(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
        raise InputError(f"{name}: {path} is quantized and cannot move; name others by `which`, or add an adapter")


def _check(objective: Objective, view: View, settings: Settings) -> None:
    name, trained = settings.name, sorted(view.trained)
    if not objective.backward:
        raise InputError(f"{name}: stands behind a method that estimates the gradient, too; leave one of them out")
    if trained and not settings.others:
        raise InputError(f"{name}: does not estimate for what others train, as {trained[0]}; put mezo in its place")
    for path in own_of(view):
        check_moves(name, path, view.shapes[path])


# Directions of whole leaves.


def _first(path: str, leaf: Any) -> tuple[int, int]:
    """(first layer, end) of the stack that a leaf is."""
    ((_, first, end),) = tree.segments({path.split("/")[0]: leaf})
    return first, end


def direction(
    words: jax.Array, path: str, leaf: Any, leaves: Mapping[str, Any], settings: Settings
) -> tuple[noise.Direction, jax.Array]:
    """(d, numbers of the elements) of a whole leaf; those of a stack are counted in each layer.

    Args:
      words: (3,) int32, the draw.
      path: of the leaf.
      leaf: the leaf.
      leaves: flat; the thresholds are among them, if there are some.
      settings: of the method.
    """
    below = leaves[settings.scope + path] if settings.scope else None
    if not tree.stacked(path):
        keys, index = noise.of_leaf(words, path), noise.numbers(leaf.shape)
    else:
        first, end = _first(path, leaf)
        ones = [1] * (leaf.ndim - 1)
        keys = noise.of_leaf(words, path, jnp.arange(first, end)).reshape(3, end - first, *ones)
        below, index = below if below is None else below.reshape(-1, *ones), noise.numbers(leaf.shape[1:])
    return noise.Direction(keys, below, settings.kept, settings.relative), index


def _mean(
    draws: jax.Array, slopes: jax.Array, path: str, leaf: Any, leaves: Mapping[str, Any], settings: Settings
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(mean of slope d over the draws, keys of the first draw, numbers) of a leaf, float32."""
    wide = leaf.astype(jnp.float32)

    def part(words, slope):
        along, index = direction(words, path, leaf, leaves, settings)
        return slope * jnp.broadcast_to(along(wide, index), leaf.shape)

    along, index = direction(draws[0], path, leaf, leaves, settings)
    return jnp.mean(jax.vmap(part)(draws, slopes), axis=0), along.keys, index


# The model at theta + eps d.


def perturbed(model: Model, paths: frozenset[str], words: jax.Array, eps: Any, settings: Settings) -> Model:
    """The model that computes at theta + eps d, of the parameters theta that it is given.

    Args:
      model: any.
      paths: of theta's leaves.
      words: the draw of z (`noise.draw`).
      eps: () float32; its sign is that of the evaluation.
      settings: of the method.
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
            along, index = direction(words, path, leaf, flat, settings)
            if inside and leaf.ndim == 2 and path.endswith(("embedding", "kernel")):
                flat[path] = noise.Noisy(leaf, along, eps)
            else:
                flat[path] = noise.perturbed(leaf, along, eps, index)
        return tree.unflatten(flat)

    def head(params, x):
        return stack.head(outer(params), x)

    if not inside:  # a run that may read its layers in any way gets whole leaves
        run = lambda _, params, batch, key=None, cache=None: stack.run(stack, outer(params), batch, key, cache)
        return model._replace(stack=stack._replace(run=run, head=head))

    def embed(params, batch, key):
        x, ctx = stack.embed(outer(params), batch, key)
        flat = tree.flatten(params)
        below = {path: flat[settings.scope + path] for path in paths if settings.scope and tree.stacked(path)}
        return x, ctx.add(shared={"zeroth_order": {"words": words, "eps": eps, "below": below}})

    def layer(function: Callable[..., Any]):
        def call(layer, x, ctx: Context, cache, segment):
            told, flat = ctx.shared["zeroth_order"], tree.flatten(layer)
            for path, leaf in flat.items():
                if (full := f"{segment}/{path}") in paths:
                    keys, below = noise.of_leaf(told["words"], full, ctx.layer), told["below"].get(full)
                    if below is not None:
                        below = below[ctx.layer - _first(full, below)[0]]
                    along = noise.Direction(keys, below, settings.kept, settings.relative)
                    flat[path] = noise.perturbed(taken(leaf), along, told["eps"])
            return function(tree.unflatten(flat), x, ctx, cache, segment)

        return reads_stacks(call, like=function)

    return model._replace(stack=stack.map_layers(layer)._replace(embed=embed, head=head))
