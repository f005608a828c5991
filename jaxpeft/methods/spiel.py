"""SpIEL: a sparse update of each kernel whose entries are chosen anew now and then, by the gradient.

    y = x (W + S)        x (..., n), W (n, m) frozen, S (n, m) zero but at k = density n m entries
    S[idx_t] = v_t       idx (k,) entries of W row after row, moved; v (k,) trained

Every `every` steps p k entries with the least |v| are dropped for the p k best candidates that are not active. Those
start at v = 0. What is dropped and best at once stays as it is. k is static, and no entry is there twice.

    grow="gradient"  (SpIEL-AG) candidates are the k largest |dW|; their dW and dW^2 are summed over `accumulate` steps,
                     and score |sum dW|. A grown entry's moments are the sums' means: Adam's m and v after its bias
                     correction are mean dW and mean dW^2
    grow="moments"   (SpIEL-MA) SM3's sums of squares, of active entries alone, score all others by r_i c_j:
                         u_t = min(r_i, c_j) + dv_t^2,   r_i <- max(r_i, u_t),   c_j <- max(c_j, u_t)
                     A grown entry's m is 0, and its v the mean square that its row and column admit

p is 1 at first, then `drop`, which falls to zero at step `until` where that is given. Layers take turns: layer l of L
at the steps l (the first time) and then floor(l every / L) in each period. So dW exists of one layer at a time: that
layer's leaves, zeros in S, have it for their gradient in the step that picks candidates; and it is the step's own
gradient, of all groups of rows and micro-batches. Until a layer's first choice its values stay zero.

Kept for the backward pass: x, as LoRA keeps it; S and its gradient are made one at a time, as large as a kernel.
Bytes of an entry: 16, of v, Adam's two moments and idx, and, of "gradient", 12 of a candidate's idx and sums; of
"moments", 4 (n + m) of a kernel. Merging is exact up to rounding: W <- W + S.

Paper: Ansell et al. 2024, "Scaling Sparse Fine-Tuning to Large Language Models", arXiv:2401.16405. Deviations: layers
take turns; |v| is read before the step in whose end it is dropped; moments share one count of steps, where the
published code has an age of each entry: at the choice they are as there, and are then averaged as old ones are. (The
codes of adam8bit stay those of the entry before; other optimizers' numbers of a grown entry are zero.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxpeft import sites, sparse, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import MOVED, TRAINED, Leaves, Method, Moment, Objective, Spec, View, about, told
from jaxpeft.methods import shira as _shira
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Context, Model

GROWTHS = {"gradient": ("candidates", "sum", "squares"), "moments": ("rows", "columns")}
STEPS = "spiel/steps"
VALUES = "/spiel/values"
BETAS = (0.9, 0.999)  # Adam's


class SpIEL(nn.Module):
    """The adapted product. Parameters: index (k,) int32, values (k,) float32; and, of what scores,

    candidates (k,) int32, sum and squares (k,); or rows (n,) and columns (m,) float32.
    """

    stacked = True  # only the product reads the kernel

    density: float
    grow: str

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        count, zeros = sparse.entries(self.density, n, m), nn.initializers.zeros
        index = self.param("index", lambda key: sparse.flat_draw(key, n, m, count))
        values = self.param("values", zeros, (count,))
        if self.grow == "gradient":
            candidates = self.param("candidates", zeros, (count,), jnp.int32)
            self.param("sum", zeros, (count,))
            self.param("squares", zeros, (count,))
        else:
            self.param("rows", zeros, (n,))
            self.param("columns", zeros, (m,))
        whole = None
        if self.has_variable("params", "probe"):
            index = jnp.concatenate([index, candidates])
            values = jnp.concatenate([values, self.get_variable("params", "probe")])
        if self.has_variable("params", "due"):
            own = tree.flatten(ctx.shared["spiel"])[f"dense/{site.path}"]
            whole = jnp.where(self.get_variable("params", "due"), own, 0).astype(x.dtype)
        return inner(x) + sparse.product(x, index, values, (n, m), whole)


def spiel(
    density: float = 0.01,
    every: int = 100,
    accumulate: int = 5,
    drop: float = 0.2,
    until: int = 0,
    grow: str = "gradient",
    targets: Targets = "all-linear",
) -> Method:
    """SpIEL on the sites that `targets` chooses.

    Args:
      density: share of a kernel's entries that train.
      every: steps from one choice of a layer's entries to the next; at least as many as there are layers.
      accumulate: steps over which candidates are scored.
      drop: p, share of the entries that may be dropped at a choice, the first one, which is of all, apart.
      until: step at which p has fallen to zero; 0: it stays.
      grow: "gradient" (SpIEL-AG) or "moments" (SpIEL-MA).
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/spiel/values` (L, k).

    Raises:
      InputError: for an argument outside its range, a period shorter than the layers' turns, a kernel of more than
        2^31 - 1 entries, targets that match nothing, or a chain in which the values do not train as they are.
    """
    config = dict(locals())
    sparse.check_density("spiel", density)
    if accumulate < 1:
        raise InputError(f"spiel: accumulate {accumulate} must be at least 1")
    if every < accumulate:
        raise InputError(f"spiel: every {every} must be at least accumulate, {accumulate}")
    if not 0 < drop <= 1:
        raise InputError(f"spiel: drop {drop} must be above 0 and at most 1")
    if until < 0:
        raise InputError(f"spiel: until {until} must be at least 0")
    if grow not in GROWTHS:
        raise InputError(f"spiel: grow {grow!r} is not one of {', '.join(GROWTHS)}")
    own = {"values": TRAINED, **dict.fromkeys(("index", *GROWTHS[grow]), MOVED)}

    def roles(others):
        def role(path):
            if path == STEPS:
                return MOVED
            return own[path.rsplit("/", 1)[1]] if "/spiel/" in path else others(path)

        return role

    def forward(model: Model, view: View) -> Model:
        chained = "+".join(spec.name for spec in view.specs)
        if blind := [spec.name for spec in view.specs if not about(spec.name).promises.backward]:
            raise InputError(f"{chained}: spiel chooses by gradients, and {blind[0]} has no backward pass")
        adapter = lambda site: SpIEL(density, grow)
        adapted = sites.attach(model, "spiel", adapter, sparse.chosen_sites("spiel", targets, density), shared=True)

        def init(key, params):
            params = adapted.init(key, params)
            kinds = tree.flatten(params)
            values = {path: leaf for path, leaf in kinds.items() if path.endswith(VALUES)}
            for path in values:
                if (name := view.role(path).name) != "trained":
                    raise InputError(f"{chained}: spiel's values are differentiated whole, and {path} would be {name}")
            if (layers := turns(values).layers) > every:
                raise InputError(f"spiel: every {every} must be at least {layers}: that many layers take turns")
            return {**params, "spiel": {"steps": jnp.zeros((), jnp.int32), **params.get("spiel", {})}}

        return adapted._replace(init=init)

    def gradient(objective: Objective, view: View) -> Objective:
        def value_and_grad(trainable, rest, batch, key, opt_state):
            turn = turns({path: leaf for path, leaf in trainable.items() if path.endswith(VALUES)})
            step = rest[STEPS]
            picks, swaps = turn.now(step, every), turn.now(step - (accumulate - 1), every)
            read = _gradients_and_candidates if grow == "gradient" else _gradients_and_sums
            value, grads, scored = read(objective, picks, trainable, rest, batch, key, opt_state)
            share = drop if not until else drop * jnp.maximum(1 - (step + 1) / until, 0)
            share = jnp.where(step - (accumulate - 1) < every, 1.0, share)
            said: dict[str, Any] = {}
            for site in turn.sites:
                n, m = view.shapes[sites.kernel_path(view.shapes, site)].shape[-2:]
                leaves = {name: scored[f"{site}/spiel/{name}"] for name in GROWTHS[grow]}
                leaves |= {name: {**rest, **trainable}[f"{site}/spiel/{name}"] for name in ("index", "values")}
                swap = lambda leaves, shape=(n, m): _swapped(leaves, share, shape, step, accumulate)
                found = _at_layer(swap, swaps[site], leaves)
                said |= {f"{site}/spiel/{name}": leaf for name, leaf in {**leaves, **found}.items()}
            loss, aux = value
            return (loss, {**aux, **said}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def update(optimizer, view):
        return seeded(optax.with_extra_args_support(optimizer))

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        trained, moved = dict(leaves.trained), dict(leaves.moved)
        for path in [path for path in trained if path.endswith(VALUES)]:
            site = path.removesuffix(VALUES)
            names = ("index", "fresh", *GROWTHS[grow])
            found = {name: told("spiel", moment.aux, f"{site}/spiel/{name}") for name in names}
            begun = turns({path: trained[path]}).begun(site, moved[STEPS] - (accumulate - 1))
            trained[path] = jnp.where(found.pop("fresh") | ~begun, 0, trained[path])
            moved |= {f"{site}/spiel/{name}": leaf for name, leaf in found.items()}
        moved[STEPS] = moved[STEPS] + 1
        return Leaves(trained, moved)

    return Method(
        forward=forward,
        roles=roles,
        gradient=gradient,
        update=update,
        move=move,
        merge=lambda params: sparse.fold(params, "spiel"),
        specs=(Spec("spiel", config),),
    )


# Turns.


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


def turns(values: Mapping[str, Any]) -> Turns:
    """Of {path: values} (L, k), or (k,) outside of the layers."""
    found: dict[str, range | None] = {}
    for path, leaf in values.items():
        site, numbers = path.removesuffix(VALUES), None
        if leaf.ndim > 1:
            ((_, first, end),) = tree.segments({path.split("/", 1)[0]: {"": leaf}})
            numbers = range(first, end)
        found[site] = numbers
    return Turns(found)


def _at_layer(function: Callable[[dict], dict], place: jax.Array, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a function makes of one layer's leaves, written to its place; of -1 the leaves are what they were."""
    stacked = leaves["values"].ndim > 1
    own = {name: leaf[jnp.maximum(place, 0)] if stacked else leaf for name, leaf in leaves.items()}
    as_it_is = lambda own: {"index": own["index"], **_none(own["values"])}
    found = jax.lax.cond(place >= 0, function, as_it_is, own)
    if not stacked:
        return found
    blank = {"index": leaves["index"], **_none(leaves["values"])}
    return {name: blank[name].at[jnp.maximum(place, 0)].set(leaf) for name, leaf in found.items()}


def _none(values: jax.Array) -> dict[str, jax.Array]:
    zeros = jnp.zeros(values.shape)
    return {"fresh": jnp.zeros(values.shape, bool), "mean": zeros, "square": zeros}


# Scores.


def _gradients_and_candidates(objective, picks, trainable, rest, batch, key, opt_state):
    """(value, aux), gradients, and candidates with their sums, of this step too."""
    values = {path: leaf for path, leaf in trainable.items() if path.endswith(VALUES)}
    probe = lambda path: path.replace(VALUES, "/spiel/probe")
    probes = {probe(path): jnp.zeros_like(leaf) for path, leaf in values.items()}
    owned = {f"{site}/spiel/{name}" for site in picks for name in GROWTHS["gradient"]}
    scored = {path: rest[path] for path in owned}

    def parted(found):
        (value, grads), sums = found, dict(scored)
        for path in values:
            site, g = path.removesuffix(VALUES), grads.pop(probe(path))
            sums[f"{site}/spiel/sum"] = scored[f"{site}/spiel/sum"] + g
            sums[f"{site}/spiel/squares"] = scored[f"{site}/spiel/squares"] + g * g
        return value, grads, sums

    def go_on():
        return parted(objective.value_and_grad({**trainable, **probes}, rest, batch, key, opt_state))

    def pick():
        whole, due = {}, {}
        for site, place in picks.items():
            leaf = values[f"{site}{VALUES}"]
            shape = rest[sites.kernel_path(rest, site)].shape[-2:]
            whole[f"spiel/dense/{site}"] = jnp.zeros(shape, jnp.float32)
            due[f"{site}/spiel/due"] = jnp.arange(len(leaf)) == place if leaf.ndim > 1 else place == 0
        found = {**trainable, **probes, **whole}
        value, grads, sums = parted(objective.value_and_grad(found, {**rest, **due}, batch, key, opt_state))
        for site in picks:
            fresh = _picked(grads.pop(f"spiel/dense/{site}"), values[f"{site}{VALUES}"].shape[-1])
            for name, new in zip(GROWTHS["gradient"], fresh, strict=True):
                path = f"{site}/spiel/{name}"
                here = due[f"{site}/spiel/due"]
                sums[path] = jnp.where(here[:, None] if here.ndim else here, new, sums[path])
        return value, grads, sums

    anyone = jnp.any(jnp.stack([place >= 0 for place in picks.values()]))
    return jax.lax.cond(anyone, pick, go_on)


def _picked(gradient: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(count,) each: the largest |dW| of a matrix, as ascending entries, dW and dW^2."""
    flat = gradient.reshape(-1)
    index = jnp.sort(jax.lax.top_k(jnp.abs(flat), count)[1].astype(jnp.int32))
    return index, flat[index], flat[index] ** 2


def _gradients_and_sums(objective, picks, trainable, rest, batch, key, opt_state):
    """(value, aux), gradients, and SM3's sums by rows and columns, of this step too."""
    value, grads = objective.value_and_grad(trainable, rest, batch, key, opt_state)
    sums: dict[str, Any] = {}
    for site in picks:
        rows, columns = (rest[f"{site}/spiel/{name}"] for name in GROWTHS["moments"])
        own = sm3 if rows.ndim == 1 else jax.vmap(sm3)
        found = own(rows, columns, rest[f"{site}/spiel/index"], grads[f"{site}{VALUES}"])
        sums |= {f"{site}/spiel/{name}": leaf for name, leaf in zip(GROWTHS["moments"], found, strict=True)}
    return value, grads, sums


def sm3(rows: jax.Array, columns: jax.Array, index: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SM3's sums (n,) and (m,) with the squares of one more gradient (k,) at entries (k,)."""
    i, j = jnp.divmod(index, len(columns))
    update = jnp.minimum(rows[i], columns[j]) + gradient**2
    return rows.at[i].max(update), columns.at[j].max(update)


# The choice.


def _swapped(own: Mapping[str, jax.Array], share: jax.Array, shape: tuple[int, int], step: jax.Array, accumulate: int):
    """A layer's entries after a choice, which of them are fresh, and means of dW and dW^2 there."""
    index, values = own["index"], own["values"]
    count = jnp.floor(share * len(index)).astype(jnp.int32)
    if "sum" in own:
        candidates, scores = own["candidates"], jnp.abs(own["sum"])
        means, squares = own["sum"] / accumulate, own["squares"] / accumulate
    else:
        product = jnp.outer(own["rows"], own["columns"]).reshape(-1).at[index].set(-1)
        candidates = jnp.sort(jax.lax.top_k(product, len(index))[1])
        scores = product[candidates]
        i, j = jnp.divmod(candidates.astype(jnp.int32), shape[1])
        squares = jnp.minimum(own["rows"][i], own["columns"][j]) / (step + 1)
        means = jnp.zeros_like(squares)
    index, source, fresh = replaced(index, values, candidates.astype(jnp.int32), scores, count, shape)
    at = lambda x: jnp.where(fresh, x[source], 0)
    return {"index": index, "fresh": fresh, "mean": at(means), "square": at(squares)}


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


def seeded(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with moments of grown entries from what has scored them."""

    def update(grads, state, params=None, *, aux=None, **extra):
        updates, state = optimizer.update(grads, state, params, aux=aux, **extra)
        fresh = {path: told("spiel", aux, path.replace("values", "fresh")) for path in grads if path.endswith(VALUES)}

        def adam(path, moments, name, bias):
            return jnp.where(fresh[path], aux[path.replace("values", name)] * bias, moments)

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


ABOUT = About(
    summary="a sparse update of each kernel, whose entries are dropped and grown by the gradient",
    level="site",
    trains="density n m entries per kernel",
    saves="gradients and optimizer state of all but so many numbers per kernel; no activations; one update is at work",
    reference="Ansell et al. 2024, arXiv:2401.16405",
    example={"density": 0.05, "every": 4, "accumulate": 2},
    promises=Promises(site_bytes=_shira.saved_bytes),
    places=lambda path, n, m: n * m if path.endswith(("/spiel/index", "/spiel/candidates")) else None,
)
