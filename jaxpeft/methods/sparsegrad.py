"""SparseGrad: a sparse update of each kernel in a basis in which its gradient has few large entries.

    y = x W + ((x U) S) V^T      x (..., n), W (n, m) frozen; U (n, n) and V (m, m) orthogonal, of one site's layers
    S[idx_t] = v_t               S (n, m) zero but at k = density n m entries; idx (k,), v (k,) trained

The kernel in that basis is W' = U^T W V, and its gradient dW' = (x U)^T (dy V) = U^T dW V. U and V are the orthogonal
factors of the higher-order SVD of the gradients of a site's layers on some batches of the training data, G_1, G_2, ...:

    U diag U^T = sum_i G_i G_i^T,    V diag V^T = sum_i G_i^T G_i

idx are the largest entries of U^T G V, G a layer's gradient on all these batches.

With `refresh` entries are chosen anew every so many steps by |dW'| of the step, all its micro-batches. What is not
chosen again is folded, W <- W + U S V^T of it, and another entry starts at v = 0 with moments of its gradient. Layers
take turns, so that dW' exists of one layer at a time (`jaxpeft.entries`). W in bf16 takes it up with stochastic
rounding, as small changes of all its numbers would be lost.

v starts at zero, the adapted model at the base. Kept for the backward pass: x U. Bytes of an entry: 16, of v, Adam's
two moments and idx; U and V of a site, for all of its layers, are n^2 + m^2 numbers of W's dtype, and an adapter's file
has them. x U and V^T cost n^2 and m^2 products a token beside n m of W. Merging is exact up to rounding.

Paper: Chekalina et al. 2024, "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
arXiv:2410.07383, and its code. Deviations: there W' takes the place of W, all of it is stored as what trains, and each
step's gradient keeps its 100,000 largest entries (by sign: of the largest signed values, the threshold on |dW'|), which
saves gradients and no moments; here entries keep their moments and stay for `refresh` steps. All layers of a site,
there each third one of Llama's. metric="magnitude" takes kernels for gradients, for a start without data.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

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
from jaxpeft.model import Context, Model
from jaxpeft.projections import stochastic
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged
from jaxpeft.starts import probes

METRICS = ("gradient", "magnitude")
VALUES = "/sparsegrad/values"


class SparseGrad(nn.Module):
    """The adapted product. Parameters: index (k,) int32; values (k,) float32; U and V it reads beside the layers."""

    stacked = True  # only the product reads the kernel

    density: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        index, values = sparse.parameters(self, self.density, site.kernel.shape)
        if (shared := sites.beside(self, ctx, "sparsegrad", "bases")) is None:
            return inner(x)
        u, v = (shared[_called(site.path)][name].astype(x.dtype) for name in "uv")
        whole = entries.own_dense(self, "sparsegrad", site, ctx, x.dtype)
        return inner(x) + sparse.product(x @ u, index, values, site.kernel.shape, whole) @ v.T


def _called(site: str) -> str:
    """A site's name beside the layers, where a path in them would be that of a stack."""
    return site.replace("/", ".")


def sparsegrad(density: float = 0.01, metric: str = "gradient", targets: Targets = "mlp", refresh: int = 0) -> Method:
    """SparseGrad on the sites that `targets` chooses.

    Args:
      density: share of a kernel's entries, in the other basis, that train.
      metric: "gradient", of some batches, which `setup` has to be given; or "magnitude", of the kernels.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      refresh: steps from one choice of a layer's entries to the next, at least as many as there are layers; 0: the
        first choice stays.

    Returns:
      The method; it trains `<site>/sparsegrad/values` (L, k). With `refresh` it moves kernels, too.

    Raises:
      InputError: for a density outside (0, 0.5] or that leaves a kernel empty, an unknown metric, a kernel of more than
        2^31 - 1 entries, targets that match nothing, or no data where the metric is of gradients; for a `refresh` below
        0, shorter than the layers' turns, over packed kernels, or in a chain in which values do not train, or kernels
        do not change, as they should.
    """
    config = dict(locals())
    sparse.check_density("sparsegrad", density)
    if metric not in METRICS:
        raise InputError(f"sparsegrad: metric {metric!r} is not one of {', '.join(METRICS)}")
    if refresh < 0:
        raise InputError(f"sparsegrad: refresh {refresh} must be at least 0")
    choose, again = sparse.chosen_sites("sparsegrad", targets, density), entries.Refresh("sparsegrad", refresh)

    def prepare(params: tree.Params, view: View) -> tree.Params:
        """The parameters with U, V and `index`, where they are not there and there is something to choose them by."""
        flat = tree.flatten(params)
        batches = probes.batches("sparsegrad: metric 'gradient'", view) if metric == "gradient" else []
        for site in choose(params):
            kernel, own = flat[sites.kernel_path(flat, site)], f"sparsegrad/{_called(site)}"
            planned = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(kernel))
            if planned or f"{own}/u" in flat or (metric == "gradient" and not batches):
                continue
            parts = probes.of_kernels(view.base, params, site, batches, view.loss) if batches else [dense(kernel)]
            total, left, right = 0.0, 0.0, 0.0
            for g in parts:
                total = total + g
                left, right = left + _products("...nm,...km->nk", g), right + _products("...nm,...nk->mk", g)
            u, v = _basis(left), _basis(right)
            index = _indices(total, u, v, sparse.entries(density, *kernel.shape[-2:]))
            flat |= {f"{own}/u": u.astype(kernel.dtype), f"{own}/v": v.astype(kernel.dtype)}
            flat[f"{site}/sparsegrad/index"] = index
        return tree.unflatten(flat)

    def forward(model: Model, view: View) -> Model:
        adapted = sites.attach(model, "sparsegrad", lambda site: SparseGrad(density), choose, shared=True)

        def init(key, params):
            if refresh:
                again.check_chain(tree.flatten(params), choose(params), view)
            flat = tree.flatten(adapted.init(key, params))
            for site in choose(params):
                kernel = flat[sites.kernel_path(flat, site)]
                for name, size in zip("uv", kernel.shape[-2:], strict=True):
                    flat.setdefault(f"sparsegrad/{_called(site)}/{name}", jnp.eye(size, dtype=kernel.dtype))
            params = tree.unflatten(flat)
            return again.begun(params) if refresh else params

        return adapted._replace(init=init)

    def update(optimizer, view):
        return entries.seeded("sparsegrad", optax.with_extra_args_support(optimizer))

    def fold(site, kernel, index, left, moment):
        u, v = (moment.frozen[f"sparsegrad/{_called(site)}/{name}"] for name in "uv")
        key = jax.random.fold_in(moment.key, zlib.crc32(site.encode()))
        return folded(kernel, index, left, u, v, key)

    return Method(
        prepare=prepare,
        forward=forward,
        roles=again.roles(targets),
        gradient=again.gradient(_chosen) if refresh else unchanged,
        update=update if refresh else unchanged,
        move=again.move(fold) if refresh else unchanged,
        merge=merge,
        specs=(Spec("sparsegrad", config),),
    )


