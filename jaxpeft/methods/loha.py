"""LoHa: an elementwise product of two low-rank matrices beside each frozen kernel, of a rank up to r^2.

    y = x W + s x ((D1 U1) * (D2 U2))        x (..., n), W (n, m) frozen, D1, D2 (n, r), U1, U2 (r, m), s = alpha / r

The same matrix is a product of rank r^2, of all products of columns of D1 and D2 and of rows of U1 and U2:

    (D1 U1) * (D2 U2) = D U        D[i, (p, q)] = D1[i, p] D2[i, q],  U[(p, q), j] = U1[p, j] U2[q, j]

and x D U is what is computed where r^2 (n + m) < n m, so that D and U take less time and less memory than the matrix;
elsewhere it is made in each pass, in the stream's dtype.

D2 starts at zero, the adapted model at the base; the others are uniform in +-1 / sqrt(their first side). Kept for the
backward pass: x, n per token, which the sites that read it share; all between is made again. It merges exactly, up to
rounding, and only multiplies with the kernel, so that quantized ones do as well.

Paper: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
arXiv:2108.06098; as an adapter Yeh et al. 2023 (LyCORIS), arXiv:2309.14859, with PEFT's start and scale. Deviations:
linear maps alone; no dropout of ranks or modules; the product of rank r^2, where PEFT always makes the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import INITS, Targets, check_alpha, check_factor, check_rank, chosen_sites
from jaxpeft.model import Context
from jaxpeft.peft import form
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged


class LoHa(nn.Module):
    """The adapted product. Parameters: w1_down, w2_down (n, r) and w1_up, w2_up (r, m), float32."""

    stacked = True  # only the product reads the kernel

    rank: int
    scale: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        start = lambda leaf: nn.initializers.zeros if leaf == "w2_down" else INITS["kaiming"]
        own = {leaf: self.param(leaf, start(leaf), shape) for leaf, shape in shapes_of(self.rank, n, m).items()}
        change = jax.checkpoint(lambda x, own: product(x, own, self.scale), prevent_cse=False)
        return inner(x) + change(x, own)


def shapes_of(rank: int, n: int, m: int) -> dict[str, tuple[int, ...]]:
    """{leaf: shape} beside a kernel (n, m)."""
    return {"w1_down": (n, rank), "w1_up": (rank, m), "w2_down": (n, rank), "w2_up": (rank, m)}


def product(x: jax.Array, own: Mapping[str, jax.Array], scale: float) -> jax.Array:
    """s x ((D1 U1) * (D2 U2)), (..., m), of x (..., n), in its dtype."""
    own = {name: leaf.astype(x.dtype) for name, leaf in {**own, "w1_up": scale * own["w1_up"]}.items()}
    d1, u1, d2, u2 = (own[name] for name in ("w1_down", "w1_up", "w2_down", "w2_up"))
    (n, r), m = d1.shape, u1.shape[1]
    if r * r * (n + m) < n * m:
        down = (d1[:, :, None] * d2[:, None, :]).reshape(n, r * r)
        up = (u1[:, None, :] * u2[None, :, :]).reshape(r * r, m)
        return x @ down @ up
    return x @ ((d1 @ u1) * (d2 @ u2))


def saved_bytes(inputs: int, outputs: int, itemsize: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x.

    Sites that read the same x share it; this counts it at each.
    """
    del outputs
    return inputs * itemsize


def loha(
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Method:
    """LoHa on the sites that `targets` chooses.

    Args:
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      rank_pattern: regular expression -> rank, for sites in whose path it is found (first match wins).
      alpha_pattern: the same for alpha.

    Returns:
      The method; it trains `<site>/loha/w1_down` and `w2_down` (L, n, r), `<site>/loha/w1_up` and `w2_up` (L, r, m).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, or targets that match nothing.
    """
    config = dict(locals())
    for r in (rank, *(rank_pattern or {}).values()):
        check_rank("loha", r)
    check_alpha("loha", alpha, alpha_pattern)

    def rank_of(site):
        return form.rank_and_alpha(config, site)[0]

    def scale(site):
        r, numerator = form.rank_and_alpha(config, site)
        return numerator / r

    named = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    choose = chosen_sites("loha", targets, rank_of, patterns=named)
    return Method(
        forward=lambda model, view: sites.attach(model, "loha", lambda site: LoHa(rank_of(site), scale(site)), choose),
        roles=trains(lambda path: "/loha/" in path),
        merge=lambda params: fold(params, scale, rank_of),
        specs=(Spec("loha", config),),
    )


def fold(params: Mapping[str, Any], scale: Callable[[str], float], rank_of: Callable[[str], int]) -> tree.Params:
    """W <- W + s (D1 U1) * (D2 U2) at every adapted site, whose leaves go; in float32, rounded once to W's dtype.

    Raises:
      InputError: for factors of another rank than `rank_of(site)`.
    """
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/loha/" not in path}
    for site in sorted({path.split("/loha/")[0] for path in flat if "/loha/" in path}):
        check_factor("loha", site, flat[f"{site}/loha/w1_up"], rank_of(site))
        one, two = (
            jnp.matmul(flat[f"{site}/loha/{w}_down"], flat[f"{site}/loha/{w}_up"], precision="highest")
            for w in ("w1", "w2")
        )
        kernel = merged[f"{site}/kernel"]
        merged[f"{site}/kernel"] = as_merged(kernel, dense(kernel) + scale(site) * one * two)
    return tree.unflatten(merged)


# Hugging Face PEFT, whose w is transposed: its w1_a is U1, its w1_b is D1.

PEFT = form.lycoris(
    "LOHA",
    "loha",
    {
        "w1_down": form.Tensor("hada_w1_b", "sn"),
        "w1_up": form.Tensor("hada_w1_a", "ms"),
        "w2_down": form.Tensor("hada_w2_b", "sn"),
        "w2_up": form.Tensor("hada_w2_a", "ms"),
    },
    shapes_of,
)


ABOUT = About(
    summary="an elementwise product of two low-rank matrices beside each frozen kernel",
    level="site",
    trains="two pairs of factors, 2 r (n + m) numbers per kernel, of a matrix of rank up to r^2",
    saves="gradients and optimizer state of all but the factors; it keeps the inputs, as LoRA does",
    reference="Hyeon-Woo et al. 2021, arXiv:2108.06098",
    example={"rank": 3},
    promises=Promises(site_bytes=saved_bytes),
    peft=PEFT,
)
