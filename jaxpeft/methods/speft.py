"""SPEFT: a sparse update of each kernel, of the entries with the greatest salience at the start.

    y = x (W + S)        x (..., n), W (n, m) frozen, S (n, m) zero but at k = density n m entries
    S[idx_t] = v_t       idx (k,) the entries of a kernel with the largest salience, frozen; v (k,) trained

    metric            salience of an entry w, with g its gradient, the mean over some batches of the training data
    gradient          |g|
    saliency          |w g|
    skeletonization   -w g
    taylor            (w g)^2
    fisher            the mean over the batches' rows of the square of a row's gradient
    magnitude         |w|
    random            none: entries are drawn, one of each of k strata

With `refresh` entries are chosen anew every so many steps, by a metric of the step's own gradient, all its
micro-batches, at the weights as they are: w is W + S. What is chosen again stays as it is. What is not is folded, W <-
W + S there, and another entry starts at v = 0, with moments of its g: Adam's after its bias correction are g and g^2.
The model computes the same before and after a choice, up to rounding to W's dtype. Layers take turns: layer l of L at
floor(l refresh / L) in each period but the first, so that dW exists of one layer at a time.

v starts at zero, the adapted model at the base. g is had of one site's kernels at a time, in one pass over the batches
for each site, with layers computed again: the start holds two more stacks of one site's kernels in float32.

Kept for the backward pass: x, as LoRA keeps it; S and its gradient are made one at a time, as large as a kernel.
Bytes of an entry: 16, of v, Adam's two moments and idx. With `refresh` kernels are moved leaves, without masters.
Merging is exact up to rounding: W <- W + S.

Paper: Liu et al. 2024, "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models", arXiv:2412.13488.
Deviations: k is a share of each kernel, not of all together (the published code has both); of its metrics not SynFlow
and GraSP. Nothing is dropped out. Masks are static, as is its default; its code folds all of S at a choice, here what
leaves alone, which is the same function, and it chooses for all layers at once by further batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxpeft import entries, sites, sparse, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, MOVED, TRAINED, Leaves, Method, Moment, Objective, Spec, View, about, told, unchanged
from jaxpeft.methods import shira as _shira
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Batch, Context, Model
from jaxpeft.quant import dense, is_packed
from jaxpeft.starts import probes

OF_GRADIENTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "gradient": lambda w, g: jnp.abs(g),
    "saliency": lambda w, g: jnp.abs(w * g),
    "skeletonization": lambda w, g: -w * g,
    "taylor": lambda w, g: (w * g) ** 2,
    "fisher": lambda w, squares: squares,
}
METRICS = (*OF_GRADIENTS, "magnitude", "random")
REFRESHED = tuple(name for name in OF_GRADIENTS if name != "fisher")  # of one gradient
STEPS = "speft/steps"
VALUES = "/speft/values"


class SPEFT(nn.Module):
    """The adapted product. Parameters: index (k,) int32; values (k,) float32."""

    stacked = True  # only the product reads the kernel

    density: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        count = sparse.entries(self.density, n, m)
        index = self.param("index", lambda key: sparse.flat_draw(key, n, m, count))
        values = self.param("values", nn.initializers.zeros, (count,))
        whole = entries.own_dense(self, "speft", site, ctx, x.dtype)
        return inner(x) + sparse.product(x, index, values, (n, m), whole)


def speft(density: float = 0.01, metric: str = "gradient", targets: Targets = "all-linear", refresh: int = 0) -> Method:
    """SPEFT on the sites that `targets` chooses.

    Args:
      density: share of a kernel's entries that train.
      metric: "gradient", "saliency", "skeletonization", "taylor" and "fisher", of some batches, which `setup` has to be
        given; "magnitude" or "random".
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      refresh: steps from one choice of a layer's entries to the next, at least as many as there are layers; 0: the
        first choice stays.

    Returns:
      The method; it trains `<site>/speft/values` (L, k). With `refresh` it moves kernels, too.

    Raises:
      InputError: for a density outside (0, 0.5], an unknown metric, a kernel of more than 2^31 - 1 entries, targets
        that match nothing, or no data where the metric is of gradients; for a `refresh` below 0, shorter than the
        layers' turns, with a metric of no gradient, over packed kernels, or in a chain in which values do not train, or
        kernels do not change, as they should.
    """
    config = dict(locals())
    sparse.check_density("speft", density)
    if metric not in METRICS:
        raise InputError(f"speft: metric {metric!r} is not one of {', '.join(METRICS)}")
    if refresh < 0:
        raise InputError(f"speft: refresh {refresh} must be at least 0")
    if refresh and metric not in REFRESHED:
        raise InputError(
            f"speft: refresh chooses by a step's gradient, and metric {metric!r} is of none; take one of "
            f"{', '.join(REFRESHED)}"
        )
    choose = sparse.chosen_sites("speft", targets, density)

    def prepare(params: tree.Params, view: View) -> tree.Params:
        """The parameters with `<site>/speft/index`, where it is not there and there are batches to choose it by."""
        flat = tree.flatten(params)
        batches = probes.batches(f"speft: metric {metric!r}", view) if metric in OF_GRADIENTS else []
        for site in choose(params):
            kernel, path = flat[sites.kernel_path(flat, site)], f"{site}/speft/index"
            if path in flat or (metric in OF_GRADIENTS and not batches):
                continue
            count = sparse.entries(density, *kernel.shape[-2:])
            found = jnp.abs(dense(kernel)) if metric == "magnitude" else _salience(view, params, site, metric, batches)
            flat[path] = sparse.most(found, count)
        return tree.unflatten(flat)

    def roles(others):
        def role(path):
            if path.endswith(VALUES):
                return TRAINED
            if refresh and (path == STEPS or path.endswith("/speft/index")):
                return MOVED
            kernel = refresh and path.endswith("/kernel") and others(path) == FROZEN
            return MOVED if kernel and sites.chooses(targets, path.removesuffix("/kernel")) else others(path)

        return role

    def forward(model: Model, view: View) -> Model:
        adapted = sites.attach(model, "speft", lambda site: SPEFT(density), choose, shared=bool(refresh))
        if not refresh:
            return adapted

        def init(key, params):
            _check_chain(tree.flatten(params), choose(params), view)
            params = adapted.init(key, params)
            values = {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith(VALUES)}
            if (layers := entries.turns(values, VALUES).layers) > refresh:
                raise InputError(f"speft: refresh {refresh} must be at least {layers}: that many layers take turns")
            return {**params, "speft": {"steps": jnp.zeros((), jnp.int32), **params.get("speft", {})}}

        return adapted._replace(init=init)

    def gradient(objective: Objective, view: View) -> Objective:
        def value_and_grad(trainable, rest, batch, key, opt_state):
            values = {path: leaf for path, leaf in trainable.items() if path.endswith(VALUES)}
            now = entries.turns(values, VALUES).now(rest[STEPS], refresh)
            picks = {site: jnp.where(rest[STEPS] >= refresh, place, -1) for site, place in now.items()}
            own = {site: {"index": rest[f"{site}/speft/index"], "values": values[f"{site}{VALUES}"]} for site in picks}

            def go_on():
                value, grads = objective.value_and_grad(trainable, rest, batch, key, opt_state)
                stay = {site: {"index": x["index"], **entries.none(x["values"])} for site, x in own.items()}
                return value, grads, stay

            def pick():
                whole, due = entries.dense_leaves("speft", picks, values, rest)
                value, grads = objective.value_and_grad({**trainable, **whole}, {**rest, **due}, batch, key, opt_state)
                found = {}
                for site, place in picks.items():
                    g, kernel = grads.pop(f"speft/dense/{site}"), rest[f"{site}/kernel"]
                    w = kernel[jnp.maximum(place, 0)] if kernel.ndim > 2 else kernel
                    again = lambda x, w=w, g=g: _chosen(x["index"], x["values"], w, g, metric)
                    found[site] = entries.at_layer(again, place, own[site])
                return value, grads, found

            anyone = jnp.any(jnp.stack([place >= 0 for place in picks.values()]))
            (loss, aux), grads, found = jax.lax.cond(anyone, pick, go_on)
            said = {f"{site}/speft/{name}": leaf for site, x in found.items() for name, leaf in x.items()}
            return (loss, {**aux, **said}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def update(optimizer, view):
        return entries.seeded("speft", optax.with_extra_args_support(optimizer))

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        trained, moved = dict(leaves.trained), dict(leaves.moved)
        for path in [path for path in trained if path.endswith(VALUES)]:
            site = path.removesuffix(VALUES)
            index, fresh = (told("speft", moment.aux, f"{site}/speft/{name}") for name in ("index", "fresh"))
            left = jnp.where(fresh, trained[path], 0)
            take = jax.vmap(folded) if left.ndim > 1 else folded
            moved[f"{site}/kernel"] = take(moved[f"{site}/kernel"], moved[f"{site}/speft/index"], left)
            moved[f"{site}/speft/index"], trained[path] = index, jnp.where(fresh, 0, trained[path])
        moved[STEPS] = moved[STEPS] + 1
        return Leaves(trained, moved)

    return Method(
        prepare=unchanged if metric == "random" else prepare,
        forward=forward,
        roles=roles,
        gradient=gradient if refresh else unchanged,
        update=update if refresh else unchanged,
        move=move if refresh else unchanged,
        merge=lambda params: sparse.fold(params, "speft"),
        specs=(Spec("speft", config),),
    )


def _check_chain(flat: tree.Flat, found: list[str], view: View) -> None:
    """Raises InputError for a chain in which entries cannot be chosen anew."""
    chained = "+".join(spec.name for spec in view.specs)
    if blind := [spec.name for spec in view.specs if not about(spec.name).promises.backward]:
        raise InputError(f"{chained}: speft's refresh chooses by gradients, and {blind[0]} has no backward pass")
    for site in found:
        kernel = sites.kernel_path(flat, site)
        if is_packed(flat[kernel]):
            raise InputError(f"speft: {site} is quantized, and cannot take up what refresh folds; leave refresh at 0")
        if (name := view.role(kernel).name) != "moved":
            raise InputError(f"{chained}: speft's refresh folds into {kernel}, which would be {name}")
        if (name := view.role(f"{site}{VALUES}").name) != "trained":
            raise InputError(f"{chained}: speft's values are differentiated whole, and {site}{VALUES} would be {name}")


def _chosen(index: jax.Array, values: jax.Array, w: jax.Array, g: jax.Array, metric: str) -> dict[str, jax.Array]:
    """A kernel's entries after a choice, which of them are fresh, and g and g^2 there.

    Args:
      index: (k,), its entries now.
      values: (k,), what is there.
      w: (n, m), the kernel.
      g: (n, m), the gradient.
      metric: of `REFRESHED`.
    """
    now = w.astype(jnp.float32).at[tuple(sparse.pairs(index, w.shape[1]).T)].add(values)
    best, k = sparse.most(OF_GRADIENTS[metric](now, g), len(index)), len(index)
    index, _, fresh = entries.replaced(index, values, best, jnp.ones(k), jnp.int32(k), w.shape)
    at = jnp.where(fresh, g[tuple(sparse.pairs(index, w.shape[1]).T)], 0)
    return {"index": index, "fresh": fresh, "mean": at, "square": at**2}


def folded(w: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """W (n, m) with values (k,) added at entries (k,), all different; rounded once to its dtype."""
    at = tuple(sparse.pairs(index, w.shape[1]).T)
    return w.at[at].set((w[at].astype(jnp.float32) + values).astype(w.dtype))


def _salience(view: View, params: tree.Params, site: str, metric: str, batches: list[Batch]) -> jax.Array:
    """(..., n, m) float32, of one site's kernels."""
    total, count = jnp.zeros(()), 0
    for g in probes.of_kernels(view.base, params, site, _rows(batches) if metric == "fisher" else batches):
        total, count = total + (g**2 if metric == "fisher" else g), count + 1
    flat = tree.flatten(params)
    return OF_GRADIENTS[metric](dense(flat[sites.kernel_path(flat, site)]), total / count)


def _rows(batches: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for row in range(len(jax.tree.leaves(batch)[0])):
            yield jax.tree.map(lambda x, row=row: x[row : row + 1], dict(batch))


ABOUT = About(
    summary="a sparse update of each kernel, of the entries that matter most at the start",
    level="site",
    trains="density n m entries per kernel",
    saves="gradients and optimizer state of all but so many numbers per kernel; no activations; one update is at work",
    reference="Liu et al. 2024, arXiv:2412.13488",
    example={"density": 0.05, "metric": "magnitude"},
    promises=Promises(site_bytes=_shira.saved_bytes),
    places=lambda path, n, m: n * m if path.endswith("/speft/index") else None,
)
