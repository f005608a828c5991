"""LoRA-GA: the first step of LoRA goes where that of full fine-tuning would.

    G = dL/dW = U S V^T        the mean gradient of some batches, W (n, m)
    A = A0 = U[:, i],  B = B0 = c diag(S_j) V[:, j]^T        i, j of r different singular vectors among the first 2 r
    W <- W - s A0 B0

    direction   i              j                     scale        c
    ArB2r       0..r-1         r..2r-1               stable       m^(1/4) / sqrt(gamma)
    A2rBr       r..2r-1        0..r-1                weight_svd   the largest singular value of W over S_j's first
    ArBr        1, 3, 5, ..    0, 2, 4, ..           gd_scale     1 / s, and A / s
                                                     unit         1

The model starts at the base up to the rounding of W. G is never made: with Q (n, q), q = min(4 r, n, m), the products
G P (n, q) and Q^T G (q, m) are gradients of leaves of that size, and Q and P are turned towards the singular vectors in
turn (Halko et al. 2011, algorithm 4.4), in 2 + 2 `iterations` sweeps over the batches. So the start needs no more
memory than a step of LoRA of rank 4 r, and is had over packed kernels too, of which what is left is packed again.

Paper: Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000. Deviations: as in
PEFT, B has the singular values and the factor c alone, where the paper gives A and B the factor m^(1/4) / sqrt(gamma)
each, without them. PEFT sums up G itself, and has random indices as a further direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.model import Batch
from jaxpeft.quant import dense
from jaxpeft.starts import probes
from jaxpeft.starts.pair import Pair, Sited, Start

# (r) -> the singular vectors of A and of B.
DIRECTIONS = {
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
}
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class Sketch(nn.Module):
    """The site's product. Parameters, float32: left Q (n, q), whose gradient is G right^T; right (q, m), left^T G."""

    size: int

    @nn.compact
    def __call__(self, inner, x, site, ctx):
        n, m = site.kernel.shape
        left = self.param("left", nn.initializers.zeros, (n, self.size)).astype(x.dtype)
        right = self.param("right", nn.initializers.normal(1.0), (self.size, m)).astype(x.dtype)
        product = jax.lax.stop_gradient(x) @ left @ right
        return inner(x) + (product - jax.lax.stop_gradient(product))


def lora_ga(direction: str = "ArB2r", scale: str = "stable", gamma: float = 16, iterations: int = 1) -> Start:
    """Singular vectors of the gradient.

    Args:
      direction: which of them are A's and B's.
      scale: how B is scaled.
      gamma: of "stable".
      iterations: by which the sketch of the gradient is refined.

    Raises:
      InputError: for an unknown direction or scale, gamma not above 0, or iterations below 0. Of the model: for a site
        with less than 2 r singular vectors, no batches, or batches without targets or labels.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"lora, init 'lora_ga': direction {direction!r} is not one of {', '.join(DIRECTIONS)}")
    if scale not in SCALES:
        raise InputError(f"lora, init 'lora_ga': scale {scale!r} is not one of {', '.join(SCALES)}")
    if not 0 < gamma < float("inf"):
        raise InputError(f"lora, init 'lora_ga': gamma {gamma} must be a finite number above 0")
    if iterations < 0:
        raise InputError(f"lora, init 'lora_ga': iterations {iterations} must be at least 0")

    def pairs(params, sites, view):
        if not sites:
            return {}
        flat = tree.flatten(params)
        kernels = {site: flat[f"{site.path}/kernel"] for site in sites}
        for site, kernel in kernels.items():
            n, m = kernel.shape[-2:]
            if 2 * site.rank > min(n, m):
                raise InputError(
                    f"lora: init 'lora_ga' takes {2 * site.rank} singular vectors for rank {site.rank}, more than "
                    f"{site.path} has, a kernel of {n} x {m}"
                )
        found = probes.batches("lora: init 'lora_ga'", view)
        vectors = decomposed(view.base, params, sites, found, iterations, view.loss) if found else _of_none(kernels)
        made = {}
        for site, kernel in kernels.items():
            u, s, vt = vectors[site.path]
            of_a, of_b = DIRECTIONS[direction](site.rank)
            a, b = u[..., :, of_a], s[..., of_b, None] * vt[..., of_b, :]
            if scale == "stable":
                b = b * kernel.shape[-1] ** 0.25 / gamma**0.5
            elif scale == "weight_svd":
                largest = jnp.linalg.norm(dense(kernel), ord=2, axis=(-2, -1))
                b = b * (largest / jnp.maximum(s[..., of_b][..., 0], 1e-30))[..., None, None]
            elif scale == "gd_scale":
                a, b = a / site.scale, b / site.scale
            made[site.path] = Pair(a, b, taken=(a, b))
        return made

    return Start(pairs, takes_out=True)


def decomposed(
    base: Any,
    params: tree.Params,
    sites: Sequence[Sited],
    batches: Sequence[Batch],
    iterations: int,
    loss: Callable[..., Any] | None = None,
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """{site: U (..., n, q), S (..., q), V^T (..., q, m)} of the mean gradient of its kernel, float32."""
    flat = tree.flatten(params)
    sizes = {site: min(4 * site.rank, *flat[f"{site.path}/kernel"].shape[-2:]) for site in sites}
    leaves, of_batch = probes.gradients(base, params, sites, lambda site: Sketch(sizes[site]), probes.value(loss))

    def sweep(side, leaves):
        """The mean of one side's gradients."""
        total = None
        for batch in batches:
            found = {site: own[side] for site, own in of_batch(leaves, batch).items()}
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return jax.tree.map(lambda x: x / len(batches), total)

    for _ in range(1 + iterations):
        left = jax.tree.map(_orthonormal, sweep("left", leaves))
        leaves = {site: {**own, "left": left[site]} for site, own in leaves.items()}
        rows = sweep("right", leaves)
        leaves = {
            site: {**own, "right": _transposed(_orthonormal(_transposed(rows[site])))} for site, own in leaves.items()
        }

    def vectors(left, rows):
        u, s, vt = jnp.linalg.svd(rows, full_matrices=False)
        u = jnp.matmul(left, u, precision="highest")
        largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)
        sign = jnp.where(largest < 0, -1, 1)
        return u * sign, s, vt * _transposed(sign)

    return {site.path: vectors(left[site.path], rows[site.path]) for site in sites}


def _orthonormal(columns: jax.Array) -> jax.Array:
    return jnp.linalg.qr(columns)[0]


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _of_none(kernels: Any) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Of the same shapes without data: where a run is planned, or its own are read from a checkpoint."""

    def of(site, kernel):
        *lead, n, m = kernel.shape
        q = min(4 * site.rank, n, m)
        return jnp.ones((*lead, n, q)), jnp.ones((*lead, q)), jnp.ones((*lead, q, m))

    return {site.path: of(site, kernel) for site, kernel in kernels.items()}
