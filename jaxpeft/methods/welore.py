"""WeLore: kernels with few large singular values become products of two factors, which train; the others stay, frozen.

    sigma_1 >= ... >= sigma_q of W (n, m), q = min(n, m)
    pruned(W) = #{i: (sigma_i - sigma_q) / (sigma_1 - sigma_q) < tau}     k(W) = q - pruned(W)
    low-rank (LRC), where pruned / q > min_ratio:    y = (x U) V          U (n, k) = U_k sqrt(S_k), V (k, m) alike
    otherwise (N-LRC):                               y = x W              dense, frozen

tau is one number for all kernels; the published ones prune so much of LLaMA-2's ranks (`REDUCTIONS`): 0.0225 prunes
10 %, 0.084 20, 0.115 30, 0.145 40, 0.175 50, 0.215 60, 0.26 70. What is pruned is lost: the model does not start at the
base, and W itself is gone, so that weights shrink where k < n m / (n + m). Embeddings, head and norms are frozen.

Kept for the backward pass: x and x U, for the gradients of U and V; as much of x as LoRA's A needs.

Paper: Jaiswal et al. 2024, "From GaLore to WeLore", arXiv:2407.11239, and its code. Deviations: the layers of a stack
are arrays of one shape, so that all layers of a site are low-rank or none is, by their mean share, and the stack has
the rank of its least pruned layer; each layer has its own k all the same, as pairs beyond it are zero, have no
gradients and stay so. min_ratio is 0.5, from which on a square kernel's factors are smaller than it is; the code's
default is 0. A plan has no spectra: there every kernel is low-rank, with what the published table prunes at tau.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Context
from jaxpeft.quant import Absent, by_layer, dense, folded_as, is_packed, matrix

# tau -> the share of all ranks of LLaMA-2 that it prunes.
REDUCTIONS = {0.0: 0.0, 0.0225: 0.1, 0.084: 0.2, 0.115: 0.3, 0.145: 0.4, 0.175: 0.5, 0.215: 0.6, 0.26: 0.7, 1.0: 1.0}


class WeLore(nn.Module):
    """The product of the factors, in the place of the kernel's. Parameters: u (n, k); v (k, m), float32."""

    stacked = True  # no product reads the kernel

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        u, v = (self._factor(name, shape) for name, shape in (("u", (n, 1)), ("v", (1, m))))
        return checkpoint_name(x @ u.astype(x.dtype), "welore_low") @ v.astype(x.dtype)

    def _factor(self, name: str, shape: tuple[int, int]) -> jax.Array:
        """`prepare` has made it; its rank is the spectrum's."""
        there = self.has_variable("params", name)
        return self.get_variable("params", name) if there else self.param(name, nn.initializers.zeros, shape)


def spectrum(kernel: Any) -> np.ndarray:
    """(layers, q): the singular values of kernels (..., n, m), the largest first."""
    found = by_layer(lambda w: jnp.linalg.svd(dense(w), compute_uv=False), kernel)
    return np.asarray(found, np.float64).reshape(-1, found.shape[-1])


def ranks(values: np.ndarray, threshold: float) -> np.ndarray:
    """(layers,): k of each layer's singular values (layers, q); at least 1."""
    least, most = values[:, -1:], values[:, :1]
    share = (values - least) / np.maximum(most - least, 1e-30)
    return np.maximum(np.sum(share >= threshold, axis=1), 1)


