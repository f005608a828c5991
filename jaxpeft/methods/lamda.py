"""LaMDA: a small square matrix trains between two projections, the second of which is frozen bit by bit.

    y = x W + s (drop(x) A) (S B - S0 V)       x (..., n), W (n, m), A (n, r), V (r, m), S0 (r, r) frozen; s = alpha / r
    S = S0 + E,  B = V + D                      E (r, r) trained, D (r, m) trained at first

As code that is s (x A) (E V + (S0 + E) D): E and D start at zero, the adapted model at the base, to the bit; weight
decay pulls to the base. `init` says what A, S0 and V are:

    svd       A S0 V is the part of rank r of W = U diag(sigma) V^T with the largest singular values
    random    A uniform in +-1/sqrt(n), S0 in +-1/sqrt(r), V zero: the published code

Row i of B stands for the i-th largest singular value. After t steps the first floor(r t / freeze) rows are frozen, all
of them from step `freeze` on; then r^2 numbers per kernel train. A frozen row keeps its bits: it has no gradient, and
neither decay nor moments of before move it (`move` puts back what the step has made of it). With freeze=0, which only
"svd" knows, B = V all along, and has no optimizer's state.

Kept for the backward pass: x A, r per token and kernel, and no x; with dM = s (x A)^T dy, the gradients are
dE = dM B^T and dD = S^T dM. A and V are r (n + m) frozen numbers, in the kernel's dtype from "svd". It merges, exactly
up to rounding, and trains over packed kernels, which it only unpacks for their singular vectors.

LaMDA++ has ranks by the spectra of the kernels: `ranks(params, rank)` is a `rank_pattern` under which all keep the same
share of their energy, the sum of squared singular values, with a mean rank of at most `rank`.

Paper: Azizi et al. 2024, "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
arXiv:2406.12832. Deviations: the published code has no decomposition, and its count of frozen rows lacks the factor r,
so that it stays below four; it zeroes gradients alone, which stops neither decay nor moments. `freeze` is in steps
(published: 30 % of a run's). One compiled step serves all of a run, so what is frozen on the way keeps its optimizer's
state and dM is made in each step: the memory of the end is that of freeze=0. Layers of one stack share their rank, and
how the paper allots it is not in its code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Leaves, Method, Moment, Spec, blind, trains, unchanged
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Context
from jaxpeft.quant import dense, matrix

INITS = ("svd", "random")


class LaMDA(nn.Module):
    """The adapted product. Parameters: a (n, r), s0 (r, r) and, of "svd", v (r, m), frozen; e (r, r), d (r, m) float32.

    Without `second` there is no d.
    """

    stacked = True  # only the products read the kernel

    rank: int
    scale: float
    init_a: str = "svd"
    second: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        m, r = site.kernel.shape[1], self.rank
        if self.init_a == "svd":
            own = dict(self.param("start", lambda key: decompose(site.kernel, r)))
        else:
            own = dict(self.param("start", lambda key: drawn(key, site.kernel.shape[0], r)))
        own["e"] = self.param("e", nn.initializers.zeros, (r, r))
        if self.second:
            own["d"] = self.param("d", nn.initializers.zeros, (r, m))
        rate, seed = 0.0, None
        if self.dropout and self.has_rng("dropout"):
            rate, seed = self.dropout, jax.random.bits(self.make_rng("dropout"), (), jnp.uint32)
        return site.low_rank(inner, x, *factors(own), scale=self.scale, rate=rate, seed=seed)


def decompose(kernel: Any, rank: int) -> dict[str, jax.Array]:
    """A (n, r) and V (r, m) in the dtype of a kernel (n, m) of any type, and S0 (r, r) float32: its largest part."""
    u, sigma, v = jnp.linalg.svd(dense(kernel), full_matrices=False)
    return {
        "a": u[:, :rank].astype(kernel.dtype),
        "s0": jnp.diag(sigma[:rank]),
        "v": v[:rank].astype(kernel.dtype),
    }


def drawn(key: jax.Array, inputs: int, rank: int) -> dict[str, jax.Array]:
    """A (n, r) and S0 (r, r), float32."""
    of_a, of_s = jax.random.split(key)
    return {"a": _lora.INITS["kaiming"](of_a, (inputs, rank)), "s0": _lora.INITS["kaiming"](of_s, (rank, rank))}


def factors(own: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A (..., n, r) and S B - S0 V (..., r, m) in float32, of a, s0, e and those of v and d that there are."""
    wide = {name: leaf.astype(jnp.float32) for name, leaf in own.items() if name != "a"}
    product = lambda x, y: jnp.matmul(x, y, precision="highest")
    parts = [product(wide["e"], wide["v"])] if "v" in wide else []
    if "d" in wide:
        parts.append(product(wide["s0"] + wide["e"], wide["d"]))
    return own["a"], sum(parts[1:], parts[0])


