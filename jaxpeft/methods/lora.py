"""LoRA: a low-rank update beside each frozen kernel.

    y = x W + s (drop(x) A) B        x (..., n), W (n, m) frozen, A (n, r), B (r, m)
    s = alpha / r, with rsLoRA alpha / sqrt(r)

At a table whose rows x looks up, A's rows are looked up beside them, and nothing is dropped: W[x] + s A[x] B. At a
convolution A is the kernel of another one, and B one of size 1.

A is random and B zero, or the other way round (`init="zero_a"`), so the adapted model starts at the base. Kept for the
backward pass: x (shared by the sites that read it) and x A; dropout's mask is drawn again.

Paper: Hu et al. 2021, "LoRA", arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. LoRA+ (`lr_ratio`):
Hayou et al. 2024, arXiv:2402.12354. Starts that are calculated (`jaxpeft/starts`): PiSSA, OLoRA, LoftQ of the
kernels, EVA of the inputs and LoRA-GA of the gradients of some batches.

Deviations: masters are float32 and cast to the stream's dtype for the product (PEFT casts the input to float32 and
keeps that copy). Starts that take s A0 B0 out of W keep A0, B0 beside A, B, so that the adapter can be exported for the
*original* base as ordinary LoRA of rank 2r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxpeft import sites, starts, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, blind, layer_by_layer, trains, unchanged
from jaxpeft.model import Context
from jaxpeft.peft import form
from jaxpeft.quant import CONVOLUTION, EMBEDDING, dense, kind_of
from jaxpeft.quant import merged as as_merged

Targets = str | Sequence[str]


def _kaiming(key, shape, dtype=jnp.float32):
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _gaussian(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) / shape[1]


# How A (n, r) starts: U(-1/sqrt(n), 1/sqrt(n)); N(0, 1/r^2); orthonormal columns.
INITS: dict[str, Callable[..., jax.Array]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "orthonormal": nn.initializers.orthogonal(),
}
ZERO_A = "zero_a"  # A is zero, and B as kaiming's A


def start_of(init: str, kernel: Any) -> Callable[..., jax.Array]:
    """How A (n, r) starts beside a kernel: kaiming's bound is that of one input where a row of a table is looked up."""
    if init == ZERO_A:
        return nn.initializers.zeros
    if init == "kaiming" and kind_of(kernel) == EMBEDDING:
        return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -1, 1)
    return INITS[init]


class LoRA(nn.Module):
    """The adapted product. Parameters: a (n, r), b (r, m), float32."""

    stacked = True  # only products read the kernel

    rank: int
    scale: float
    dropout: float = 0.0
    init_a: str = "kaiming"

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        a = self.param("a", start_of(self.init_a, site.kernel), (n, self.rank))
        b = self.param("b", _kaiming if self.init_a == ZERO_A else nn.initializers.zeros, (self.rank, m))
        rate, seed = 0.0, None
        if self.dropout and self.has_rng("dropout"):
            rate, seed = self.dropout, jax.random.bits(self.make_rng("dropout"), (), jnp.uint32)
        return site.low_rank(inner, x, a, b, scale=self.scale, rate=rate, seed=seed)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Inverted dropout."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """s of the equation."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps (no dropout): x and x A.

    Sites that read the same x share it; this counts it at each.
    """
    del outputs
    return (inputs + rank) * itemsize


def check_rank(name: str, rank: int) -> int:
    """A rank as it was given, if it can be one."""
    if rank < 1:
        raise InputError(f"{name}: rank {rank} must be at least 1")
    return rank


def check_alpha(name: str, alpha: float | None, pattern: Mapping[str, float] | None = None) -> None:
    """Refuses a scale of nothing, or one that is no number."""
    for what, value in {"alpha": alpha, **{f"alpha_pattern {key!r}:": x for key, x in (pattern or {}).items()}}.items():
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name}: {what} {value} must be a finite number above 0")


def check_factor(name: str, site: str, b: jax.Array, rank: int) -> None:
    """Refuses a factor B (..., r, m) of another rank: the scale, which the rank is part of, is not that of its A B."""
    if b.shape[-2] != rank:
        raise InputError(
            f"{name}: the factors at {site} have rank {b.shape[-2]}, where the method has {rank}; merge by the method "
            "that they are of"
        )


def check_kernel(name: str, site: str, rank: int, kernel: Any) -> None:
    """Refuses a rank above the kernel's smaller side."""
    n, m = kernel.shape[-2:]
    if rank > min(n, m):
        raise InputError(f"{name}: rank {rank} is above the smaller side of {site}, a kernel of {n} x {m}")


