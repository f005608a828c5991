"""SVFit: the largest singular values of each kernel train, and nothing else.

    W = U diag(s) V^T                          the singular value decomposition
    y = x W + ((x U_r) d) V_r^T                x (..., n), W (n, m), U_r (n, r), V_r^T (r, m) frozen; d (r,) trained
    dL/dd = sum over tokens of (x U_r) (dy V_r)

The paper trains sigma = s_r + d in x (W - U_r diag(s_r) V_r^T) + ((x U_r) sigma) V_r^T, which is the same. Here W stays
as it is, so that no rounding of what is left of it comes in and it may be packed. d starts at zero, the adapted model
at the base; weight decay pulls to the base's singular values, not to zero.

Kept for the backward pass: x U_r, r per token and kernel, and no x, as LoRA-FA keeps x A. r is large here, though: at r
= n that is as much as x itself, and where several kernels read the same x, more. U_r and V_r^T are frozen arrays in the
kernel's dtype, r (n + m) numbers: from r = n m / (n + m) on more than the kernel has. What it saves is the optimizer's
state and the adapter's file, which holds d alone: whoever reads it decomposes the base again, and the sign of a pair of
vectors, which is the decomposition's to choose, is in neither product.

Merging is exact up to rounding: W <- W + U_r diag(d) V_r^T.

Paper: Sun et al. 2024, "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
arXiv:2409.05926. Its code is not published, and neither its rank nor its rate is stated; a 16th of the parameters of
LoRA of rank 8, which it reports on kernels of 768 x 768, is r = 768, all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Context
from jaxpeft.quant import dense


class SVFit(nn.Module):
    """The adapted product. Parameters: vectors u (n, r) and v (r, m), frozen; shift (r,) float32."""

    stacked = True  # only the product reads the kernel

    rank: int | None = None

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        vectors = self.param("vectors", lambda key: decompose(site.kernel, self.rank))
        shift = self.param("shift", nn.initializers.zeros, vectors["v"].shape[:1])
        low = checkpoint_name(x @ vectors["u"].astype(x.dtype), "svfit_low")
        return inner(x) + (low * shift.astype(x.dtype)) @ vectors["v"].astype(x.dtype)


def decompose(kernel: Any, rank: int | None) -> dict[str, jax.Array]:
    """U_r (n, r) and V_r^T (r, m) of a kernel (n, m) of any type, in its dtype."""
    u, _, v = jnp.linalg.svd(dense(kernel), full_matrices=False)
    return {"u": u[:, :rank].astype(kernel.dtype), "v": v[:rank].astype(kernel.dtype)}


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int | None = None, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x U_r."""
    return (rank or min(inputs, outputs)) * itemsize


def svfit(rank: int | None = None, targets: _lora.Targets = "all-linear") -> Method:
    """SVFit on the sites that `targets` chooses.

    Args:
      rank: r, how many of each kernel's singular values train, the largest; None: all of them.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/svfit/shift` (L, r).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, or targets that match nothing.
    """
    config = dict(locals())
    if rank is not None:
        _lora.check_rank("svfit", rank)
    choose = _lora.chosen_sites("svfit", targets, lambda site: rank or 1)

    def factors(leaves, n):
        del n
        return leaves["u"] * leaves["shift"][..., None, :], leaves["v"]

    return Method(
        forward=lambda model, view: sites.attach(model, "svfit", lambda site: SVFit(rank), choose),
        roles=trains(lambda path: path.endswith("/svfit/shift")),
        merge=lambda params: _lora.fold(params, "svfit", lambda site: 1.0, factors),
        specs=(Spec("svfit", config),),
    )


ABOUT = About(
    summary="the singular values of each kernel, between its frozen singular vectors",
    level="site",
    trains="their shifts, r numbers per kernel",
    saves="as LoRA, and the inputs that only A's gradient needs; keeps r numbers per token, and r(n+m) frozen ones",
    reference="Sun et al. 2024, arXiv:2409.05926",
    example={"rank": 4},
    promises=Promises(site_bytes=saved_bytes, lr=1e-1),
    defaults=Defaults(lr=1e-2),
    remade=lambda path: "/svfit/vectors/" in path,
)