def saved_bytes(
    inputs: int, outputs: int, itemsize: int, rank: int, rank_pattern: Mapping[str, int] | None = None, **_
) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x A, of the largest rank."""
    del inputs, outputs
    return max(rank, *(rank_pattern or {}).values(), 0) * itemsize


def lamda(
    rank: int = 32,
    alpha: float | None = None,
    targets: _lora.Targets = "all-linear",
    freeze: int = 300,
    init: str = "svd",
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
) -> Method:
    """LaMDA on the sites that `targets` chooses.

    Args:
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      freeze: steps after which all of B is frozen, one row after the other; published: 30 % of those of a run. 0: from
        the start.
      init: "svd" or "random".
      dropout: rate of dropout in front of A.
      rank_pattern: regular expression -> rank, for sites in whose path it is found (first match wins); `ranks` makes
        one.

    Returns:
      The method; it trains `<site>/lamda/e` (L, r, r) and, but for freeze=0, `<site>/lamda/d` (L, r, m).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, a freeze below 0, or of 0 with init="random", an
        unknown init, a rate outside [0, 1), or targets that match nothing.
    """
    config = dict(locals())
    _lora.check_rank("lamda", rank)
    _lora.check_alpha("lamda", alpha)
    if init not in INITS:
        raise InputError(f"lamda: init {init!r} is not one of {', '.join(INITS)}")
    if freeze < 0 or (freeze == 0 and init != "svd"):
        least = "0" if init == "svd" else f"1 with init={init!r}, where B starts at zero"
        raise InputError(f"lamda: freeze {freeze} must be at least {least}")
    if not 0 <= dropout < 1:
        raise InputError(f"lamda: dropout {dropout} must be at least 0 and below 1")

    def rank_of(site):
        return _lora.check_rank("lamda", sites.first_match(rank_pattern or {}, site, rank))

    def scale(site):
        return 1.0 if alpha is None else alpha / rank_of(site)

    def adapter(site):
        return LaMDA(rank_of(site), scale(site), init, freeze > 0, dropout)

    choose = _lora.chosen_sites("lamda", targets, rank_of, patterns={"rank_pattern": rank_pattern})
    own = ("/lamda/e", "/lamda/d")

    @blind
    def update(optimizer, view):
        return thawed(optax.with_extra_args_support(optimizer), freeze)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        """Frozen rows as they were before the step."""
        kept = {
            path: jnp.where(frozen_rows(leaf, moment.step, freeze), moment.before[path], leaf)
            for path, leaf in leaves.trained.items()
            if path.endswith(own[1])
        }
        return Leaves({**leaves.trained, **kept}, leaves.moved)

    return Method(
        forward=lambda model, view: sites.attach(model, "lamda", adapter, choose),
        roles=trains(lambda path: path.endswith(own)),
        update=update if freeze else unchanged,
        move=move if freeze else unchanged,
        merge=lambda params: _lora.fold(params, "lamda", scale, lambda leaves, n: factors(leaves)),
        specs=(Spec("lamda", config),),
    )


# Freezing.


class ThawedState(NamedTuple):
    """inner: the optimizer's state.  steps: () int32, steps done."""

    inner: Any
    steps: jax.Array


