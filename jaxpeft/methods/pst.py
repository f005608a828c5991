"""PST: a kernel gets sparser step by step, by a score that trains in two small forms, and so does its update.

    W' = W + beta V U                              W (n, m) frozen; V (n, r), U (r, m)
    S  = |W'| + alpha1 B A + alpha2 (C_i + R_j)    B (n, q), A (q, m), C (n,), R (m,)
    y  = x (M * W')                                M (n, m): 1 but at the floor(s n m) entries with the least S

U and A are drawn from N(0, 1); V, B, C and R start at zero: at first M is pruning by magnitude. The share s of entries
that are pruned rises from 0 at step `begin` to `sparsity` at step `until`, with t the steps done between them:

    s = sparsity (1 - (1 - t / (until - begin))^3)

so that the adapted model starts at the base. The gradient passes M as if it were S:

    dM = x^T dy * W',    dS = dM,    dW' = M * x^T dy + sign(W') * dS

Kept for the backward pass: x, as LoRA's A needs it. W', S, M and their gradients are as large as a kernel in float32,
of one kernel at a time: they are made again in the backward pass. So it saves gradients and the optimizer's state, of
all but r (n + m) + q (n + m) + n + m numbers, and no activations; what is won is the sparse kernel. Merging gives M *
W', whose zeros are exact. M is found without sorting (`jaxpeft.sparse.largest`); of equal scores the first, row after
row, are kept.

Paper: Li et al. 2022, "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", arXiv:2205.11005, and its
code (AliceMind), whose matrices are these transposed. Deviations: `begin` and `until` are steps, there shares of a run;
s of more than 2^24 entries is counted in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import sites, sparse, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import MOVED, TRAINED, Leaves, Method, Moment, Spec
from jaxpeft.methods import lora as _lora
from jaxpeft.methods import shira as _shira
from jaxpeft.model import Context, Model
from jaxpeft.quant import by_layer, dense, matrix
from jaxpeft.quant import merged as as_merged

SPARSITY = "pst/sparsity"  # s by now


class PST(nn.Module):
    """The pruned product. Parameters, float32: u (r, m), v (n, r), a (q, m), b (n, q), rows (m,), columns (n,)."""

    stacked = True  # only the product reads the kernel

    rank: int
    mask_rank: int
    beta: float
    alpha1: float
    alpha2: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        if not site.plain:
            raise InputError("pst: must be nearest to the kernel, which it prunes: name it last in the chain")
        n, m = site.kernel.shape
        drawn, zeros = nn.initializers.normal(1.0), nn.initializers.zeros
        own = {
            "u": self.param("u", drawn, (self.rank, m)),
            "v": self.param("v", zeros, (n, self.rank)),
            "a": self.param("a", drawn, (self.mask_rank, m)),
            "b": self.param("b", zeros, (n, self.mask_rank)),
            "rows": self.param("rows", zeros, (m,)),
            "columns": self.param("columns", zeros, (n,)),
        }
        shared = sites.beside(self, ctx, "pst", "shares")
        share = jnp.float32(0) if shared is None else shared["sparsity"]

        def product(x, kernel, own, share):
            w = pruned(dense(kernel), own, share, self.beta, self.alpha1, self.alpha2).astype(x.dtype)
            return x @ w if site.through is None else site.through(x, w)

        return jax.checkpoint(product, prevent_cse=False)(x, site.kernel, own, share)


def pruned(
    kernel: jax.Array, own: Mapping[str, jax.Array], share: jax.Array, beta: float, alpha1: float, alpha2: float
) -> jax.Array:
    """M * W' (n, m) float32 of a kernel (n, m) float32, of which `share` is pruned."""
    n, m = kernel.shape
    low = lambda x, y: jnp.matmul(own[x], own[y], precision="highest")
    changed = kernel + beta * low("v", "u")
    scores = jnp.abs(changed) + alpha1 * low("b", "a") + alpha2 * (own["columns"][:, None] + own["rows"])
    kept = n * m - jnp.floor(share * jnp.float32(n * m)).astype(jnp.int32)
    return binary(scores, kept) * changed


@jax.custom_jvp
def binary(scores: jax.Array, kept: jax.Array) -> jax.Array:
    """M (n, m) float32: 1 at the `kept` () int32 largest scores, 0 elsewhere; its derivative is that of the scores."""
    return sparse.largest(scores, kept).astype(jnp.float32)


@binary.defjvp
def _(primals, tangents):
    return binary(*primals), tangents[0]


def sparsity_at(step: jax.Array, sparsity: float, begin: int, until: int) -> jax.Array:
    """s () float32 after so many steps."""
    return jnp.float32(sparsity) * (1 - sparse.ahead(step, begin, until))