def chosen_sites(
    name: str,
    targets: Targets,
    rank_of: Callable[[str], int],
    kinds: Collection[str] = (),
    patterns: Mapping[str, Mapping[str, Any] | None] = MappingProxyType({}),
) -> Callable[[tree.Params], list[str]]:
    """params -> the sites that targets choose, each checked against its rank; `kinds` as of `sites.find`.

    patterns: options that name sites by regular expressions, each of which should name one.
    """

    def choose(params):
        flat = tree.flatten(params)
        found = sites.find(params, targets, name, kinds)
        for site in found:
            check_kernel(name, site, rank_of(site), flat[sites.kernel_path(flat, site)])
        sites.check_patterns(name, patterns, found)
        return found

    return choose


def lora(
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    init: str = "kaiming",
    dropout: float = 0.0,
    rslora: bool = False,
    lr_ratio: float = 1.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    init_options: starts.Options | None = None,
) -> Method:
    """LoRA on the sites that `targets` chooses.

    Args:
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank (a scale of 1, or sqrt(r) with rsLoRA).
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      init: how A starts: "kaiming" (PEFT's default), "gaussian", "orthonormal"; "zero_a"; or how both start, of the
        kernels: "pissa", "olora", "loftq"; of some batches, which `setup` has to be given: "eva", "lora_ga".
      dropout: rate of dropout in front of A.
      rslora: scale by alpha / sqrt(r).
      lr_ratio: LoRA+: the learning rate of B over that of A.
      rank_pattern: regular expression -> rank, for sites in whose path it is found (first match wins).
      alpha_pattern: the same for alpha.
      init_options: of the start, by name: {"iterations": 5} of "loftq"; see the functions in `jaxpeft.starts`.

    Returns:
      The method; it trains `<site>/lora/a` (L, n, r) and `<site>/lora/b` (L, r, m).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, an alpha or lr_ratio that is not above 0, an
        unknown init or an option that it has not, a rate outside [0, 1), or targets or patterns that match nothing.
    """
    config = dict(locals())
    check_rank("lora", rank)
    check_alpha("lora", alpha, alpha_pattern)
    start = _start(config)
    if not 0 < lr_ratio < float("inf"):
        raise InputError(f"lora: lr_ratio {lr_ratio} must be a finite number above 0")
    if not 0 <= dropout < 1:
        raise InputError(f"lora: dropout {dropout} must be at least 0 and below 1")

    def rank_of(site):
        return check_rank("lora", sites.first_match(rank_pattern or {}, site, rank))

    def scale(site):
        r = rank_of(site)
        default = alpha if alpha is not None else r
        return scale_of(sites.first_match(alpha_pattern or {}, site, default), r, rslora)

    def adapter(site):
        return LoRA(rank_of(site), scale(site), dropout, init if start is None else "kaiming")

    named = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    choose = chosen_sites("lora", targets, rank_of, (EMBEDDING, CONVOLUTION) if start is None else start.kinds, named)

    def prepare(params, view):
        chosen = [starts.Sited(site, rank_of(site), scale(site)) for site in choose(params)]
        return params if start is None else starts.put("lora", start, params, chosen, view)

    @blind
    @layer_by_layer
    def update(optimizer, view):
        def of_b(leaves):
            return {path: path.endswith("/lora/b") for path in leaves}

        return optax.chain(optimizer, optax.masked(optax.scale(lr_ratio), of_b))

    return Method(
        prepare=unchanged if start is None else prepare,
        forward=lambda model, view: sites.attach(model, "lora", adapter, choose),
        roles=trains(lambda path: path.endswith(("/lora/a", "/lora/b"))),
        update=update if lr_ratio != 1 else unchanged,
        merge=lambda params: fold(params, "lora", scale, lambda leaves, n: (leaves["a"], leaves["b"]), rank_of),
        specs=(Spec("lora", config),),
    )


