"""Gradients from forward passes alone: what `mezo`, `sparse_mezo`, `qzo` and `zo2` share.

    slope_i = (L(theta + eps d_i) - L(theta - eps d_i)) / (2 eps),   i = 1 ... n
    g       = 1/n sum_i slope_i d_i

d_i is z_i ~ N(0, I), or a part of it that is a function of theta (`jaxpeft.noise.Direction`). It is made of the step's
key, the leaf's path, the layer and the element where it is used: in the evaluations inside the block, on one layer's
part of a stack, and in the update once more. Evaluations are a scan, and the update adds up directions number by
number, so that n of them need the memory of one.

What other methods of a chain train gets g as its gradient. Leaves with the role `OWN` are moved, theta <- theta -
rate (g + decay theta) in their own dtype: their gradient is never an array of its own.

A step that only moves leaves is a function of its key, its rate and its slopes. So a run is the base and two float32
per step, of which `jaxpeft.replay` makes the weights again without a model.

How far a leaf is perturbed is one number, or one for each block (1 + L,): of what lies outside the layers, and of each
layer.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import forward_mode, host, noise, tree
from jaxpeft.errors import InputError, shown
from jaxpeft.method import Leaves, Method, Moment, Objective, Role, View
from jaxpeft.model import Context, Model, reads_stacks, runs_through_blocks
from jaxpeft.models.labels import SCOPE
from jaxpeft.quant import is_packed
from jaxpeft.train.optimizer import decays
from jaxpeft.train.step import mean_over
from pallas_kernels.stacked import taken

VARIANTS = ("sgd", "one_sided", "sign", "momentum", "adam", "conservative", "blockwise", "forward")
MOMENTS = {  # with their numbers per trained one
    "momentum": (functools.partial(optax.trace, decay=0.9), 1),
    "adam": (optax.scale_by_adam, 2),
}
Losses = Callable[[jax.Array, jax.Array], Any]  # (draws (E, 3), how far each (E,) or (E, 1 + L)) -> ((E,), aux)
ROUNDINGS = ("stochastic", "nearest")
MOST_SEEDS = 1024  # each has a name in a step's metrics
_AT_ONCE = 8  # directions that one loop over the numbers adds up
SLOPE = "slope_{}"  # metrics of a step in several directions; of one it is "slope"
OWN, AWAY = Role("moved"), Role("moved", host=True)  # known by their identity among the moved leaves of a chain


class Settings(NamedTuple):
    """How a method estimates.

    name: of the method.  eps: how far the evaluations lie from theta.  seeds: n.
    rounding: of moved bfloat16 leaves: "stochastic" or "nearest".
    kept, relative: of `noise.Direction`.
    scope: where the thresholds of a leaf lie, as `scope + path`, () or (L,) float32; "": there are none.
    clip: of a slope, to [-clip, clip].  floor: of moved leaves, after a step.
    others: whether it estimates for what other methods of a chain train, too.
    variant: of VARIANTS.
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
    variant: str = "sgd"

    def check(self) -> None:
        """Raises InputError for a value that cannot be."""
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise InputError(f"{self.name}: eps {self.eps} must be a finite number above 0")
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise InputError(f"{self.name}: seeds {shown(self.seeds)} must be from 1 to {MOST_SEEDS}")
        if self.rounding not in ROUNDINGS:
            raise InputError(f"{self.name}: rounding {self.rounding!r} is not one of {', '.join(ROUNDINGS)}")
        if self.variant not in VARIANTS:
            raise InputError(f"{self.name}: variant {self.variant!r} is not one of {', '.join(VARIANTS)}")
        if not 0 < self.kept <= 1:
            raise InputError(f"{self.name}: sparsity {1 - self.kept:g} must be at least 0 and below 1")
        if self.variant == "conservative" and self.seeds > 1:
            raise InputError(
                f"{self.name}: seeds {self.seeds}: a conservative step is along one direction; leave it at 1"
            )


