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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxpeft import entries, sites, sparse, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import MOVED, TRAINED, Leaves, Method, Moment, Objective, Spec, View, about, told
from jaxpeft.methods import shira as _shira
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Context, Model

GROWTHS = {"gradient": ("candidates", "sum", "squares"), "moments": ("rows", "columns")}
STEPS = "spiel/steps"
VALUES = "/spiel/values"


class SpIEL(nn.Module):
    """The adapted product. Parameters: index (k,) int32, values (k,) float32; and, of what scores,

    candidates (k,) int32, sum and squares (k,); or rows (n,) and columns (m,) float32.
    """

    stacked = True  # only the product reads the kernel

    density: float
    grow: str

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        index, values = sparse.parameters(self, self.density, site.kernel.shape)
        (n, m), count, zeros = site.kernel.shape, len(index), nn.initializers.zeros
        if self.grow == "gradient":
            candidates = self.param("candidates", zeros, (count,), jnp.int32)
            self.param("sum", zeros, (count,))
            self.param("squares", zeros, (count,))
        else:
            self.param("rows", zeros, (n,))
            self.param("columns", zeros, (m,))
        if self.has_variable("params", "probe"):
            index = jnp.concatenate([index, candidates])
            values = jnp.concatenate([values, self.get_variable("params", "probe")])
        whole = entries.own_dense(self, "spiel", site, ctx, x.dtype)
        return inner(x) + sparse.product(x, index, values, site.kernel.shape, whole)


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
            if (layers := entries.turns(values, VALUES).layers) > every:
                raise InputError(f"spiel: every {every} must be at least {layers}: that many layers take turns")
            return {**params, "spiel": {"steps": jnp.zeros((), jnp.int32), **params.get("spiel", {})}}

        return adapted._replace(init=init)

    def gradient(objective: Objective, view: View) -> Objective:
        def value_and_grad(trainable, rest, batch, key, opt_state):
            turn = entries.turns({path: leaf for path, leaf in trainable.items() if path.endswith(VALUES)}, VALUES)
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
                found = entries.at_layer(swap, swaps[site], leaves)
                said |= {f"{site}/spiel/{name}": leaf for name, leaf in {**leaves, **found}.items()}
            loss, aux = value
            return (loss, {**aux, **said}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def update(optimizer, view):
        return entries.seeded("spiel", optax.with_extra_args_support(optimizer))

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        trained, moved = dict(leaves.trained), dict(leaves.moved)
        for path in [path for path in trained if path.endswith(VALUES)]:
            site = path.removesuffix(VALUES)
            names = ("index", "fresh", *GROWTHS[grow])
            found = {name: told("spiel", moment.aux, f"{site}/spiel/{name}") for name in names}
            begun = entries.turns({path: trained[path]}, VALUES).begun(site, moved[STEPS] - (accumulate - 1))
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
        whole, due = entries.dense_leaves("spiel", picks, values, rest)
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
    index, source, fresh = entries.replaced(index, values, candidates.astype(jnp.int32), scores, count, shape)
    at = lambda x: jnp.where(fresh, x[source], 0)
    return {"index": index, "fresh": fresh, "mean": at(means), "square": at(squares)}


ABOUT = About(
    summary="a sparse update of each kernel, whose entries are dropped and grown by the gradient",
    level="site",
    trains="density n m entries per kernel",
    saves="gradients and optimizer state of all but so many numbers per kernel; no activations; one update is at work",
    reference="Ansell et al. 2024, arXiv:2401.16405",
    example={"density": 0.05, "every": 4, "accumulate": 2},
    steps="accumulate",
    promises=Promises(site_bytes=_shira.saved_bytes),
    places=lambda path, n, m: n * m if path.endswith(("/spiel/index", "/spiel/candidates")) else None,
)