def frozen_rows(leaf: jax.Array, steps: jax.Array, freeze: int) -> jax.Array:
    """(r, 1) booleans: whether a row of D (..., r, m) is frozen by now: of the first floor(r steps / freeze).

    Row i is frozen from step ceil((i + 1) freeze / r) on.
    """
    rank = leaf.shape[-2]
    since = [min(-(-(row + 1) * freeze // rank), np.iinfo(np.int32).max) for row in range(rank)]
    return (steps >= jnp.asarray(since, jnp.int32))[:, None]


def thawed(optimizer: optax.GradientTransformationExtraArgs, freeze: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer, for which frozen rows have no gradient: clipping by the global norm does not see them."""

    def update(grads, state, params=None, **extra):
        def masked(path, gradient):
            if not path.endswith("/lamda/d"):
                return gradient
            return jnp.where(frozen_rows(gradient, state.steps, freeze), 0, gradient)

        grads = {path: masked(path, gradient) for path, gradient in grads.items()}
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        return updates, ThawedState(inner, state.steps + 1)

    def init(params):
        return ThawedState(optimizer.init(params), jnp.zeros((), jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)


# LaMDA++.


def ranks(
    params: Mapping[str, Any], rank: int, targets: _lora.Targets = "all-linear", least: int = 1, most: int | None = None
) -> dict[str, int]:
    """Ranks of sites under which all kernels keep the same share of their energy: a `rank_pattern`.

        E(r) = sum of the r largest sigma^2 / sum of all, a mean over the layers of a site
        r of a site = the least with E(r) >= tau, within [least, most]

    with the largest tau for which the ranks of all kernels, each layer's counted, are `rank` at most in their mean.

    Args:
      params: nested parameters of the base, packed ones too.
      rank: the mean rank that is not exceeded.
      targets: as of `lamda`.
      least: of the ranks.
      most: of the ranks; None: each kernel's smaller side.

    Returns:
      {regular expression of a site's path: its rank}.

    Raises:
      InputError: for ranks that do not fit one another, or targets that match nothing.
    """
    if not 1 <= least <= rank or (most is not None and most < rank):
        raise InputError(
            f"lamda: ranks from least {least} to most {most} must have rank {rank} between them, from 1 on"
        )
    flat = tree.flatten(params)
    chosen = _lora.chosen_sites("lamda", targets, lambda site: least)(dict(params))
    shares, layers = {}, {}
    for site in chosen:
        kernel = matrix(flat[sites.kernel_path(flat, site)])
        energy = np.square(np.asarray(jnp.linalg.svd(dense(kernel), compute_uv=False), np.float64))
        energy = energy.reshape(-1, energy.shape[-1])
        layers[site] = len(energy)
        shares[site] = np.mean(np.cumsum(energy, -1) / np.maximum(energy.sum(-1, keepdims=True), 1e-30), axis=0)

    def at(tau):
        needed = {site: int(np.searchsorted(share, tau)) + 1 for site, share in shares.items()}
        limit = {site: min(len(share), most or len(share)) for site, share in shares.items()}
        return {site: min(max(r, least), limit[site]) for site, r in needed.items()}

    def fits(found):
        return sum(r * layers[site] for site, r in found.items()) <= rank * sum(layers.values())

    steps = np.unique(np.concatenate([*shares.values(), [0.0]]))
    low, high = 0, len(steps) - 1  # at(steps[low]) fits: it is `least` everywhere
    while low < high:
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if fits(at(steps[middle])) else (low, middle - 1)
    return {f"^{re.escape(site)}$": r for site, r in at(steps[low]).items()}


ABOUT = About(
    summary="a square matrix trains between frozen projections, the second of them frozen bit by bit",
    level="site",
    trains="r^2 numbers per kernel, and r m more until they are frozen",
    saves="as LoRA, and the inputs that only A's gradient needs; keeps r numbers per token, and r(n+m) frozen ones",
    reference="Azizi et al. 2024, arXiv:2406.12832",
    example={"rank": 4, "freeze": 12},
    promises=Promises(site_bytes=saved_bytes),
)