def one_by_one(
    objective: Objective, paths: frozenset[str], settings: Settings, trainable: Any, rest: Any, batch: Any, key: Any
) -> Losses:
    """The losses of evaluations, one after the other, each of a model of its own."""

    def evaluate(_, point):
        words, amount = point
        noisy = objective.on(lambda model: perturbed(model, paths, words, amount, settings))
        part = lambda batch, key: noisy.value(trainable, rest, batch, None)
        return None, mean_over(part, batch, key, objective.parts)

    return lambda words, amounts: jax.lax.scan(evaluate, None, (words, amounts))[1]


def estimated(settings: Settings, evaluations: Callable[..., Losses] = one_by_one) -> Method:
    """The slots `gradient`, `update` and `move` of a method that estimates; it gives `OWN` to what it moves itself.

    Args:
      settings: of the method.
      evaluations: how the losses come about; as `one_by_one`.

    Raises:
      InputError: for a value that cannot be. When a step is traced: for leaves of its own that are quantized, or a step
        without a learning rate of its own.
    """
    settings.check()
    name, n = settings.name, settings.seeds

    def gradient(objective: Objective, view: View) -> Objective:
        _check(objective, view, settings)
        paths = frozenset(view.trained) | frozenset(own_of(view))
        held = _blocks(view, paths)

        def value_and_grad(trainable, rest, batch, key, opt_state):
            del opt_state
            draws = noise.draw(key, n)
            losses = evaluations(objective, paths, settings, trainable, rest, batch, key)
            values, aux, slopes = _slopes(losses, draws, held, settings)
            if settings.variant == "conservative":
                if view.rate is None:
                    raise InputError(
                        f"{name}: a conservative step tries its learning rate: give make_train_step a rate"
                    )
                ways = jnp.array([1.0, -1.0, 0.0])
                tried, _ = losses(jnp.repeat(draws, 3, axis=0), -view.rate * slopes * ways)
                slopes = slopes * ways[jnp.argmin(jnp.where(jnp.isnan(tried), jnp.inf, tried))]
            leaves = {**rest, **trainable}
            grads = {
                path: _mean(draws, slopes, path, leaf, leaves, settings)[0].astype(leaf.dtype)
                for path, leaf in trainable.items()
            }
            said = {"slopes": slopes, "slope": jnp.mean(slopes[..., held] if slopes.ndim > 1 else slopes)}
            if slopes.ndim == 1 and n > 1:
                said |= {SLOPE.format(i): slopes[i] for i in range(n)}
            return (jnp.mean(values), {**jax.tree.map(lambda x: jnp.mean(x, axis=0), aux), **said}), grads

        return objective._replace(value_and_grad=value_and_grad, backward=False)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        own = {path: leaves.moved[path] for path in own_of(moment.view)}
        if own and moment.rate is None:
            raise InputError(
                f"{name}: moves leaves itself and needs the step's learning rate: give make_train_step a rate"
            )
        draws = noise.draw(moment.key, n)
        # No constant behind a slope or a rate is folded into the update, which `jaxpeft.replay` is given numbers for.
        slopes, rate = jax.lax.optimization_barrier((moment.aux["slopes"], moment.rate))
        others = {**moment.frozen, **leaves.moved}
        for path, leaf in own.items():
            decay = moment.decay if decays(path, leaf) else 0.0
            if moment.view.role(path) is AWAY:
                own[path] = _by_layers(path, leaf, draws, slopes, rate, decay, settings)
            else:
                step, keys, index = _mean(draws, slopes, path, leaf, others, settings)
                own[path] = _stepped(leaf, step, keys, index, rate, decay, settings)
        return leaves._replace(moved={**leaves.moved, **own})

    def update(optimizer, view):
        if settings.variant not in MOMENTS:
            return optimizer
        if own := own_of(view):
            reason = f"{settings.variant} needs moments, and {own[0]} moves without any"
            raise InputError(f"{name}: {reason}; put full behind it: {name}+full")
        return optax.chain(MOMENTS[settings.variant][0](), optimizer)

    return Method(gradient=gradient, update=update, move=move)


def own_of(view: View) -> list[str]:
    """The paths of the leaves that the estimate moves itself."""
    return [path for path in view.shapes if any(view.role(path) is role for role in (OWN, AWAY))]