def fold(
    params: Mapping[str, Any],
    scope: str,
    scale: Callable[[str], float],
    factors: Callable[[Mapping[str, Any], int], tuple[jax.Array, jax.Array]],
    rank_of: Callable[[str], int] | None = None,
) -> tree.Params:
    """W <- W + s A B at every site with `scope`, whose leaves go; in float32, rounded once to W's dtype.

    A packed kernel becomes a plain array: its sum with an update would lose the update in packing.

    `factors(leaves, n)` gives A (..., n, r) and B (..., r, m) from a site's leaves.

    Raises:
      InputError: for factors of another rank than `rank_of(site)`, where that is known.
    """
    flat = tree.flatten(params)
    marker = f"/{scope}/"
    merged = {path: leaf for path, leaf in flat.items() if marker not in path}
    for site in sorted({path.split(marker)[0] for path in flat if marker in path}):
        leaves = {path.rsplit("/", 1)[1]: leaf for path, leaf in flat.items() if path.startswith(site + marker)}
        path = sites.kernel_path(merged, site)
        kernel = merged[path]
        a, b = factors(leaves, kernel.shape[-2])
        if rank_of is not None:
            check_factor(scope, site, b, rank_of(site))
        delta = scale(site) * jnp.matmul(a, b, precision="highest")
        merged[path] = as_merged(kernel, dense(kernel) + delta)
    return tree.unflatten(merged)


def _start(config: Mapping[str, Any]) -> starts.Start | None:
    """The start that the factory's arguments name, if it is one that is calculated."""
    init, options = config["init"], config.get("init_options")
    if init in starts.STARTS:
        return starts.make(init, options)
    if init not in (*INITS, ZERO_A):
        raise InputError(f"lora: init {init!r} is not one of {', '.join((*INITS, ZERO_A, *starts.STARTS))}")
    if options:
        raise InputError(f"lora: init {init!r} has no options; leave init_options {', '.join(options)} out")
    return None


def _takes_out(config: Mapping[str, Any]) -> bool:
    """Whether something is taken out of the kernels at the start."""
    start = _start(config)
    return start is not None and start.takes_out


# Hugging Face PEFT.


def _pair(config: Mapping[str, Any], leaves: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """A (..., n, r) and B (..., r, m) for the original base: [A, A0] and [B; -B0] where they have a start."""
    del config, module
    if "a0" not in leaves:
        return {"a": leaves["a"], "b": leaves["b"]}
    a = jnp.concatenate([leaves["a"], leaves["a0"]], axis=-1)
    return {"a": a, "b": jnp.concatenate([leaves["b"], -leaves["b0"]], axis=-2)}


def _leaves(config: Mapping[str, Any], pair: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a site: the inverse of `_pair`."""
    del extra
    a, b = pair["a"], pair["b"]
    if not _takes_out(config):
        return {"a": a, "b": b}
    r = a.shape[-1] // 2
    return {"a": a[..., :r], "a0": a[..., r:], "b": b[..., :r, :], "b0": -b[..., r:, :]}


def scale_at(config: Mapping[str, Any], site: str) -> float:
    """s at a site."""
    rank = sites.first_match(config["rank_pattern"] or {}, site, config["rank"])
    default = config["alpha"] if config["alpha"] is not None else rank
    return scale_of(sites.first_match(config["alpha_pattern"] or {}, site, default), rank, config["rslora"])


PEFT = form.lora_pairs(
    "lora",
    scale=scale_at,
    fields=lambda config: {"lora_dropout": config["dropout"], "use_rslora": config["rslora"]},
    to_tensors=_pair,
    from_tensors=_leaves,
)


ABOUT = About(
    summary="a trainable low-rank product beside each frozen kernel",
    level="site",
    trains="A and B, r(n+m) numbers per kernel",
    saves="gradients and optimizer state of all but r(n+m) numbers per kernel; no activations",
    reference="Hu et al. 2021, arXiv:2106.09685",
    example={"rank": 4, "alpha": 8.0},
    promises=Promises(site_bytes=saved_bytes),
    peft=PEFT,
    changes_kernels=_takes_out,
)
