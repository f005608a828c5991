"""LoKr: a Kronecker product of two small matrices beside each frozen kernel.

    y = x W + s x (W1 (x) W2)        x (..., n), W (n, m) frozen, s = alpha / r
        W1 (n1, m1), W2 (n2, m2), n = n1 n2, m = m1 m2;  W1 (x) W2 [(i, k), (j, l)] = W1[i, j] W2[k, l]

n1 <= n2 are the two divisors of n nearest to its square root, or n1 is the largest divisor up to `factor`, and so for
m. A factor trains as it is, or as a product of rank r, where that is less than half of its larger side:

    W2 = D2 U2   if r < max(n2, m2) / 2;        W1 = D1 U1   if `both` and r < max(n1, m1) / 2

W1, or U1, starts at zero, the adapted model at the base; the others are uniform in +-1 / sqrt(their first side). The
Kronecker product is never made: x is a matrix (n1, n2) per token, and W1^T (x W2) is y's, m1 x m2.

Kept for the backward pass: x, n per token, which the sites that read it share; all between is made again. It merges
exactly, up to rounding, and only multiplies with the kernel, so that quantized ones do as well.

Paper: Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
arXiv:2309.14859, with the start, the scale and the choice of sizes of PEFT. Deviations: linear maps alone; no dropout
of ranks or modules; never a product as large as the kernel, which PEFT makes in each pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import INITS, Targets, check_alpha, check_rank
from jaxpeft.model import Context
from jaxpeft.peft import form
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged


class LoKr(nn.Module):
    """The adapted product. Parameters: those of `shapes_of`, float32."""

    stacked = True  # only the product reads the kernel

    rank: int
    scale: float
    factor: int | None = None
    both: bool = False

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        shapes = shapes_of(self.rank, n, m, self.factor, self.both)
        zero = "w1" if "w1" in shapes else "w1_up"
        start = lambda leaf: nn.initializers.zeros if leaf == zero else INITS["kaiming"]
        own = {leaf: self.param(leaf, start(leaf), shape) for leaf, shape in shapes.items()}
        change = jax.checkpoint(lambda x, own: product(x, own, self.scale), prevent_cse=False)
        return inner(x) + change(x, own)


def shapes_of(rank: int, n: int, m: int, factor: int | None, both: bool) -> dict[str, tuple[int, ...]]:
    """{leaf: shape} beside a kernel (n, m): w1 (n1, m1), or w1_down (n1, r) and w1_up (r, m1); and so of w2."""
    (n1, n2), (m1, m2) = divided(n, factor), divided(m, factor)
    low = {"w1": both and 2 * rank < max(n1, m1), "w2": 2 * rank < max(n2, m2)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs in (("w1", n1, m1), ("w2", n2, m2)):
        if low[name]:
            shapes |= {f"{name}_down": (inputs, rank), f"{name}_up": (rank, outputs)}
        else:
            shapes[name] = (inputs, outputs)
    return shapes


def divided(size: int, factor: int | None) -> tuple[int, int]:
    """Two divisors of a size: the factor, if it is one, else the largest up to it and up to the square root.

    >>> divided(128, None), divided(128, 4), divided(128, 5), divided(56, 8), divided(127, None)
    ((8, 16), (4, 32), (4, 32), (8, 7), (1, 127))
    """
    if factor and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), factor or size)
    first = next(d for d in range(most, 0, -1) if size % d == 0)
    return first, size // first


def product(x: jax.Array, own: Mapping[str, jax.Array], scale: float) -> jax.Array:
    """s x (W1 (x) W2), (..., m), of x (..., n), in its dtype."""
    own = {name: leaf.astype(x.dtype) for name, leaf in {**own, "w1": scale * whole(own, "w1")}.items()}
    apart = x.reshape(*x.shape[:-1], len(own["w1"]), -1)
    if "w2" in own:
        y = jnp.einsum("...ik,ij->...jk", apart @ own["w2"], own["w1"])
    else:
        y = jnp.einsum("...ik,ij->...jk", apart @ own["w2_down"], own["w1"]) @ own["w2_up"]
    return y.reshape(*x.shape[:-1], -1)


def whole(own: Mapping[str, jax.Array], name: str) -> jax.Array:
    """W1 or W2 (..., in, out)."""
    if name in own:
        return own[name]
    return jnp.matmul(own[f"{name}_down"], own[f"{name}_up"], precision="highest")


def saved_bytes(inputs: int, outputs: int, itemsize: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x.

    Sites that read the same x share it; this counts it at each.
    """
    del outputs
    return inputs * itemsize