def split(kernel: jax.Array, kept: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """U (n, rank) and V (rank, m) of W (n, m), of which the first `kept` pairs are not zero."""
    u, s, vt = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    root = jnp.where(jnp.arange(rank) < kept, jnp.sqrt(s[:rank]), 0)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


_split = jax.jit(split, static_argnums=2)


def saved_bytes(inputs: int, outputs: int, itemsize: int, **_) -> int:
    """Bytes per token kept at one kernel beyond what a frozen backbone keeps, at most: x, and x U of every rank."""
    return (inputs + min(inputs, outputs)) * itemsize


def welore(threshold: float = 0.175, min_ratio: float = 0.5, targets: _lora.Targets = "all-linear") -> Method:
    """WeLore on the kernels that `targets` chooses.

    Args:
      threshold: tau, below which a normalised singular value is pruned.
      min_ratio: the share of pruned values above which a kernel becomes low-rank.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/welore/u` (L, n, k) and `<site>/welore/v` (L, k, m).

    Raises:
      InputError: for a threshold or a ratio outside 0 to 1, packed kernels, targets that match nothing, or a model of
        which no kernel is low-rank.
    """
    config = dict(locals())
    if not 0 < threshold < 1:
        raise InputError(f"welore: threshold {threshold} must be above 0 and below 1")
    if not 0 <= min_ratio < 1:
        raise InputError(f"welore: min_ratio {min_ratio} must be at least 0 and below 1")

    def kept(kernel):
        """k of each layer; None of a kernel that stays."""
        q, layers = min(kernel.shape[-2:]), int(np.prod(kernel.shape[:-2]))
        if isinstance(kernel, jax.core.Tracer):
            reduction = np.interp(threshold, list(REDUCTIONS), list(REDUCTIONS.values()))
            return np.full(layers, max(round(q * (1 - reduction)), 1))
        found = ranks(spectrum(kernel), threshold)
        return found if 1 - found.mean() / q > min_ratio else None

    def factors(kernel, found):
        rank = int(found.max())
        each = jnp.asarray(found, jnp.int32).reshape(kernel.shape[:-2])
        return by_layer(lambda w, k: _split(w, k, rank), kernel, each)

    def prepare(params, view):
        flat, low = tree.flatten(params), 0
        found = sites.find(params, targets, "welore")
        # The leaves of an adapter say what is low-rank.
        read = any(f"{site}/welore/{x}" in flat for site in found for x in "uv")
        for site in found:
            path, u, v = sites.kernel_path(flat, site), f"{site}/welore/u", f"{site}/welore/v"
            kernel = matrix(flat[path])
            if read:
                if u not in flat and v not in flat:
                    continue
                _check_factors(site, kernel.shape, *(flat[x].shape if x in flat else () for x in (u, v)))
            else:
                if is_packed(kernel):
                    raise InputError(f"welore: {site} is packed; its factors are those of a plain kernel")
                if (k := kept(kernel)) is None:
                    continue
                flat[u], flat[v] = factors(kernel, k)
            flat[path], low = folded_as(flat[path], Absent.like), low + 1
        if not low:
            raise InputError(
                f"welore: of no kernel are more than min_ratio {min_ratio} of the singular values below threshold "
                f"{threshold}; raise the threshold"
            )
        return tree.unflatten(flat)

    def choose(params):
        flat = tree.flatten(params)
        return [site for site in sites.find(params, targets, "welore") if f"{site}/welore/u" in flat]

    return Method(
        prepare=prepare,
        forward=lambda model, view: sites.attach(model, "welore", lambda site: WeLore(), choose),
        roles=trains(lambda path: "/welore/" in path),
        merge=merge,
        specs=(Spec("welore", config),),
    )


def _check_factors(site: str, kernel: tuple[int, ...], u: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Raises InputError for factors that are not those of such a kernel."""
    *lead, n, m = kernel
    rank = u[-1] if u else 0
    if (u, v) != ((*lead, n, rank), (*lead, rank, m)) or not 1 <= rank <= min(n, m):
        raise InputError(f"welore: {site} has factors {u} and {v}, which are none of its kernel {kernel}")


def merge(params: Mapping[str, Any]) -> tree.Params:
    """W <- U V, a plain array in the base's dtype; the factors go."""
    return _lora.fold(params, "welore", lambda site: 1.0, lambda leaves, n: (leaves["u"], leaves["v"]))


ABOUT = About(
    summary="kernels with few large singular values become two factors, which train; all others are frozen",
    level="site",
    trains="U and V, k(n+m) numbers of each low-rank kernel",
    saves="gradients and state of all but the factors, and the kernels that they replace; keeps all inputs",
    reference="Jaiswal et al. 2024, arXiv:2407.11239",
    example={"threshold": 0.5, "min_ratio": 0.3},
    promises=Promises(site_bytes=saved_bytes, starts_at_base=False),
    defaults=Defaults(lr=5e-5),
    changes_kernels=lambda arguments: True,
    shaped=lambda path: "/welore/" in path,
)
