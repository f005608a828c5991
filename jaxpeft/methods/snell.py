"""SNELL: a sparse update of high rank, of a kernel function of few numbers of each input and output.

    y = x (W + D)        x (..., n), W (n, m) frozen
    K_ij = c (||p_i - q_j|| - ||p'_i - q'_j||)       p, p' (n, r/2), q, q' (m, r/2) trained; c = 0.1
    D_ij = K_ij |K_ij|  at the n m - floor(s n m) entries with the largest |K|, else 0; s = `sparsity`

The factor |K_ij| is a constant in differentiation: dK = |K| x^T dy at the entries that are kept, nothing elsewhere.
Distances are Euclidean and the rank of D is not bounded by r. Which entries are kept follows from p and q, anew in each
step, so that no index is stored. All four start uniform in +-1/sqrt(n r/2) and +-1/sqrt(m r/2), as PyTorch's
kaiming_uniform_ has it: the adapted model starts close to the base, as D is of the second order in small numbers, and
not at it.

Kept for the backward pass: x, as LoRA's A needs it. K, D and their gradients are as large as a kernel in float32, of
one kernel at a time: they are made again in the backward pass. The state is that of LoRA at rank r, 12 bytes of each of
r (n + m) numbers. Entries are found without sorting (`jaxpeft.sparse.largest`). Merging gives W + D.

Paper: Shen et al. 2024, "Expanding Sparse Tuning for Low Memory Usage", arXiv:2411.01800, and its code. Deviations: the
code's quantile interpolates between two entries, here the number of zeros is exact; the paper writes D as a soft
threshold, the code as above. The code's dropping of whole paths is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import sites, sparse, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods import lora as _lora
from jaxpeft.methods import shira as _shira
from jaxpeft.model import Context
from jaxpeft.quant import by_layer, dense, matrix
from jaxpeft.quant import merged as as_merged

SCALE = 0.1  # c
TINY = 1e-20  # of a squared distance: where it is zero its root has no gradient


class SNELL(nn.Module):
    """The adapted product. Parameters, float32: p (2, n, r/2) and q (2, m, r/2)."""

    stacked = True  # only the product reads the kernel

    rank: int
    sparsity: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        p = self.param("p", uniform, (2, n, self.rank // 2))
        q = self.param("q", uniform, (2, m, self.rank // 2))

        def change(x, p, q):
            d = update(p, q, self.sparsity).astype(x.dtype)
            return x @ d if site.through is None else site.through(x, d)

        return inner(x) + jax.checkpoint(change, prevent_cse=False)(x, p, q)


def uniform(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """As kaiming_uniform_ of a stack (2, n, r/2)."""
    bound = (shape[1] * shape[2]) ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def update(p: jax.Array, q: jax.Array, sparsity: float) -> jax.Array:
    """D (n, m) float32 of p (2, n, r/2) and q (2, m, r/2)."""
    k = similarities(p, q)
    return sparsified(k, jnp.int32(k.size - int(sparsity * k.size)))


def similarities(p: jax.Array, q: jax.Array) -> jax.Array:
    """K (n, m)."""
    return SCALE * (distances(p[0], q[0]) - distances(p[1], q[1]))


def sparsified(k: jax.Array, kept: jax.Array) -> jax.Array:
    """K |K| at the `kept` () int32 entries with the largest |K|, else 0; |K| is a constant."""
    size = jnp.abs(jax.lax.stop_gradient(k))
    return k * jnp.where(sparse.largest(size, kept), size, 0)


def distances(p: jax.Array, q: jax.Array) -> jax.Array:
    """||p_i - q_j|| (n, m) of rows p (n, h) and q (m, h)."""
    squares = jnp.sum(p**2, axis=1)[:, None] + jnp.sum(q**2, axis=1)
    squares = squares - 2 * jnp.matmul(p, q.T, precision="highest")
    return jnp.sqrt(jnp.maximum(squares, TINY))


def snell(rank: int = 32, sparsity: float = 0.9, targets: _lora.Targets = "all-linear") -> Method:
    """SNELL on the sites that `targets` chooses.

    Args:
      rank: r, an even number, at most the smaller side of each kernel.
      sparsity: the share of an update's entries that are zero. Published: 0.9 on VTAB-1k, 0.3 on fine-grained data.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/snell/p` (L, 2, n, r/2) and `q` (L, 2, m, r/2).

    Raises:
      InputError: for a rank that is odd, below 2 or above a kernel's smaller side; a sparsity outside [0, 1) or that
        leaves an update empty; a kernel of more than 2^31 - 1 entries; or targets that match nothing.
    """
    config = dict(locals())
    choose = chosen_sites("snell", targets, rank, sparsity)

    return Method(
        forward=lambda model, view: sites.attach(model, "snell", lambda site: SNELL(rank, sparsity), choose),
        roles=trains(lambda path: path.endswith(("/snell/p", "/snell/q"))),
        merge=lambda params: fold(params, sparsity),
        specs=(Spec("snell", config),),
    )


def chosen_sites(name: str, targets: _lora.Targets, rank: int, sparsity: float) -> Callable[[tree.Params], list[str]]:
    """params -> the sites that `targets` names.

    Raises:
      InputError: for a rank or a sparsity out of its range; when called, as `sparse.chosen_sites` and
        `lora.chosen_sites` do.
    """
    if rank < 2 or rank % 2:
        raise InputError(f"{name}: rank {rank} must be an even number of at least 2: half of it is of each distance")
    if not 0 <= sparsity < 1:
        raise InputError(f"{name}: sparsity {sparsity} must be at least 0 and below 1")
    large = sparse.chosen_sites(name, targets, 1 - sparsity, f"sparsity {sparsity}")
    ranked = _lora.chosen_sites(name, targets, lambda site: rank)

    def choose(params):
        large(params)
        return ranked(params)

    return choose


def fold(params: Mapping[str, object], sparsity: float) -> tree.Params:
    """W <- W + D at every adapted site, whose leaves go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/snell/" not in path}
    for path, p in flat.items():
        if path.endswith("/snell/p"):
            site = path.removesuffix("/snell/p")
            at = sites.kernel_path(flat, site)
            add = lambda w, p, q: w + update(p, q, sparsity)
            merged[at] = as_merged(merged[at], by_layer(add, dense(matrix(merged[at])), p, flat[f"{site}/snell/q"]))
    return tree.unflatten(merged)


ABOUT = About(
    summary="a sparse update of high rank, from distances between few numbers of each input and output",
    level="site",
    trains="r(n+m) numbers per kernel",
    saves="gradients and optimizer state of all but r(n+m) numbers; no activations; a dense update is at work",
    reference="Shen et al. 2024, arXiv:2411.01800",
    example={"rank": 4, "sparsity": 0.5},
    promises=Promises(site_bytes=_shira.saved_bytes, starts_at_base=False),
    defaults=Defaults(lr=1e-3),
)
