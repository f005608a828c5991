"""OwLore: layers with many outliers train more often, and those that train do so in a few directions of each kernel.

    outliers     D_l = share of a layer's weights with |W_ij| ||x_i|| > M mean(|W| ||x||)      x_i: input i of the site
    each period  layers a_1 ... a_gamma are drawn, one after the other, with probability ~ D_l
    in them      W (n, m) changes by s P R, its gradient is dR = P^T dW (r, m); where n > m, by s R P^T and dW P

||x_i|| is over all positions that count of some batches of the training data, the mean over all linear maps of the
layer, as in OWL. R is GaLore's trained leaf that is zero, of gamma layers (`owlore/<site>/galore/r`), P too; a kernel
has no master, and `move` adds what a step makes of R to the drawn layers of the stack. What else trains in the layers,
norms and biases, has masters as in LISA, and what lies outside the layers always trains. P is renewed in the first step
of a period and every `gap` steps, by GaLore's sketch in the step's own backward pass: it is that of the next step on.
Moments start anew with each draw. `owlore/scores` (L,) float32 is D; a run that goes on reads it from its checkpoint.

Kept for the backward pass: x at each site, and x P. Which layers train is known only when the step runs, so that in all
others, too, x is kept and dR, which is of no use there, is computed.

Paper: Li et al. 2024, "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM
Fine-tuning", arXiv:2405.18380; D: Yin et al. 2023, "OWL", arXiv:2310.05175. State 2 r max(n, m) numbers per kernel of
gamma layers. Deviations: those of GaLore and LISA here; the published code reads D from a file, and goes on from the
moments of a layer that is drawn again. Sampling is without replacement, so that D is no layer's share of the steps.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import projections, sampling, sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, MOVED, TRAINED, Leaves, Method, Moment, Objective, Spec, View, told
from jaxpeft.methods import full as _full
from jaxpeft.methods import galore as _galore
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Model
from jaxpeft.starts import probes
from jaxpeft.starts.pair import Sited
from jaxpeft.train.optimizer import decays

SCORES = ("outliers", "outliers_reverse", "norms", "uniform", "increase", "decrease")
_LEAST = 1e-6  # of the largest score: a layer without outliers is drawn when no other is left


class Squares(nn.Module):
    """The site's product. Parameter: squares (n,) float32, whose gradient is the sum of x_i^2 of a batch."""

    @nn.compact
    def __call__(self, inner, x, site, ctx):
        squares = self.param("squares", nn.initializers.zeros, (site.kernel.shape[0],))
        counts = ctx.rows.get(probes.COUNTS)
        weights = jnp.ones(x.shape[:-1]) if counts is None or counts.shape != x.shape[:-1] else counts
        y = inner(x)
        return y + _seen(squares, x, weights.astype(jnp.float32)).astype(y.dtype)


