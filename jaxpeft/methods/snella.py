"""SNELLA: SNELL with a richer kernel function, whose updates compete for one budget of entries.

    y = x (W + D)        x (..., n), W (n, m) frozen
    K_ij = c (||p_i - q_j|| - ||p'_i - q'_j||)        p, p' (n, r/2), q, q' (m, r/2) trained; c = 0.1
    G_ij = K_ij + alpha softmax_j(K_ij / gamma) + beta        alpha, gamma and beta of each kernel, trained
    D_ij = G_ij |G_ij|   at the k entries of a kernel with the largest |G|, else 0

The factor |G_ij| is a constant in differentiation, as in `snell`. k is a kernel's part of a budget B of all chosen
kernels of all layers together. B falls from the share 1 - `initial` of their N entries at step `begin` to the share 1 -
`sparsity` at step `until`, with t the steps done between them:

    B = N ((1 - sparsity) + (sparsity - initial) (1 - t / (until - begin))^3)

Every `every` steps, and at last at step `until`, it is shared out in proportion to a score of each kernel, of which
what goes beyond a kernel's n m entries goes to the others in proportion to theirs:

    I <- b I + (1 - b) |theta dtheta|,   U <- b U + (1 - b) ||theta dtheta| - I|     theta of p, and of q; b = 0.85
    score = mean(I_p U_p) + mean(I_q U_q)

A kernel without a score has no part of it. The gradients are the step's own, of all groups of rows and micro-batches.

Kept for the backward pass: x, as LoRA's A needs it. G, D and their gradients are as large as a kernel in float32, of
one kernel at a time: they are made again in the backward pass. The state is 20 bytes of each of r (n + m) numbers: LoRA
at rank r has 12 of them, and I and U 8. Entries are found without sorting. Merging gives W + D.

Paper: Shen et al. 2025, "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
arXiv:2510.24037, and its code's allocator. Deviations: `begin` and `until` are steps, there counted from a run's ends;
parts stay from `until` on, where the code goes on sharing out; parts of more than 2^24 entries are counted in float32;
those of `snell`. alpha and gamma start at 1 and beta at 0, so that D starts at the order of 1 / m^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import sites, sparse, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import MOVED, TRAINED, Leaves, Method, Moment, Objective, Spec, View, about, told
from jaxpeft.methods import lora as _lora
from jaxpeft.methods import shira as _shira
from jaxpeft.methods import snell as _snell
from jaxpeft.model import Context, Model
from jaxpeft.quant import by_layer, dense, matrix
from jaxpeft.quant import merged as as_merged

BETA = 0.85  # b
KEPT = "/snella/kept"
SHAPES = ("alpha", "gamma", "beta")  # of the kernel function
FACTORS = ("p", "q")
SCORES = tuple(f"{name}_{what}" for name in FACTORS for what in ("mean", "spread"))  # I and U


class SNELLA(nn.Module):
    """The adapted product. Parameters, float32: p (2, n, r/2), q (2, m, r/2), alpha, gamma and beta (); and, moved,

    p_mean and p_spread like p, q_mean and q_spread like q, and kept () int32.
    """

    stacked = True  # only the product reads the kernel

    rank: int
    initial: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        own = {}
        for name, side in zip(FACTORS, (n, m), strict=True):
            own[name] = self.param(name, _snell.uniform, (2, side, self.rank // 2))
            self.param(f"{name}_mean", zeros, own[name].shape)
            self.param(f"{name}_spread", zeros, own[name].shape)
        own |= {name: self.param(name, zeros if name == "beta" else ones, ()) for name in SHAPES}
        kept = self.param("kept", lambda key: jnp.int32(n * m - int(self.initial * n * m)))

        def change(x, own, kept):
            d = update(own, kept).astype(x.dtype)
            return x @ d if site.through is None else site.through(x, d)

        return inner(x) + jax.checkpoint(change, prevent_cse=False)(x, own, kept)


def update(own: Mapping[str, jax.Array], kept: jax.Array) -> jax.Array:
    """D (n, m) float32 with `kept` () int32 entries."""
    k = _snell.similarities(own["p"], own["q"])
    k = k + own["alpha"] * jax.nn.softmax(k / own["gamma"], axis=1) + own["beta"]
    return _snell.sparsified(k, kept)


def snella(
    rank: int = 32,
    sparsity: float = 0.8,
    initial: float = 0.01,
    begin: int = 0,
    until: int = 1000,
    every: int = 10,
    targets: _lora.Targets = "all-linear",
) -> Method:
    """SNELLA on the sites that `targets` chooses.

    Args:
      rank: r, an even number, at most the smaller side of each kernel.
      sparsity: the share of all updates' entries that are zero from step `until` on.
      initial: the share of each update's entries that are zero up to step `begin`.
      begin: step from which on the budget falls.
      until: step at which it has fallen; it should lie before a run's end.
      every: steps from one sharing out to the next.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/snella/p` (L, 2, n, r/2), `q` (L, 2, m, r/2), `alpha`, `gamma` and `beta` (L,).

    Raises:
      InputError: for a rank that is odd, below 2 or above a kernel's smaller side; a sparsity outside [0, 1) or that
        would leave an update empty; one below `initial`; steps in the wrong order; a kernel of more than 2^31 - 1
        entries; targets that match nothing; or a chain in which p and q do not train as they are.
    """
    config = dict(locals())
    choose = _snell.chosen_sites("snella", targets, rank, sparsity)
    if not 0 <= initial <= sparsity:
        raise InputError(f"snella: initial {initial} must be at least 0 and at most sparsity, {sparsity}")
    if begin < 0:
        raise InputError(f"snella: begin {begin} must be at least 0")
    if until <= begin:
        raise InputError(f"snella: until {until} must be above begin, {begin}")
    if every < 1:
        raise InputError(f"snella: every {every} must be at least 1")
    own = {**dict.fromkeys((*FACTORS, *SHAPES), TRAINED), **dict.fromkeys((*SCORES, "kept"), MOVED)}

    def forward(model: Model, view: View) -> Model:
        chained = "+".join(spec.name for spec in view.specs)
        if blind := [spec.name for spec in view.specs if not about(spec.name).promises.backward]:
            raise InputError(f"{chained}: snella scores by gradients, and {blind[0]} has no backward pass")

        def differentiated(params):
            for path in [f"{site}/snella/{name}" for site in choose(params) for name in FACTORS]:
                if (name := view.role(path).name) != "trained":
                    raise InputError(
                        f"{chained}: snella's p and q are differentiated whole, and {path} would be {name}"
                    )
            return choose(params)

        return sites.attach(model, "snella", lambda site: SNELLA(rank, initial), differentiated)

    def gradient(objective: Objective, view: View) -> Objective:
        def value_and_grad(trainable, rest, batch, key, opt_state):
            (loss, aux), grads = objective.value_and_grad(trainable, rest, batch, key, opt_state)
            said = {}
            for path in grads:
                if path.endswith(("/snella/p", "/snella/q")):
                    old = rest[f"{path}_mean"], rest[f"{path}_spread"]
                    said[f"{path}_mean"], said[f"{path}_spread"] = sensitivity(*old, trainable[path] * grads[path])
            return (loss, {**aux, **said}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        moved = dict(leaves.moved)
        counts = {path: leaf for path, leaf in moved.items() if path.endswith(KEPT)}
        scores, sizes = {}, {}
        for path in counts:
            site = path.removesuffix(KEPT)
            for name in SCORES:
                moved[f"{site}/snella/{name}"] = told("snella", moment.aux, f"{site}/snella/{name}")
            scores[path] = sum(
                jnp.mean(moved[f"{site}/snella/{name}_mean"] * moved[f"{site}/snella/{name}_spread"], (-3, -2, -1))
                for name in FACTORS
            )
            n, m = moment.view.shapes[sites.kernel_path(moment.view.shapes, site)].shape[-2:]
            sizes[path] = n * m
        step = moment.step + 1
        share = 1 - sparsity_at(step, initial, sparsity, begin, until)
        due = (step > begin) & ((step % every == 0) & (step < until) | (step == until))
        due &= share <= _most(counts, sizes)
        for path, found in shared_out(scores, sizes, share).items():
            moved[path] = jnp.where(due, found, counts[path])
        return Leaves(leaves.trained, moved)

    return Method(
        forward=forward,
        roles=lambda others: lambda path: own[path.rsplit("/", 1)[1]] if "/snella/" in path else others(path),
        gradient=gradient,
        move=move,
        merge=fold,
        specs=(Spec("snella", config),),
    )


# The budget.


def sensitivity(mean: jax.Array, spread: jax.Array, product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """I and U with one more theta dtheta."""
    size = jnp.abs(product)
    mean = BETA * mean + (1 - BETA) * size
    return mean, BETA * spread + (1 - BETA) * jnp.abs(size - mean)


def _most(counts: Mapping[str, jax.Array], sizes: Mapping[str, int]) -> jax.Array:
    """The share () float32 of entries that kernels have, and what rounding may have taken.

    A budget beyond that is one of a run that goes on from an adapter's end, and begins anew: nothing comes back.
    """
    total = sum(sizes[path] * leaf.size for path, leaf in counts.items())
    kept = sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in counts.values()), jnp.zeros(()))
    return kept / total * (1 + 1e-5) + sum(leaf.size for leaf in counts.values()) / total


def sparsity_at(step: jax.Array, initial: float, sparsity: float, begin: int, until: int) -> jax.Array:
    """The share () float32 of zeros after so many steps."""
    return jnp.float32(sparsity) - jnp.float32(sparsity - initial) * sparse.ahead(step, begin, until)


def shared_out(scores: Mapping[str, jax.Array], sizes: Mapping[str, int], share: jax.Array) -> dict[str, jax.Array]:
    """{path: int32, entries of each kernel}, a share of all of them in proportion to scores, none beyond its size.

    Args:
      scores: {path: (L,), or ()}, at least 0.
      sizes: {path: entries of one kernel}.
      share: () float32.
    """
    flat = jnp.concatenate([scores[path].reshape(-1) for path in scores])
    size = jnp.concatenate([jnp.full(scores[path].size, sizes[path], jnp.float32) for path in scores])
    part = proportional(flat, size, share * jnp.sum(size)) / size
    found, at = {}, 0
    for path, of_path in scores.items():
        own = part[at : at + of_path.size].reshape(of_path.shape)
        at += of_path.size
        below = jnp.floor(jnp.minimum(own, 1 - 2**-24) * sizes[path]).astype(jnp.int32)
        found[path] = jnp.where(own < 1, jnp.minimum(below, sizes[path]), sizes[path])
    return found


def proportional(scores: jax.Array, sizes: jax.Array, budget: jax.Array) -> jax.Array:
    """(M,): rate times scores, at most sizes, with the rate at which they add up to the budget.

    Without any score all are alike.
    """
    total = jnp.sum(scores)
    scores = jnp.where(total > 0, scores / jnp.where(total > 0, total, 1), 1)
    full = jnp.where(scores > 0, sizes / jnp.where(scores > 0, scores, 1), jnp.inf)  # the rate at which a part is full
    order = jnp.argsort(full)
    ordered = scores[order]
    before = jnp.cumsum(sizes[order]) - sizes[order]
    left = jnp.cumsum(ordered[::-1])[::-1]
    rate = (budget - before) / jnp.where(left > 0, left, 1)  # if those before are full, and none from here on
    fits = (rate <= full[order]) & (left > 0)
    return jnp.where(jnp.any(fits), jnp.minimum(rate[jnp.argmax(fits)] * scores, sizes), sizes)


def fold(params: Mapping[str, object]) -> tree.Params:
    """W <- W + D at every adapted site, whose leaves go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/snella/" not in path}
    for path, kept in flat.items():
        if path.endswith(KEPT):
            site = path.removesuffix(KEPT)
            own, at = (
                {name: flat[f"{site}/snella/{name}"] for name in (*FACTORS, *SHAPES)},
                sites.kernel_path(flat, site),
            )
            add = lambda w, own, kept: w + update(own, kept)
            merged[at] = as_merged(merged[at], by_layer(add, dense(matrix(merged[at])), own, kept))
    return tree.unflatten(merged)


ABOUT = About(
    summary="sparse updates of high rank, which compete for one budget of entries",
    level="site",
    trains="r(n+m)+3 numbers per kernel",
    saves="gradients and optimizer state of all but r(n+m) numbers; no activations; a dense update is at work",
    reference="Shen et al. 2025, arXiv:2510.24037",
    example={"rank": 4, "sparsity": 0.5, "until": 4, "every": 2},
    steps="until",
    promises=Promises(site_bytes=_shira.saved_bytes, starts_at_base=False),
    defaults=Defaults(lr=1e-3),
)
