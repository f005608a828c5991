"""Starts that are calculated from the kernels: PiSSA, OLoRA, LoftQ.

PiSSA: Meng et al. 2024, arXiv:2404.02948. With W = U S V^T, A = U_r sqrt(S_r / s) and B = sqrt(S_r / s) V_r^T. OLoRA:
Buyukakyuz 2024, arXiv:2406.01775: with W^T = Q R, A = R_r^T and B = Q_r^T, whose rows are orthonormal.

LoftQ: Li et al. 2023, arXiv:2310.08659. q is the quantizer that stands behind LoRA in the chain, and from A_0 B_0 = 0

    Q_t = q(W - s A_{t-1} B_{t-1}),    s A_t B_t = the best approximation of W - Q_t of rank r        t = 1..T

training starts at Q_T + s A_T B_T, nearer to W than q(W) is. What is kept beside A, B is the pair of the round before,
with which Q_T is made of W again by quantizing alone. With T = 1 (PEFT's default) that is nothing: Q_1 = q(W), and the
adapter is an ordinary one for the quantized base, as `replace_lora_weights_loftq` makes it.

Deviations of LoftQ: the decomposition is divided by s, so that the start is right for any alpha (in PEFT for s = 1
alone); any packed format is iterated on, as `quantize` and `peqa` have them, groups and double quantization included.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.quant import CONVOLUTION, EMBEDDING, by_layer, dense, matrix
from jaxpeft.starts.pair import Pair, Start, left
from jaxpeft.targets import kernel_path


def _of_svd(kernel: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / scale)
    return u[..., :, :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def _of_qr(kernel: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    del scale
    q, r = jnp.linalg.qr(jnp.swapaxes(kernel, -1, -2))
    return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)


def _parts(decompose: Callable[..., tuple[jax.Array, jax.Array]]) -> Start:
    """The start at a part of the kernel W (..., n, m) float32: decompose(W, r, s) -> A0 (..., n, r), B0 (..., r, m)."""

    def pairs(params, sites, view):
        flat = tree.flatten(params)
        found = {site: decompose(dense(flat[kernel_path(flat, site.path)]), site.rank, site.scale) for site in sites}
        return {site.path: Pair(*pair, taken=pair) for site, pair in found.items()}

    return Start(pairs, takes_out=True, kinds=(EMBEDDING, CONVOLUTION))


def pissa() -> Start:
    """The principal part of the kernel."""
    return _parts(_of_svd)


def olora() -> Start:
    """The first columns and rows of the kernel's QR decomposition."""
    return _parts(_of_qr)


def loftq(iterations: int = 1) -> Start:
    """The principal part of what quantization loses.

    Args:
      iterations: T, the rounds; the paper has 5.

    Raises:
      InputError: for fewer than 1. Of the model: for a kernel that is packed already, or that nothing packs.
    """
    if iterations < 1:
        raise InputError(f"lora, init 'loftq': iterations {iterations} must be at least 1")

    def pairs(params, sites, view):
        flat, packs = tree.flatten(params), view.conversions(params) if sites else {}

        def of_site(site):
            kernel, pack = flat[f"{site.path}/kernel"], packs.get(f"{site.path}/kernel")
            if pack is None:
                raise InputError(
                    f"lora: init 'loftq' starts from what quantization loses of {site.path}: it needs the kernel as it "
                    "was, and what packs it behind it in the chain, as lora+quantize"
                )
            wide, pair, taken = dense(kernel), None, None
            for _ in range(iterations):
                taken, rest = pair, kernel if pair is None else left(kernel, *pair, site.scale)
                lost = wide - dense(by_layer(pack, matrix(rest)))
                pair = _of_svd(lost, site.rank, site.scale)
            assert pair is not None
            return Pair(*pair, taken=taken)

        return {site.path: of_site(site) for site in sites}

    return Start(pairs, takes_out=iterations > 1)