@jax.custom_vjp
def _seen(squares: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
    del squares, x, weights
    return jnp.zeros(())


def _of_batch(saved: tuple[jax.Array, jax.Array], _: jax.Array) -> tuple[jax.Array, None, None]:
    x, weights = saved
    return jnp.einsum("...,...i->i", weights, jnp.square(x.astype(jnp.float32))), None, None


_seen.defvjp(lambda squares, x, weights: (jnp.zeros(()), (x, weights)), _of_batch)


def owlore(
    count: int = 5,
    every: int = 50,
    rank: int = 256,
    gap: int = 100,
    scale: float = 1.0,
    scores: str = "outliers",
    threshold: float = 13.0,
    targets: _lora.Targets = "all-linear",
    rounding: str = "stochastic",
    which: str = "all",
) -> Method:
    """OwLore on the model itself, or on what the chain trains of it.

    Args:
      count: gamma, layers that train at a time.
      every: steps from one draw to the next.
      rank: r, at most the smaller side of each kernel.
      gap: steps after which P is renewed in layers that go on.
      scale: s.
      scores: what the draws go by: "outliers", for which `setup` has to be given batches; "outliers_reverse", likewise,
        max(D) - D, the published code's `owl_reverse`; "norms", of each layer's kernels; "uniform"; "increase" or
        "decrease" with the layer's number.
      threshold: M.
      targets: kernels that are projected: "all-linear", "attention", "mlp", a regular expression, or a list of names.
      rounding: of W in bf16: "stochastic", or "nearest".
      which: what trains where nothing else in the chain does: "all", "layers", or a regular expression found in the
        path; embeddings and head, which "all" has too, always train, with float32 masters and moments.

    Returns:
      The method; it trains `owlore/<site>/galore/r` and other leaves `owlore/<path>` of `count` layers, and what lies
      outside the layers.

    Raises:
      InputError: for an argument outside its range, more layers than the model has, a rank above a kernel's smaller
        side, targets that match nothing or nothing that trains, quantized kernels, or outliers without batches.
    """
    config = dict(locals())
    for name in ("count", "every", "gap"):
        if config[name] < 1:
            raise InputError(f"owlore: {name} {config[name]} must be at least 1")
    _lora.check_rank("owlore", rank)
    for name, value, known in (("scores", scores, SCORES), ("rounding", rounding, _galore.ROUNDINGS)):
        if value not in known:
            raise InputError(f"owlore: {name} {value!r} is not one of {', '.join(known)}")
    for name, number in (("threshold", threshold), ("scale", scale)):
        if not 0 < number < float("inf"):
            raise InputError(f"owlore: {name} {number} must be a finite number above 0")
    pattern = _full.pattern_of(which, "owlore: which")

    def draw(key, stacks, moved):
        layers, own = sampling.layers_of(stacks), moved["owlore/scores"]
        least = jnp.maximum(_LEAST * own.max(), jnp.finfo(jnp.float32).tiny)
        return {"active": sampling.weighted(key, layers, count, jnp.maximum(own, least))}

    sampler = sampling.Sampler("owlore", draw, every, own=lambda path: "/galore/" in path, what=_full.of(which))

    def roles(others):
        rest = sampler.roles(others)

        def role(path):
            if path.startswith("owlore/") and sampler.own(path):
                return TRAINED if path.endswith("/r") else MOVED
            kernel = path.endswith("/kernel") and tree.stacked(path) and others(path).name == "trained"
            return sampling.SAMPLED if kernel and sites.chooses(targets, path.removesuffix("/kernel")) else rest(path)

        return role

    def forward(model: Model, view: View) -> Model:
        def begun(flat, stacks):
            layers = sampling.layers_of(stacks)
            sampling.check_count("owlore", count, layers)
            found = _scores(scores, threshold, flat, layers, view)
            return {"owlore/scores": found, "owlore/steps": jnp.zeros((), jnp.int32)}

        # What an adapter's `init` adds is of all layers; these are of those that are drawn.
        attached = sites.attach(model, "galore", lambda site: _galore.GaLore(rank), lambda params: [])
        own = sampler._replace(leaves=begun).forward(attached._replace(init=model.init), view)

        def init(key, params):
            params = model.init(key, params)
            flat = tree.flatten(params)
            sampling.check_stacks("owlore", flat)
            chosen = [
                site
                for site in sites.find(params, targets, "owlore")
                if view.role(f"{site}/kernel") is sampling.SAMPLED
            ]
            if not chosen:
                raise InputError(
                    f"owlore: none of the kernels that targets {targets!r} names trains{_full.of(which)}; leaves of "
                    "adapters are thinner than the rank, and are not projected: sample them by lora+lisa or lora+ist"
                )
            flat = tree.flatten(own.init(key, params))
            for site in chosen:
                _lora.check_kernel("owlore", site, rank, flat[f"{site}/kernel"])
                n, m = flat[f"{site}/kernel"].shape[-2:]
                keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(site.encode())), count)
                start = nn.initializers.orthogonal()
                fresh = {
                    "p": jax.lax.map(lambda key: start(key, (min(n, m), rank)), keys),  # noqa: B023
                    "r": jnp.zeros((count, rank, m) if n <= m else (count, n, rank)),
                }
                flat |= {
                    path: leaf for name, leaf in fresh.items() if (path := f"owlore/{site}/galore/{name}") not in flat
                }
            return tree.unflatten(flat)

        return own._replace(init=init)

    def gradient(objective: Objective, view: View) -> Objective:
        del view

        def value_and_grad(trainable, rest, batch, key, opt_state):
            bases = {path: leaf for path, leaf in rest.items() if path.endswith("/galore/p")}

            def go_on():
                return (*objective.value_and_grad(trainable, rest, batch, key, opt_state), bases)

            def renew():
                return projections.sketched(objective, rank, trainable, rest, batch, key, opt_state)

            done = rest["owlore/steps"]
            (value, aux), grads, bases = jax.lax.cond((done % every == 0) | (done % gap == 0), renew, go_on)
            return (value, {**aux, **bases}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        trained, moved = dict(leaves.trained), dict(leaves.moved)
        rate = 0.0 if moment.rate is None else moment.rate
        for path in [path for path in moved if path.endswith("/galore/p")]:
            site = path.removeprefix("owlore/").removesuffix("/galore/p")
            r, kernel, fresh = (
                f"owlore/{site}/galore/r",
                f"{site}/kernel",
                told("owlore", moment.aux, f"owlore/{site}/galore/p"),
            )
            key = jax.random.fold_in(moment.key, zlib.crc32(site.encode())) if rounding == "stochastic" else None
            keeps = 1 - moment.decay * rate if moment.decay and decays(kernel, moved[kernel]) else 1.0
            places = sampling.local(kernel, moved[kernel], moved["owlore/active"])
            moved[kernel] = projections.taken_up(moved[kernel], moved[path], trained[r], scale, keeps, key, places)
            moved[path], trained[r] = fresh, jnp.zeros_like(trained[r])
        moved["owlore/steps"] = moved["owlore/steps"] + 1
        return sampler.move(Leaves(trained, moved), moment)

    return Method(
        forward=forward,
        roles=roles,
        gradient=gradient,
        update=sampler.update,
        move=move,
        merge=sampler.merge,
        specs=(Spec("owlore", config),),
        alone=lambda path: TRAINED if pattern.found(path) else FROZEN,
    )


# The scores.


def _scores(kind: str, threshold: float, flat: tree.Flat, layers: Sequence[int], view: View) -> jax.Array:
    """(L,) float32, of the layers that are sampled; ones where a run is planned, or its own are in a checkpoint."""
    count = len(layers)
    if kind in ("uniform", "increase", "decrease"):
        up = jnp.arange(1.0, count + 1)
        return {"uniform": jnp.ones(count), "increase": up, "decrease": up[::-1]}[kind]
    kernels = {site: flat[f"{site}/kernel"] for site in sites.find(tree.unflatten(flat), "all-linear", "owlore")}
    own = {site: leaf for site, leaf in kernels.items() if tree.stacked(site)}
    if kind == "norms":
        return _by_layer(_norms, {site: (leaf,) for site, leaf in own.items()}, layers)
    batches = probes.batches(f"owlore: scores '{kind}'", view)
    if not batches:
        return jnp.ones(count)
    sited = [Sited(site, 1, 1.0) for site in own]
    loss = probes.running(view.loss)
    base = {path: leaf for path, leaf in flat.items() if not path.startswith("owlore/")}
    start, of_batch = probes.gradients(view.base, tree.unflatten(base), sited, lambda site: Squares(), loss)
    total: Any = functools.reduce(
        lambda a, b: jax.tree.map(jnp.add, a, b), (of_batch(start, batch) for batch in batches)
    )
    read = {site: (leaf, jnp.sqrt(total[site]["squares"])) for site, leaf in own.items()}
    found = _by_layer(functools.partial(outliers, threshold=threshold), read, layers)
    return found if kind == "outliers" else found.max() - found


def _by_layer(
    score: Callable[[list[tuple[jax.Array, ...]]], jax.Array],
    stacks: Mapping[str, tuple[jax.Array, ...]],
    layers: Sequence[int],
) -> jax.Array:
    """score(arrays of each site of a layer) of the layers, one after the other."""
    found = {}
    for segment in {site.split("/", 1)[0] for site in stacks}:
        own = [arrays for site, arrays in stacks.items() if site.split("/", 1)[0] == segment]
        ((_, first, _),) = tree.segments({segment: {"": own[0][0]}})
        for i, value in enumerate(jax.jit(lambda own: jax.lax.map(score, own))(own)):
            found[first + i] = value
    return jnp.stack([found[layer] for layer in layers]).astype(jnp.float32)


def _norms(own: list[tuple[jax.Array, ...]]) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(kernel.astype(jnp.float32))) for (kernel,) in own))