def lokr(
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    factor: int | None = None,
    both: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Method:
    """LoKr on the sites that `targets` chooses.

    Args:
      rank: r; from half of a factor's larger side on that factor trains as it is.
      alpha: numerator of the scale; None: the rank.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      factor: the first sides of the first matrix, as nearly as they divide the kernel's; None: near the square root.
      both: whether the first matrix, too, may be a product of rank r.
      rank_pattern: regular expression -> rank, for sites in whose path it is found (first match wins).
      alpha_pattern: the same for alpha.

    Returns:
      The method; it trains `<site>/lokr/w1` (L, n1, m1) and `<site>/lokr/w2` (L, n2, m2), or in place of one
      `<site>/lokr/w2_down` (L, n2, r) and `<site>/lokr/w2_up` (L, r, m2), and so `w1_down` and `w1_up`.

    Raises:
      InputError: for a rank or a factor below 1, or targets that match nothing.
    """
    config = dict(locals())
    for r in (rank, *(rank_pattern or {}).values()):
        check_rank("lokr", r)
    check_alpha("lokr", alpha, alpha_pattern)
    if factor is not None and factor < 1:
        raise InputError(f"lokr: factor {factor} must be at least 1, or None for the square root")

    def scale(site):
        r, numerator = form.rank_and_alpha(config, site)
        return numerator / r

    def adapter(site):
        return LoKr(form.rank_and_alpha(config, site)[0], scale(site), factor, both)

    def choose(params):
        found = sites.find(params, targets, "lokr")
        sites.check_patterns("lokr", {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}, found)
        return found

    return Method(
        forward=lambda model, view: sites.attach(model, "lokr", adapter, choose),
        roles=trains(lambda path: "/lokr/" in path),
        merge=lambda params: fold(params, scale),
        specs=(Spec("lokr", config),),
    )


def fold(params: Mapping[str, Any], scale: Callable[[str], float]) -> tree.Params:
    """W <- W + s W1 (x) W2 at every adapted site, whose leaves go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/lokr/" not in path}
    for site in sorted({path.split("/lokr/")[0] for path in flat if "/lokr/" in path}):
        prefix = f"{site}/lokr/"
        own = {path.removeprefix(prefix): leaf for path, leaf in flat.items() if path.startswith(prefix)}
        kernel = merged[f"{site}/kernel"]
        change = jnp.einsum("...ij,...kl->...ikjl", whole(own, "w1"), whole(own, "w2"))
        merged[f"{site}/kernel"] = as_merged(kernel, dense(kernel) + scale(site) * change.reshape(kernel.shape))
    return tree.unflatten(merged)


# Hugging Face PEFT, whose w is W transposed: its w1_a is U1, its w1_b is D1.

PEFT = form.lycoris(
    "LOKR",
    "lokr",
    {
        "w1": form.Tensor("lokr_w1", "ji"),
        "w1_down": form.Tensor("lokr_w1_b", "si", instead="w1"),
        "w1_up": form.Tensor("lokr_w1_a", "js", instead="w1"),
        "w2": form.Tensor("lokr_w2", "lk"),
        "w2_down": form.Tensor("lokr_w2_b", "sk", instead="w2"),
        "w2_up": form.Tensor("lokr_w2_a", "ls", instead="w2"),
    },
    shapes_of,
    to_fields=lambda config: {
        "decompose_both": config["both"],
        "decompose_factor": config["factor"] or -1,
        "rank_dropout_scale": False,
    },
    to_arguments=lambda fields: {
        "factor": None if (given := fields.get("decompose_factor")) in (None, -1) else max(given, 1),
        "both": bool(fields.get("decompose_both")),
    },
    fields=("decompose_factor", "decompose_both"),
)


ABOUT = About(
    summary="a Kronecker product of two small matrices beside each frozen kernel",
    level="site",
    trains="the two factors, of about sqrt(n m) numbers each, the second of r (sqrt(n) + sqrt(m)) at a small rank",
    saves="gradients and optimizer state of all but the factors; it keeps the inputs, as LoRA does",
    reference="Yeh et al. 2023, arXiv:2309.14859",
    example={"rank": 2},
    promises=Promises(site_bytes=saved_bytes),
    peft=PEFT,
)
