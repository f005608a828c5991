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

import functools
from collections.abc import Callable, Iterable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxpeft import entries, sites, sparse, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, View, unchanged
from jaxpeft.methods import shira as _shira
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Batch, Context, Model
from jaxpeft.quant import dense
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


class SPEFT(nn.Module):
    """The adapted product. Parameters: index (k,) int32; values (k,) float32."""

    stacked = True  # only the product reads the kernel

    density: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        index, values = sparse.parameters(self, self.density, site.kernel.shape)
        whole = entries.own_dense(self, "speft", site, ctx, x.dtype)
        return inner(x) + sparse.product(x, index, values, site.kernel.shape, whole)


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
    choose, again = sparse.chosen_sites("speft", targets, density), entries.Refresh("speft", refresh)

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

    def forward(model: Model, view: View) -> Model:
        adapted = sites.attach(model, "speft", lambda site: SPEFT(density), choose, shared=bool(refresh))
        if not refresh:
            return adapted

        def init(key, params):
            again.check_chain(tree.flatten(params), choose(params), view)
            return again.begun(adapted.init(key, params))

        return adapted._replace(init=init)

    def update(optimizer, view):
        return entries.seeded("speft", optax.with_extra_args_support(optimizer))

    def fold(site, kernel, index, left, moment):
        return (jax.vmap(folded) if left.ndim > 1 else folded)(kernel, index, left)

    return Method(
        prepare=unchanged if metric == "random" else prepare,
        forward=forward,
        roles=again.roles(targets),
        gradient=again.gradient(functools.partial(_chosen, metric=metric)) if refresh else unchanged,
        update=update if refresh else unchanged,
        move=again.move(fold) if refresh else unchanged,
        merge=lambda params: sparse.fold(params, "speft"),
        specs=(Spec("speft", config),),
    )


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


def _salience(view: View, params: tree.Params, site: str, metric: str, batches: Iterable[Batch]) -> jax.Array:
    """(..., n, m) float32, of one site's kernels."""
    total, count = jnp.zeros(()), 0
    batches = _rows(batches) if metric == "fisher" else batches
    for g in probes.of_kernels(view.base, params, site, batches, view.loss):
        total, count = total + (g**2 if metric == "fisher" else g), count + 1
    flat = tree.flatten(params)
    return OF_GRADIENTS[metric](dense(flat[sites.kernel_path(flat, site)]), total / count)


def _rows(batches: Iterable[Batch]) -> Iterator[Batch]:
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