def outliers(own: list[tuple[jax.Array, ...]], threshold: float) -> jax.Array:
    """D of a layer: the share of its weights whose |W_ij| ||x_i|| is above the threshold times their mean.

    Args:
      own: (kernel (n, m), ||x|| (n,)) of each of its linear maps.
      threshold: M.
    """
    size = sum(kernel.size for kernel, _ in own)
    metric = [jnp.abs(kernel.astype(jnp.float32)) * norm[:, None] for kernel, norm in own]
    mean = sum(jnp.sum(x) / size for x in metric)
    return sum(jnp.sum(x > threshold * mean) for x in metric) / size


def state_numbers(view: View, **_) -> int:
    """Numbers of Adam's state: two for each trained one, and the moments of the norm that each part is told of."""
    return 2 * tree.size(view.trained) + 4


ABOUT = About(
    summary="a few layers train at a time, those with outliers more often, in a few directions of each kernel",
    level="step",
    trains="of `count` layers R, r max(n,m) numbers per kernel, norms, biases; and all that lies outside of the layers",
    saves="gradients, masters and optimizer state of all layers but `count`, and of these all but 2 r max(n,m) numbers "
    "per kernel; no activations",
    chain="full+owlore",
    reference="Li et al. 2024, arXiv:2405.18380",
    example={"count": 2, "every": 4, "rank": 4, "gap": 3, "scores": "norms"},
    promises=Promises(
        site_bytes=_galore.saved_bytes,
        state=state_numbers,
        returns=lambda leaves: [path for path in leaves if path.endswith("/galore/r")],
    ),
    defaults=Defaults(lr=3e-4),
    stored="base",
)
