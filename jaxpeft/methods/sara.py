"""SaRA: the smallest weights of each kernel train, of which a pretrained model makes least use.

    y = x (W + S)        x (..., n), W (n, m) frozen, S (n, m) zero but at k = density n m entries
    S[idx_t] = v_t       idx (k,) the entries of a kernel with the least |w|, frozen; v (k,) trained, zero at first

tau is the largest |w| of them, each kernel's own; with `threshold` it is one number for all kernels, and of the k
entries those with |w| above it stay as they are (density is then a bound: arrays have one size for all layers). At the
end of step `progressive` entries that have grown, |w + v| > tau, are settled: they keep their values, to the bit, and
only those that are still small go on. Which do is a moved leaf.

`penalty` holds what trains to few ranks: the loss of a step has, of one kernel that is drawn for it,

    penalty ||M * (W + S)||_*        the sum of singular values; M (n, m) is 1 at the entries that train

which costs a decomposition of that matrix. Losses of evaluations are without it. Over a packed kernel weights are what
its codes stand for; where all k are zero, tau is, and a threshold is needed for entries to go on.

Kept for the backward pass: x, as LoRA keeps it; S and its gradient are made one at a time, as large as a kernel, and
the gradient of v is read from there (the paper's unstructured backpropagation). Bytes of an entry: 17, of v, Adam's two
moments, idx and whether it trains. Merging is exact up to rounding: W <- W + S.

Paper: Hu et al. 2024, "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
arXiv:2409.06633, and its code. Deviations: kernels alone train, no biases and norms; weights start as they are, where
the code takes their absolute values; what goes on keeps its moments; weight decay, which the code has on w + v, is that
of vectors here, none. (The code's defaults are threshold 2e-3, for 10 to 20 % of Stable Diffusion's weights, rate 1e-3
exp(-350 threshold), and, in its examples, progressive 2500 and penalty 5e-4.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import sites, sparse, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import MOVED, TRAINED, Leaves, Method, Moment, Spec, View, unchanged
from jaxpeft.methods import shira as _shira
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Context
from jaxpeft.quant import by_layer, dense, matrix

VALUES = "/sara/values"


class SaRA(nn.Module):
    """The adapted product. Parameters: index (k,) int32, frozen; values (k,) float32; trains (k,) bool, moved."""

    stacked = True  # only the product reads the kernel

    density: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        index, values = sparse.parameters(self, self.density, site.kernel.shape)  # `prepare` has chosen
        trains = self.param("trains", nn.initializers.ones, values.shape, bool)
        values = jnp.where(trains, values, jax.lax.stop_gradient(values))
        return inner(x) + sparse.product(x, index, values, site.kernel.shape)


def sara(
    density: float = 0.1,
    threshold: float = 0.0,
    progressive: int = 0,
    penalty: float = 0.0,
    targets: Targets = "all-linear",
) -> Method:
    """SaRA on the sites that `targets` chooses.

    Args:
      density: share of a kernel's entries that may train, the smallest ones.
      threshold: tau, above which a weight does not train; 0: the largest of each kernel's share.
      progressive: steps after which entries above tau are settled; 0: never.
      penalty: of the nuclear norm of what trains.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/sara/values` (L, k).

    Raises:
      InputError: for a density outside (0, 0.5] or that leaves a kernel empty, a threshold below 0 or below every
        weight of a kernel's layer, another argument below 0, a kernel of more than 2^31 - 1 entries, or targets that
        match nothing.
    """
    config = dict(locals())
    sparse.check_density("sara", density)
    for name, value in (("threshold", threshold), ("progressive", progressive), ("penalty", penalty)):
        if not 0 <= value < float("inf"):
            raise InputError(f"sara: {name} {value} must be a finite number of at least 0")
    choose = sparse.chosen_sites("sara", targets, density)

    def prepare(params: tree.Params, view: View) -> tree.Params:
        """The parameters with `<site>/sara/index` and `trains`, where they are not there."""
        flat = tree.flatten(params)
        for site in choose(params):
            if f"{site}/sara/index" in flat:
                continue
            kernel = matrix(flat[sites.kernel_path(flat, site)])
            count = sparse.entries(density, *kernel.shape[-2:])
            index, trains = by_layer(lambda w, count=count: _smallest(dense(w), count, threshold), kernel)
            if not isinstance(trains, jax.core.Tracer) and not np.all(np.any(np.asarray(trains), axis=-1)):
                layer = int(np.argmin(np.any(np.asarray(trains).reshape(-1, count), axis=-1)))
                raise InputError(
                    f"sara: threshold {threshold} leaves layer {layer} of {site} empty; no weight is below it"
                )
            flat |= {f"{site}/sara/index": index, f"{site}/sara/trains": trains}
        return tree.unflatten(flat)

    def roles(others):
        own = {"values": TRAINED, "trains": MOVED}
        return lambda path: own.get(path.rsplit("/", 1)[1], others(path)) if "/sara/" in path else others(path)

    def loss(inner, view: View):
        return functools.partial(_penalised, inner, penalty)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        trained, moved = dict(leaves.trained), dict(leaves.moved)
        everything = {**moment.frozen, **moved, **trained}
        for path in [path for path in trained if path.endswith(VALUES)]:
            site = path.removesuffix(VALUES)
            small = moved[f"{site}/sara/trains"]
            trained[path] = jnp.where(small, trained[path], moment.before[path])
            if progressive:
                kernel = matrix(everything[sites.kernel_path(everything, site)])
                own = (kernel, everything[f"{site}/sara/index"], trained[path], small)
                function = functools.partial(_still_small, threshold=threshold)
                now = moment.step + 1 == progressive
                moved[f"{site}/sara/trains"] = jax.lax.cond(now, function, lambda *own: own[-1], *own)
        return Leaves(trained, moved)

    return Method(
        prepare=prepare,
        forward=lambda model, view: sites.attach(model, "sara", lambda site: SaRA(density), choose),
        roles=roles,
        loss=loss if penalty else unchanged,
        move=move if progressive or threshold else unchanged,
        merge=lambda params: sparse.fold(params, "sara"),
        specs=(Spec("sara", config),),
    )


def _smallest(w: jax.Array, count: int, threshold: float) -> tuple[jax.Array, jax.Array]:
    """(entries (count,) of a matrix with the least |w|, ascending; whether each is at most the threshold)."""
    index = sparse.most(-jnp.abs(w), count)
    return index, jnp.abs(w).reshape(-1)[index] <= (threshold or jnp.inf)


def _still_small(kernel: Any, index: jax.Array, values: jax.Array, trains: jax.Array, *, threshold: float) -> jax.Array:
    """Which entries (..., k) go on, of kernels (..., n, m); one layer's are unpacked at a time."""
    if kernel.ndim > 2:
        function = functools.partial(_still_small, threshold=threshold)
        return jax.lax.map(lambda layer: function(*layer), (kernel, index, values, trains))
    before = dense(kernel).reshape(-1)[index]
    tau = threshold or jnp.max(jnp.abs(before))
    return trains & (jnp.abs(before + values) <= tau)


def _penalised(inner: Callable, penalty: float, model: Any, params: tree.Params, batch: Any, key: Any = None):
    """(loss, aux) of a batch, with the nuclear norm of a kernel that the key draws; none without a key."""
    value, aux = inner(model, params, batch, key)
    if key is None:
        return value, aux
    flat = tree.flatten(params)
    chosen = [path.removesuffix(VALUES) for path in flat if path.endswith(VALUES)]
    layers = [flat[f"{site}{VALUES}"].size // flat[f"{site}{VALUES}"].shape[-1] for site in chosen]
    number = jax.random.randint(jax.random.fold_in(key, 0x5A7A), (), 0, sum(layers))
    ends = jnp.asarray(np.cumsum(layers))
    site = jnp.searchsorted(ends, number, side="right")
    place = number - jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[site]

    def norm_of(site):
        def norm(place):
            own = (
                matrix(flat[sites.kernel_path(flat, site)]),
                *(flat[f"{site}/sara/{x}"] for x in ("index", "values", "trains")),
            )
            if own[2].ndim > 1:
                own = jax.tree.map(lambda leaf: leaf[place], own)
            return nuclear(*own)

        return norm

    norm = jax.lax.switch(site, [norm_of(site) for site in chosen], place)
    return value + penalty * norm, {**aux, "nuclear": norm}


def nuclear(kernel: Any, index: jax.Array, values: jax.Array, trains: jax.Array) -> jax.Array:
    """||M * (W + S)||_* () of one kernel (n, m) and entries (k,)."""
    w = jax.lax.stop_gradient(dense(kernel)).reshape(-1)[index]
    at = jnp.zeros(kernel.shape[0] * kernel.shape[1]).at[index].set(jnp.where(trains, w + values, 0))
    return jnp.sum(jnp.linalg.svd(at.reshape(kernel.shape), compute_uv=False))


ABOUT = About(
    summary="the smallest weights of each kernel train",
    level="site",
    trains="density n m entries per kernel",
    saves="gradients and optimizer state of all but so many numbers per kernel; no activations; one update is at work",
    reference="Hu et al. 2024, arXiv:2409.06633",
    example={"density": 0.05, "progressive": 3},
    promises=Promises(site_bytes=_shira.saved_bytes),
)