_products = jax.jit(lambda equation, g: jnp.einsum(equation, g, g, precision="highest"), static_argnums=0)


@jax.jit
def _basis(gram: jax.Array) -> jax.Array:
    """The eigenvectors (n, n) of a symmetric matrix, that of the largest value first, as columns."""
    return jnp.linalg.eigh(gram)[1][:, ::-1]


def _indices(g: jax.Array, u: jax.Array, v: jax.Array, count: int) -> jax.Array:
    """(..., count) int32: the entries of U^T G V with the largest absolute values, ascending."""
    turned = jnp.einsum("nk,...nm,ml->...kl", u, g, v, precision="highest")
    return sparse.most(jnp.abs(turned), count)


def _chosen(index: jax.Array, values: jax.Array, w: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
    """A kernel's entries after a choice by |g|, which of them are fresh, and g and g^2 there; g is dW'."""
    del w
    best, k = sparse.most(jnp.abs(g), len(index)), len(index)
    index, _, fresh = entries.replaced(index, values, best, jnp.ones(k), jnp.int32(k), g.shape)
    at = jnp.where(fresh, g[tuple(sparse.pairs(index, g.shape[1]).T)], 0)
    return {"index": index, "fresh": fresh, "mean": at, "square": at**2}


def changed(index: jax.Array, values: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """U S V^T (n, m) float32 of entries (k,)."""
    s = _shira.sparse(sparse.pairs(index, len(v)), values.astype(jnp.float32), (len(u), len(v)))
    u, v = u.astype(jnp.float32), v.astype(jnp.float32)
    return jnp.matmul(jnp.matmul(u, s, precision="highest"), v.T, precision="highest")


def folded(
    kernel: jax.Array, index: jax.Array, left: jax.Array, u: jax.Array, v: jax.Array, key: jax.Array
) -> jax.Array:
    """W + U S V^T of a kernel (n, m), or of the one layer (L, n, m) of which anything is left; W as it is elsewhere."""
    stacked = left.ndim > 1
    leaves = jnp.any(left != 0, axis=-1)
    layer = jnp.argmax(leaves)

    def take(kernel):
        own = (kernel[layer], index[layer], left[layer]) if stacked else (kernel, index, left)
        wide = own[0].astype(jnp.float32) + changed(own[1], own[2], u, v)
        if kernel.dtype == jnp.bfloat16:
            new = stochastic(wide, jax.random.bits(key, wide.shape, jnp.uint16))
        else:
            new = wide.astype(kernel.dtype)
        return kernel.at[layer].set(new) if stacked else new

    return jax.lax.cond(jnp.any(leaves), take, lambda kernel: kernel, kernel)


def merge(params: Mapping[str, Any]) -> tree.Params:
    """W <- W + U S V^T at every adapted site, whose leaves go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "sparsegrad/" not in path}
    for path, values in flat.items():
        if not path.endswith(VALUES):
            continue
        site = path.removesuffix(VALUES)
        u, v = (flat[f"sparsegrad/{_called(site)}/{name}"] for name in "uv")
        added = tree.over(values.ndim - 1, lambda index, own, u=u, v=v: changed(index, own, u, v), tree.in_turn)
        kernel, index = merged[f"{site}/kernel"], flat[f"{site}/sparsegrad/index"]
        merged[f"{site}/kernel"] = as_merged(kernel, dense(kernel) + added(index, values))
    return tree.unflatten(merged)


ABOUT = About(
    summary="a sparse update of each kernel, in a basis in which its gradient is sparse",
    level="site",
    trains="density n m entries per kernel",
    saves="gradients and optimizer state of all but so many numbers; keeps all inputs, and n^2 + m^2 numbers of a site",
    reference="Chekalina et al. 2024, arXiv:2410.07383",
    example={"density": 0.05, "metric": "magnitude"},
    promises=Promises(site_bytes=_shira.saved_bytes),
    places=lambda path, n, m: n * m if path.endswith("/sparsegrad/index") else None,
)