def pst(
    sparsity: float = 0.5,
    begin: int = 0,
    until: int = 1000,
    rank: int = 8,
    mask_rank: int = 8,
    beta: float = 1.0,
    alpha1: float = 1.0,
    alpha2: float = 1.0,
    targets: _lora.Targets = "all-linear",
) -> Method:
    """PST on the sites that `targets` chooses. Of a chain's adapters at a site it is the last.

    Args:
      sparsity: the share of each kernel's entries that are pruned from step `until` on.
      begin: step from which on entries are pruned.
      until: step at which the share is reached; it should lie before a run's end.
      rank: r of the update.
      mask_rank: q of the score.
      beta: factor of the update.
      alpha1: factor of the score's product.
      alpha2: factor of the scores of rows and columns.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/pst/u` (L, r, m), `v` (L, n, r), `a` (L, q, m), `b` (L, n, q), `rows` (L, m) and
      `columns` (L, n).

    Raises:
      InputError: for a factor or a sparsity outside its range, or one that leaves a kernel empty; a rank below 1 or
        above a kernel's smaller side; steps in the wrong order; a kernel of more than 2^31 - 1 entries; or targets that
        match nothing.
    """
    config = dict(locals())
    if not 0 < sparsity < 1:
        raise InputError(f"pst: sparsity {sparsity} must be above 0 and below 1")
    if begin < 0:
        raise InputError(f"pst: begin {begin} must be at least 0")
    if until <= begin:
        raise InputError(f"pst: until {until} must be above begin, {begin}")
    if mask_rank < 1:
        raise InputError(f"pst: mask_rank {mask_rank} must be at least 1")
    if not (0 < beta < float("inf")):
        raise InputError(f"pst: beta {beta} must be a finite number above 0")
    for name in ("alpha1", "alpha2"):
        if not (0 <= config[name] < float("inf")):
            raise InputError(f"pst: {name} {config[name]} must be a finite number of at least 0")
    _lora.check_rank("pst", rank)
    large = sparse.chosen_sites("pst", targets, 1 - sparsity, f"sparsity {sparsity}")
    ranked = _lora.chosen_sites("pst", targets, lambda site: rank)
    scored = _lora.chosen_sites("pst: of mask_rank", targets, lambda site: mask_rank)
    adapter = PST(rank, mask_rank, beta, alpha1, alpha2)

    def choose(params):
        large(params)
        scored(params)
        return ranked(params)

    def role(path):
        return MOVED if path == SPARSITY else TRAINED

    def forward(model: Model, view) -> Model:
        adapted = sites.attach(model, "pst", lambda site: adapter, choose, shared=True)

        def init(key, params):
            params = adapted.init(key, params)
            return {**params, "pst": {"sparsity": jnp.zeros(()), **params.get("pst", {})}}

        return adapted._replace(init=init)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        share = sparsity_at(moment.step + 1, sparsity, begin, until)
        share = jnp.maximum(share, leaves.moved[SPARSITY])  # of a run that goes on from an adapter's end
        return Leaves(leaves.trained, {**leaves.moved, SPARSITY: share})

    return Method(
        forward=forward,
        roles=lambda others: lambda path: role(path) if "/pst/" in f"/{path}" else others(path),
        move=move,
        merge=lambda params: fold(params, beta, alpha1, alpha2),
        specs=(Spec("pst", config),),
    )


def fold(params: Mapping[str, Any], beta: float, alpha1: float, alpha2: float) -> tree.Params:
    """W <- M * W' at every adapted site, whose leaves go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/pst/" not in f"/{path}"}
    of_kernel = lambda w, own: pruned(w, own, flat[SPARSITY], beta, alpha1, alpha2)
    for path in flat:
        if path.endswith("/pst/u"):
            site = path.removesuffix("/pst/u")
            own = {name: flat[f"{site}/pst/{name}"] for name in ("u", "v", "a", "b", "rows", "columns")}
            kernel = merged[sites.kernel_path(flat, site)]
            merged[sites.kernel_path(flat, site)] = as_merged(kernel, by_layer(of_kernel, dense(matrix(kernel)), own))
    return tree.unflatten(merged)


ABOUT = About(
    summary="a kernel that gets sparser, by a score that trains in two small forms, and a low-rank update of it",
    level="site",
    trains="(r+q+1)(n+m) numbers per kernel",
    saves="gradients and optimizer state of all but so few numbers; no activations; one dense update and mask at work",
    reference="Li et al. 2022, arXiv:2205.11005",
    example={"sparsity": 0.3, "until": 4, "rank": 4, "mask_rank": 4},
    steps="until",
    promises=Promises(site_bytes=_shira.saved_bytes),
)
