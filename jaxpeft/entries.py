"""Entries of kernels that train and are chosen anew: whose turn it is, dW of one layer, what is replaced, moments.

Leaves are `<site>/<name>/index` and `values` (L, k), see `jaxpeft.sparse`. Layers take turns, so that dW exists of one
layer at a time: `jaxpeft.methods.spiel`, `speft` and `sparsegrad` say which of its entries are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import sites, tree
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, MOVED, TRAINED, Leaves, Moment, Objective, Roles, View, about, told
from jaxpeft.quant import is_packed
from jaxpeft.targets import chooses

BETAS = (0.9, 0.999)  # Adam's


class Turns(NamedTuple):
    """sites: {site: numbers of its layers; None outside of the layers, whose turn is that of layer 0}."""

    sites: dict[str, range | None]

    @property
    def layers(self) -> int:
        return max([1, *(numbers.stop for numbers in self.sites.values() if numbers is not None)])

    def now(self, step: jax.Array, every: int) -> dict[str, jax.Array]:
        """{site: () int32, whose turn it is, as a place in its stack; -1: nobody's}."""
        layers, phase = self.layers, step % every
        later = -(-phase * layers // every)
        later = jnp.where((later < layers) & (later * every // layers == phase), later, -1)
        layer = jnp.where(step < every, jnp.where((step >= 0) & (step < layers), step, -1), later)

        def place(numbers):
            first, end = (0, 1) if numbers is None else (numbers.start, numbers.stop)
            return jnp.where((layer >= first) & (layer < end), layer - first, -1)

        return {site: place(numbers) for site, numbers in self.sites.items()}

    def begun(self, site: str, step: jax.Array) -> jax.Array:
        """(L, 1), or (): whether a layer has had a turn by this step."""
        numbers = self.sites[site]
        return step >= 0 if numbers is None else (jnp.arange(numbers.start, numbers.stop) <= step)[:, None]


def turns(values: Mapping[str, Any], suffix: str) -> Turns:
    """Of {site and suffix: values} (L, k), or (k,) outside of the layers.

    Raises:
      InputError: for values of stacks in stacks.
    """
    found: dict[str, range | None] = {}
    for path, leaf in values.items():
        site, numbers = path.removesuffix(suffix), None
        if leaf.ndim > 2:
            name = suffix.split("/")[1]
            raise InputError(f"{name}: {site} is stacked in stacks, whose layers take no turns; leave it out")
        if leaf.ndim > 1:
            segment = tree.segments({path.split("/", 1)[0]: {"": leaf}})  # none: a stack of a module of one's own
            numbers = range(*segment[0][1:]) if segment else range(len(leaf))
        found[site] = numbers
    return Turns(found)


def at_layer(function: Callable[[dict], dict], place: jax.Array, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a function makes of one layer's leaves, written to its place; of -1 the leaves are what they were."""
    stacked = leaves["values"].ndim > 1
    own = {name: leaf[jnp.maximum(place, 0)] if stacked else leaf for name, leaf in leaves.items()}
    as_it_is = lambda own: {"index": own["index"], **none(own["values"])}
    found = jax.lax.cond(place >= 0, function, as_it_is, own)
    if not stacked:
        return found
    blank = {"index": leaves["index"], **none(leaves["values"])}
    return {name: blank[name].at[jnp.maximum(place, 0)].set(leaf) for name, leaf in found.items()}


def none(values: jax.Array) -> dict[str, jax.Array]:
    """Of a layer whose entries stay: nothing is fresh."""
    zeros = jnp.zeros(values.shape)
    return {"fresh": jnp.zeros(values.shape, bool), "mean": zeros, "square": zeros}


def dense_leaves(
    name: str, picks: Mapping[str, jax.Array], values: tree.Flat, rest: tree.Flat
) -> tuple[tree.Flat, tree.Flat]:
    """({`<name>/dense/<site>`: zeros (n, m)}, {`<site>/<name>/due`: whose they are}): leaves whose gradient is dW.

    picks: {site: () int32, place of its layer; -1: of none}.
    """
    whole, due = {}, {}
    for site, place in picks.items():
        leaf = values[f"{site}/{name}/values"]
        shape = rest[sites.kernel_path(rest, site)].shape[-2:]
        whole[f"{name}/dense/{site}"] = jnp.zeros(shape, jnp.float32)
        due[f"{site}/{name}/due"] = jnp.arange(len(leaf)) == place if leaf.ndim > 1 else place == 0
    return whole, due


def own_dense(module: Any, name: str, site: sites.Site, ctx: Any, dtype: Any) -> jax.Array | None:
    """What an adapter's product has of `dense_leaves`; None where there are none."""
    if not module.has_variable("params", "due"):
        return None
    own = tree.flatten(ctx.shared[name])[f"dense/{site.path}"]
    return jnp.where(module.get_variable("params", "due"), own, 0).astype(dtype)


def replaced(
    index: jax.Array,
    values: jax.Array,
    candidates: jax.Array,
    scores: jax.Array,
    count: jax.Array,
    shape: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Drops `count` entries with the least |v| for candidates with the largest scores.

    Args:
      index, values: (k,) of different entries of a matrix of this shape, and what is there.
      candidates, scores: (k,), different entries, which may be active; those of score 0 and below are none.
      count: () int32.

    Returns:
      Entries, all different; for each of them its candidate; and whether it is fresh, all (k,). Where a fresh one lies
      depends on which are chosen alone, and not on the order of their scores, in which rounding may change places.
    """
    k = len(index)
    numbers = jnp.arange(k)
    order = jnp.argsort(jnp.abs(values))
    out = jnp.zeros(k, bool).at[order].set(numbers < count)
    slot = jnp.full(shape[0] * shape[1], -1, jnp.int32).at[index].set(numbers.astype(jnp.int32))[candidates]
    active = slot >= 0
    scores = jnp.where(active & ~out[slot], -1, scores)
    best = jnp.argsort(-scores)
    taken = jnp.zeros(k, bool).at[best].set(numbers < count) & (scores > 0)
    stays = jnp.zeros(k, bool).at[jnp.where(taken & active, slot, k)].set(True, mode="drop")
    grown = taken & ~active
    source = jnp.zeros(k, jnp.int32).at[jnp.where(grown, jnp.cumsum(grown) - 1, k)].set(numbers, mode="drop")
    free = (out & ~stays)[order]  # the smallest first
    fresh = jnp.zeros(k, bool).at[order].set(free & (jnp.cumsum(free) <= jnp.sum(grown)))
    source = source[jnp.maximum(jnp.cumsum(fresh) - 1, 0)]
    return jnp.where(fresh, candidates[source], index), source, fresh


def seeded(name: str, optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with moments of the entries that are fresh in `<site>/<name>/values` from what has scored them."""
    suffix = f"/{name}/values"

    def update(grads, state, params=None, *, aux=None, **extra):
        updates, state = optimizer.update(grads, state, params, aux=aux, **extra)
        fresh = {path: told(name, aux, path.replace("values", "fresh")) for path in grads if path.endswith(suffix)}

        def adam(path, moments, what, bias):
            return jnp.where(fresh[path], aux[path.replace("values", what)] * bias, moments)

        def part(keys, leaf):
            if isinstance(leaf, optax.ScaleByAdamState):
                bias = [1 - beta ** leaf.count.astype(jnp.float32) for beta in BETAS]
                mu, nu = dict(leaf.mu), dict(leaf.nu)
                for path in fresh:
                    mu[path] = adam(path, mu[path], "mean", bias[0])
                    nu[path] = adam(path, nu[path], "square", bias[1])
                return leaf._replace(mu=mu, nu=nu)
            path = next((key.key for key in keys if getattr(key, "key", None) in fresh), None)
            like = path is not None and getattr(leaf, "shape", None) == fresh[path].shape
            return jnp.where(fresh[path], jnp.zeros_like(leaf), leaf) if like else leaf

        whole = lambda x: isinstance(x, optax.ScaleByAdamState)
        return updates, jax.tree.map_with_path(part, state, is_leaf=whole)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


class Refresh(NamedTuple):
    """Entries chosen anew every so many steps, of which those that leave are folded into kernels that are moved leaves.

    name: the method's.  every: steps from one choice of a layer's entries to the next; 0: the first choice stays.
    """

    name: str
    every: int

    @property
    def steps(self) -> str:
        """The path of the count of steps."""
        return f"{self.name}/steps"

    @property
    def values(self) -> str:
        """How a path of values ends."""
        return f"/{self.name}/values"

    def roles(self, targets: Any) -> Callable[[Roles], Roles]:
        """The slot: values train; what is chosen anew, and the kernels that take up what leaves, move."""

        def slot(others):
            def role(path):
                if path.endswith(self.values):
                    return TRAINED
                if self.every and (path == self.steps or path.endswith(f"/{self.name}/index")):
                    return MOVED
                kernel = self.every and path.endswith("/kernel") and others(path) == FROZEN
                return MOVED if kernel and chooses(targets, path.removesuffix("/kernel")) else others(path)

            return role

        return slot

    def begun(self, params: tree.Params) -> tree.Params:
        """The adapted parameters with the count of steps.

        Raises:
          InputError: for a period shorter than the layers' turns.
        """
        values = {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith(self.values)}
        if (layers := turns(values, self.values).layers) > self.every:
            raise InputError(
                f"{self.name}: refresh {self.every} must be at least {layers}: that many layers take turns"
            )
        return {**params, self.name: {"steps": jnp.zeros((), jnp.int32), **params.get(self.name, {})}}

    def check_chain(self, flat: tree.Flat, found: list[str], view: View) -> None:
        """Raises InputError for a chain in which entries cannot be chosen anew."""
        chained, name = "+".join(spec.name for spec in view.specs), self.name
        if blind := [spec.name for spec in view.specs if not about(spec.name).promises.backward]:
            raise InputError(f"{chained}: {name}'s refresh chooses by gradients, and {blind[0]} has no backward pass")
        for site in found:
            kernel, values = sites.kernel_path(flat, site), f"{site}{self.values}"
            if is_packed(flat[kernel]):
                raise InputError(
                    f"{name}: {site} is quantized, and cannot take up what refresh folds; leave refresh at 0"
                )
            if (role := view.role(kernel).name) != "moved":
                raise InputError(f"{chained}: {name}'s refresh folds into {kernel}, which would be {role}")
            if (role := view.role(values).name) != "trained":
                raise InputError(f"{chained}: {name}'s values are differentiated whole, and {values} would be {role}")

    def gradient(self, chosen: Callable[..., dict[str, jax.Array]]) -> Callable[[Objective, View], Objective]:
        """The slot.

        Args:
          chosen: (index (k,), values (k,), w (n, m), g (n, m)) -> {"index", "fresh", "mean", "square"}, all (k,): a
            kernel's entries after a choice, which are fresh, and what their moments start at; g is the gradient of the
            zeros that `own_dense` gives.
        """
        return lambda objective, view: objective._replace(value_and_grad=self._value_and_grad(objective, chosen))

    def _value_and_grad(self, objective: Objective, chosen: Callable[..., dict[str, jax.Array]]) -> Callable[..., Any]:
        name, suffix = self.name, self.values

        def value_and_grad(trainable, rest, batch, key, opt_state):
            values = {path: leaf for path, leaf in trainable.items() if path.endswith(suffix)}
            now = turns(values, suffix).now(rest[self.steps], self.every)
            picks = {site: jnp.where(rest[self.steps] >= self.every, place, -1) for site, place in now.items()}
            own = {site: {"index": rest[f"{site}/{name}/index"], "values": values[f"{site}{suffix}"]} for site in picks}

            def go_on():
                value, grads = objective.value_and_grad(trainable, rest, batch, key, opt_state)
                return value, grads, {site: {"index": x["index"], **none(x["values"])} for site, x in own.items()}

            def pick():
                whole, due = dense_leaves(name, picks, values, rest)
                value, grads = objective.value_and_grad({**trainable, **whole}, {**rest, **due}, batch, key, opt_state)
                found = {}
                for site, place in picks.items():
                    g, kernel = grads.pop(f"{name}/dense/{site}"), rest[f"{site}/kernel"]
                    w = kernel[jnp.maximum(place, 0)] if kernel.ndim > 2 else kernel
                    again = lambda x, w=w, g=g: chosen(x["index"], x["values"], w, g)
                    found[site] = at_layer(again, place, own[site])
                return value, grads, found

            anyone = jnp.any(jnp.stack([place >= 0 for place in picks.values()]))
            (loss, aux), grads, found = jax.lax.cond(anyone, pick, go_on)
            said = {f"{site}/{name}/{part}": leaf for site, x in found.items() for part, leaf in x.items()}
            return (loss, {**aux, **said}), grads

        return value_and_grad

    def move(self, fold: Callable[..., jax.Array]) -> Callable[[Leaves, Moment], Leaves]:
        """The slot.

        Args:
          fold: (site, kernel (..., n, m), index (..., k), what leaves (..., k), the moment) -> the kernel with it.
        """

        def slot(leaves: Leaves, moment: Moment) -> Leaves:
            trained, moved = dict(leaves.trained), dict(leaves.moved)
            for path in [path for path in trained if path.endswith(self.values)]:
                site = path.removesuffix(self.values)
                at, own = f"{site}/{self.name}/index", f"{site}/kernel"
                index, fresh = (
                    told(self.name, moment.aux, f"{site}/{self.name}/{part}") for part in ("index", "fresh")
                )
                moved[own] = fold(site, moved[own], moved[at], jnp.where(fresh, trained[path], 0), moment)
                moved[at], trained[path] = index, jnp.where(fresh, 0, trained[path])
            moved[self.steps] = moved[self.steps] + 1
            return Leaves(trained, moved)

        return slot