def state_numbers(view: View, variant: str = "sgd", **_) -> int:
    """Numbers of the optimizer's state: none, or the moments of what trains."""
    return MOMENTS[variant][1] * tree.size(view.trained) if variant in MOMENTS else 0


def _slopes(
    losses: Losses, draws: jax.Array, held: np.ndarray, settings: Settings
) -> tuple[jax.Array, dict[str, Any], jax.Array]:
    """(losses, what is said of each, slopes) along each draw: (n,), or of each block (n, 1 + L).

    Args:
      losses: of evaluations.
      draws: (n, 3) int32.
      held: (1 + L,), of `_blocks`.
      settings: of the method.
    """
    eps, n = settings.eps, len(draws)
    if settings.variant == "one_sided":
        values, aux = losses(jnp.concatenate([draws[:1], draws]), jnp.full((n + 1,), eps).at[0].set(0))
        slopes = (values[1:] - values[0]) / eps
    elif settings.variant == "blockwise":  # one block after the other
        blocks = jnp.eye(len(held))[held]
        sides = jnp.stack([eps * blocks, -eps * blocks], axis=1).reshape(-1, len(held))
        values, aux = losses(jnp.repeat(draws, len(sides), axis=0), jnp.tile(sides, (n, 1)))
        found = ((values[0::2] - values[1::2]) / (2 * eps)).reshape(n, -1)
        slopes = jnp.zeros((n, len(held))).at[:, np.flatnonzero(held)].set(found)
    elif settings.variant == "forward":  # at theta itself, with a tangent beside each value
        values, slopes, aux = forward_mode.jvp(lambda far: losses(draws, far), jnp.zeros(n), jnp.ones(n))
    else:
        values, aux = losses(jnp.repeat(draws, 2, axis=0), jnp.tile(jnp.array([eps, -eps]), n))
        slopes = (values[0::2] - values[1::2]) / (2 * eps)
    return values, aux, jnp.clip(slopes, -settings.clip, settings.clip)


def _blocks(view: View, paths: frozenset[str]) -> np.ndarray:
    """(1 + L,) bool: whether theta has leaves outside the layers, and in each layer."""
    layers = max((_first(path, leaf)[1] for path, leaf in view.shapes.items() if tree.stacked(path)), default=0)
    held = np.zeros(1 + layers, bool)
    for path in paths:
        first, end = _first(path, view.shapes[path]) if tree.stacked(path) else (-1, 0)
        held[1 + first : 1 + end] = True
    return held


