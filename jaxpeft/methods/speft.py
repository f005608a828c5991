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

v starts at zero, the adapted model at the base. g is had of one site's kernels at a time, in one pass over the batches
for each site, with layers computed again: the start holds two more stacks of one site's kernels in float32.

Kept for the backward pass: x, as LoRA keeps it; S and its gradient are made one at a time, as large as a kernel.
Bytes of an entry: 16, of v, Adam's two moments and idx. Merging is exact up to rounding: W <- W + S.

Paper: Liu et al. 2024, "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models", arXiv:2412.13488.
Deviations: k is a share of each kernel, not of all together (the published code has both); masks are static, as is its
default; of its metrics not SynFlow and GraSP. Nothing is dropped out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import sites, sparse, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, View, trains, unchanged
from jaxpeft.methods import shira as _shira
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Batch, Context
from jaxpeft.quant import dense
from jaxpeft.starts import probes
from jaxpeft.starts.pair import Sited
from jaxpeft.train.loss import classification_loss, completion_loss

OF_GRADIENTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "gradient": lambda w, g: jnp.abs(g),
    "saliency": lambda w, g: jnp.abs(w * g),
    "skeletonization": lambda w, g: -w * g,
    "taylor": lambda w, g: (w * g) ** 2,
    "fisher": lambda w, squares: squares,
}
METRICS = (*OF_GRADIENTS, "magnitude", "random")


class SPEFT(nn.Module):
    """The adapted product. Parameters: index (k,) int32, frozen; values (k,) float32."""

    stacked = True  # only the product reads the kernel

    density: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        count = sparse.entries(self.density, n, m)
        index = self.param("index", lambda key: sparse.flat_draw(key, n, m, count))
        values = self.param("values", nn.initializers.zeros, (count,))
        return inner(x) + sparse.product(x, index, values, (n, m))


class Whole(nn.Module):
    """The site's product. Parameter: w (n, m) zeros, whose gradient is that of the kernel."""

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        return inner(x) + x @ self.param("w", nn.initializers.zeros, site.kernel.shape).astype(x.dtype)


def speft(density: float = 0.01, metric: str = "gradient", targets: Targets = "all-linear") -> Method:
    """SPEFT on the sites that `targets` chooses.

    Args:
      density: share of a kernel's entries that train.
      metric: "gradient", "saliency", "skeletonization", "taylor" and "fisher", of some batches, which `setup` has to be
        given; "magnitude" or "random".
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/speft/values` (L, k).

    Raises:
      InputError: for a density outside (0, 0.5], an unknown metric, a kernel of more than 2^31 - 1 entries, targets
        that match nothing, or no data where the metric is of gradients.
    """
    config = dict(locals())
    sparse.check_density("speft", density)
    if metric not in METRICS:
        raise InputError(f"speft: metric {metric!r} is not one of {', '.join(METRICS)}")
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

    return Method(
        prepare=unchanged if metric == "random" else prepare,
        forward=lambda model, view: sites.attach(model, "speft", lambda site: SPEFT(density), choose),
        roles=trains(lambda path: path.endswith("/speft/values")),
        merge=lambda params: sparse.fold(params, "speft"),
        specs=(Spec("speft", config),),
    )


def _salience(view: View, params: tree.Params, site: str, metric: str, batches: list[Batch]) -> jax.Array:
    """(..., n, m) float32, of one site's kernels."""
    leaves, of_batch = probes.gradients(view.base, params, [Sited(site, 1, 1.0)], lambda _: Whole(), _loss)
    total, count = jnp.zeros_like(leaves[site]["w"]), 0
    for part in _rows(batches) if metric == "fisher" else batches:
        g = of_batch(leaves, part)[site]["w"].astype(jnp.float32)
        total, count = total + (g**2 if metric == "fisher" else g), count + 1
    flat = tree.flatten(params)
    return OF_GRADIENTS[metric](dense(flat[sites.kernel_path(flat, site)]), total / count)


def _rows(batches: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for row in range(len(jax.tree.leaves(batch)[0])):
            yield jax.tree.map(lambda x, row=row: x[row : row + 1], dict(batch))


def _loss(model: Any, params: tree.Params, batch: Batch) -> jax.Array:
    """The loss of a batch, by what it holds."""
    return (classification_loss if "labels" in batch else completion_loss)(model, params, batch)[0]


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