def check_moves(name: str, path: str, leaf: Any) -> None:
    """Raises InputError for a leaf that has no steps of its own."""
    if not (hasattr(leaf, "dtype") and not is_packed(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
        raise InputError(f"{name}: {path} is quantized and cannot move; leave it as it was, or train an adapter")


def _check(objective: Objective, view: View, settings: Settings) -> None:
    name, trained = settings.name, sorted(view.trained)
    for path in own_of(view):
        check_moves(name, path, view.shapes[path])
    if trained and not settings.others:
        advice = "take quantize+mezo+lora" if name == "qzo" else "put mezo in its place"
        why = "--task classify trains" if trained[0].startswith(SCOPE) else "others train"
        raise InputError(f"{name}: does not estimate for what {why}, as {trained[0]}; {advice}")
    if not objective.backward:
        raise InputError(f"{name}: stands behind a method that estimates the gradient, too; leave one of them out")


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


def _of_leaf(amount: jax.Array, path: str, leaf: Any) -> jax.Array:
    """The numbers of a leaf's blocks, which broadcast with it, of one for all or one for each block."""
    if amount.ndim == 0:
        return amount
    if not tree.stacked(path):
        return amount[0]
    first, end = _first(path, leaf)
    return amount[1 + first : 1 + end].reshape(-1, *[1] * (leaf.ndim - 1))


def _mean(
    draws: jax.Array, slopes: jax.Array, path: str, leaf: Any, leaves: Mapping[str, Any], settings: Settings
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(mean of slope d over the draws, keys of the first draw, numbers) of a leaf, float32."""
    wide = leaf.astype(jnp.float32)

    def part(words, slope):
        along, index = direction(words, path, leaf, leaves, settings)
        return _of_leaf(slope, path, leaf) * jnp.broadcast_to(along(wide, index), leaf.shape)

    along, index = direction(draws[0], path, leaf, leaves, settings)
    slopes = jnp.sign(slopes) if settings.variant == "sign" else slopes
    return _summed(part, draws, slopes) / len(draws), along.keys, index


def _summed(part: Callable[[jax.Array, jax.Array], jax.Array], draws: jax.Array, slopes: jax.Array) -> jax.Array:
    """sum_i part(draws_i, slopes_i), written so that a compiler adds up number by number, with no array of its parts.

    Of more than `_AT_ONCE` the sum so far is an array.
    """
    first = len(draws) % _AT_ONCE or _AT_ONCE

    def group(start, size):
        return functools.reduce(operator.add, (part(draws[start + i], slopes[start + i]) for i in range(size)))

    def more(i, total):
        return total + group(first + i * _AT_ONCE, _AT_ONCE)

    total = group(0, min(first, len(draws)))
    groups = (len(draws) - first) // _AT_ONCE
    return jax.lax.fori_loop(0, groups, more, total) if groups > 0 else total


def _stepped(
    leaf: jax.Array,
    step: jax.Array,
    keys: jax.Array,
    index: jax.Array,
    rate: jax.Array,
    decay: float,
    settings: Settings,
) -> jax.Array:
    """leaf - rate (step + decay leaf) in the leaf's dtype."""
    wide = leaf.astype(jnp.float32)
    step = step + decay * wide if decay else step
    wide = jnp.maximum(wide - rate * step, settings.floor)
    return wide.astype(leaf.dtype) if settings.rounding == "nearest" else noise.rounded(wide, leaf.dtype, keys, index)


def _by_layers(
    path: str, leaf: jax.Array, draws: jax.Array, slopes: jax.Array, rate: jax.Array, decay: float, settings: Settings
) -> jax.Array:
    """A stack in the host's memory after a step: each layer comes to the device and goes back to its place."""
    first, end = _first(path, leaf)

    def one(i, stack):
        layer = host.fetched(jax.lax.dynamic_index_in_dim(stack, i, keepdims=False))
        wide, index = layer.astype(jnp.float32), noise.numbers(layer.shape)

        def along(words):
            return noise.Direction(noise.of_leaf(words, path, first + i), None, settings.kept, settings.relative)

        part = lambda words, slope: slope * along(words)(wide, index)
        step = _summed(part, draws, slopes) / len(draws)
        layer = _stepped(layer, step, along(draws[0]).keys, index, rate, decay, settings)
        return jax.lax.dynamic_update_index_in_dim(stack, host.put(layer), i, 0)

    return jax.lax.fori_loop(0, end - first, one, host.put(leaf))


# The model at theta + eps d.


def perturbed(model: Model, paths: frozenset[str], words: jax.Array, eps: Any, settings: Settings) -> Model:
    """The model that computes at theta + eps d, of the parameters theta that it is given.

    Args:
      model: any.
      paths: of theta's leaves.
      words: the draw of z (`noise.draw`).
      eps: () float32, or one for each block (1 + L,); its sign is that of the evaluation.
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
            amount = _of_leaf(jnp.asarray(eps), path, leaf)
            if inside and leaf.ndim == 2 and path.endswith(("embedding", "kernel")):
                flat[path] = noise.Noisy(leaf, along, amount)
            else:
                flat[path] = noise.perturbed(leaf, along, amount, index)
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
            amount = told["eps"] if jnp.ndim(told["eps"]) == 0 else told["eps"][1 + ctx.layer]
            for path, leaf in flat.items():
                if (full := f"{segment}/{path}") in paths:
                    keys, below = noise.of_leaf(told["words"], full, ctx.layer), told["below"].get(full)
                    if below is not None:
                        below = below[ctx.layer - _first(full, below)[0]]
                    along = noise.Direction(keys, below, settings.kept, settings.relative)
                    flat[path] = noise.perturbed(taken(leaf), along, amount)
            return function(tree.unflatten(flat), x, ctx, cache, segment)

        return reads_stacks(call, like=function)

    return model._replace(stack=stack.map_layers(layer)._replace(embed=embed, head=head))
