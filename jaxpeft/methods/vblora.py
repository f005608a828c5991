"""VB-LoRA: LoRA whose factors are put together of vectors of one bank that all sites share.

    y = x W + (drop(x) A) B                  x (..., n), W (n, m) frozen, A (n, r), B (r, m)
    A[(i, :), p] = sum over top k of softmax_k(P[p, i])_v E[v]        P (r, n/b, h) trained
    B[p, (j, :)] = sum over top k of softmax_k(Q[j, p])_v E[v]        Q (m/b, r, h) trained

E (h, b) is the bank, trained and stored once: h vectors of length b, which divides the sides of every adapted kernel.
A column of A is n/b of them one below the other, a row of B m/b beside one another, each a mixture of the k vectors
with the largest logits; softmax_k is that of these k. The other logits, and the other vectors there, have no gradient.

E is uniform in +-0.02, the logits are normal with a standard deviation of 0.1. The product A B is small at the start,
but not zero. Kept for the backward pass are x and x A, as in LoRA; A and B are made of the logits in each pass, and
have LoRA's size. It merges, exactly up to rounding. What is stored of a trained adapter may be the bank and k indices
and k - 1 weights in place of h logits (`only_topk`).

Paper: Li et al. 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv:2405.15179; PEFT has
the same start and shapes. As in the paper the logits have ten times the bank's learning rate (`lr_ratio`).

Deviation: an adapter of PEFT's that holds the top k alone comes with logits of -10^4, not minus infinity, for all other
vectors, which are never chosen again: it can go on training, with the vectors that it has.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, blind, layer_by_layer, trains, unchanged
from jaxpeft.methods.lora import Targets, check_rank, chosen_sites, saved_bytes
from jaxpeft.methods.lora import fold as fold_product
from jaxpeft.model import Context
from jaxpeft.peft import form
from jaxpeft.widths import dividing


class VBLoRA(nn.Module):
    """The adapted product. Parameters: logits_a (r, n/b, h) and logits_b (m/b, r, h), float32; E is the context's."""

    stacked = True  # only products read the kernel

    rank: int
    vectors: int
    length: int
    topk: int
    std: float = 0.1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = (side // self.length for side in site.kernel.shape)
        normal = nn.initializers.normal(self.std)
        logits_a = self.param("logits_a", normal, (self.rank, n, self.vectors))
        logits_b = self.param("logits_b", normal, (m, self.rank, self.vectors))
        if (shared := sites.beside(self, ctx, "vblora", "vectors")) is None:
            return inner(x)
        rate, seed = 0.0, None
        if self.dropout and self.has_rng("dropout"):
            rate, seed = self.dropout, jax.random.bits(self.make_rng("dropout"), (), jnp.uint32)
        a, b = factors(shared["bank"], logits_a, logits_b, self.topk)
        return site.low_rank(inner, x, a, b, scale=1.0, rate=rate, seed=seed)


def factors(bank: jax.Array, logits_a: jax.Array, logits_b: jax.Array, topk: int) -> tuple[jax.Array, jax.Array]:
    """A (..., n, r) and B (..., r, m) of the bank (h, b), logits_a (..., r, n/b, h) and logits_b (..., m/b, r, h)."""
    a, b = mixed(bank, logits_a, topk), jnp.swapaxes(mixed(bank, logits_b, topk), -2, -3)
    in_line = lambda x: x.reshape(*x.shape[:-2], -1)
    return in_line(a).mT, in_line(b)


def mixed(bank: jax.Array, logits: jax.Array, topk: int) -> jax.Array:
    """Mixtures (..., b) of the bank's vectors (h, b) with the k largest of the logits (..., h)."""
    largest, chosen = jax.lax.top_k(logits, topk)
    return jnp.sum(jax.nn.softmax(largest)[..., None] * bank[chosen], axis=-2)


def vblora(
    rank: int = 4,
    vectors: int = 256,
    length: int = 256,
    topk: int = 2,
    targets: Targets = "all-linear",
    dropout: float = 0.0,
    bound: float = 0.02,
    std: float = 0.1,
    lr_ratio: float = 10.0,
    only_topk: bool = False,
) -> Method:
    """VB-LoRA on the sites that `targets` chooses.

    Args:
      rank: r, at most the smaller side of each kernel.
      vectors: h, the bank's size.
      length: b, of each vector; it divides both sides of every kernel.
      topk: k, at most h.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      dropout: rate of dropout in front of A.
      bound: the bank starts uniform in +-bound.
      std: standard deviation of the logits at the start.
      lr_ratio: the learning rate of the logits over that of the bank.
      only_topk: an exported adapter holds of the logits what the top k give; it computes the same.

    Returns:
      The method; it trains `<site>/vblora/logits_a` (L, r, n/b, h), `<site>/vblora/logits_b` (L, m/b, r, h) and
      `vblora/bank` (h, b).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, a length that does not divide its sides, a topk
        that is not in 1 to h, a bound, std or lr_ratio that is not above 0, a rate outside [0, 1), or targets that
        match nothing.
    """
    config = dict(locals())
    check_rank("vblora", rank)
    if length < 1:
        raise InputError(f"vblora: length {length} must be at least 1")
    if not 1 <= topk <= vectors:
        raise InputError(f"vblora: topk {topk} must be at least 1 and at most the bank's {vectors} vectors")
    for name, value in (("bound", bound), ("std", std), ("lr_ratio", lr_ratio)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"vblora: {name} {value} must be a finite number above 0")
    if not 0 <= dropout < 1:
        raise InputError(f"vblora: dropout {dropout} must be at least 0 and below 1")
    choose_by_rank = chosen_sites("vblora", targets, lambda site: rank)

    def choose(params):
        flat, found = tree.flatten(params), choose_by_rank(params)
        check_length(length, {site: flat[sites.kernel_path(flat, site)].shape[-2:] for site in found})
        return found

    def forward(model, view):
        module = VBLoRA(rank, vectors, length, topk, std, dropout)
        adapted = sites.attach(model, "vblora", lambda site: module, choose, shared=True)

        def init(key, params):
            flat = tree.flatten(adapted.init(key, params))
            if "vblora/bank" not in flat:
                key = jax.random.fold_in(key, zlib.crc32(b"vblora"))
                flat["vblora/bank"] = jax.random.uniform(key, (vectors, length), jnp.float32, -bound, bound)
            return tree.unflatten(flat)

        return adapted._replace(init=init)

    @blind
    @layer_by_layer
    def update(optimizer, view):
        def of_logits(leaves):
            return {path: path.endswith(LOGITS) for path in leaves}

        return optax.chain(optimizer, optax.masked(optax.scale(lr_ratio), of_logits))

    return Method(
        forward=forward,
        roles=trains(lambda path: path.endswith(LOGITS) or path == "vblora/bank"),
        update=update if lr_ratio != 1 else unchanged,
        merge=lambda params: fold(params, topk),
        specs=(Spec("vblora", config),),
    )


LOGITS = ("/vblora/logits_a", "/vblora/logits_b")


def check_length(length: int, kernels: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses vectors that do not divide both sides of every kernel."""
    for site, (n, m) in kernels.items():
        if n % length or m % length:
            instead = dividing(side for sides in kernels.values() for side in sides)
            raise InputError(
                f"vblora: length {length} does not divide the sides of {site}, a kernel of {n} x {m}; {instead}"
            )


def fold(params: Mapping[str, Any], topk: int) -> tree.Params:
    """W <- W + A B at every adapted site; all the method's leaves go; rounded once to W's dtype."""
    flat = tree.flatten(params)
    bank = flat.pop("vblora/bank", None)

    def of_site(leaves, inputs):
        return factors(bank, leaves["logits_a"], leaves["logits_b"], topk)

    return fold_product(tree.unflatten(flat), "vblora", lambda site: 1.0, of_site)


# Hugging Face PEFT, whose logits have our shapes.

_FIELDS = (
    "r num_vectors vector_length topk vblora_dropout save_only_topk_weights init_vector_bank_bound init_logits_std "
    "bias fan_in_fan_out target_modules exclude_modules layers_to_transform layers_pattern"
).split()
_BANK = "base_model.vblora_vector_bank"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_BESIDE = ""  # of the parts, where the bank is
_NEVER = -1e4  # below the logarithm of any weight


def _to_config(config: Mapping[str, Any], parts: Mapping[str, form.Part], base: form.Base) -> dict[str, Any]:
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_logits_std": config["std"],
        "init_vector_bank_bound": config["bound"],
        "layers_pattern": None,
        "layers_to_transform": None,
        "num_vectors": config["vectors"],
        "r": config["rank"],
        "save_only_topk_weights": config["only_topk"],
        "target_modules": form.as_target_modules(parts, base),
        "topk": config["topk"],
        "vblora_dropout": config["dropout"],
        "vector_length": config["length"],
    }


def _write(config: Mapping[str, Any], leaves: tree.Flat, base: form.Base) -> form.Written:
    """The logits of all sites, or their top k, and the bank."""
    rest = {path: leaf for path, leaf in leaves.items() if path != "vblora/bank"}
    written = _FORM.write(config, rest, base)
    tensors = written.tensors
    if config["only_topk"]:
        tensors = {k: x for name, leaf in tensors.items() for k, x in _top(name, leaf, config["topk"]).items()}
    return written._replace(tensors={**tensors, _BANK: np.asarray(leaves["vblora/bank"], np.float32)})


def _top(name: str, logits: np.ndarray, topk: int) -> dict[str, np.ndarray]:
    """Indices of the k largest in the smallest type of integers, and all of their weights but the last."""
    largest, chosen = (np.asarray(x) for x in jax.lax.top_k(jnp.asarray(logits), topk))
    weights = np.asarray(jax.nn.softmax(jnp.asarray(largest)))[..., :-1]
    kind = next(kind for kind in (np.uint8, np.int16, np.int32) if logits.shape[-1] <= np.iinfo(kind).max)
    return {name + _INDICES: chosen.astype(kind), name + _WEIGHTS: np.ascontiguousarray(weights)}


def _parse(tensors: Mapping[str, np.ndarray], base: form.Base) -> dict[str, Any]:
    """The parts, of one rank, in every layer, in the shapes that the bank asks for, and beside them the bank."""
    found = [key for key in tensors if key.removeprefix("base_model.").split(".")[0] == "vblora_vector_bank"]
    if len(found) != 1:
        raise InputError(f"has {len(found)} tensors {_BANK}; expected one")
    bank = np.asarray(tensors[found[0]], np.float32)
    if bank.ndim != 2:
        raise InputError(f"{found[0]} has shape {bank.shape}; expected vectors, each of one length")
    parts = _FORM.parse(_whole({key: x for key, x in tensors.items() if key != found[0]}, len(bank)), base)
    first = next(iter(parts))
    rank = parts[first]["logits_a"].shape[-1]
    for name, part in parts.items():
        site, _, n, m = base.modules[name]
        b = bank.shape[1]
        for leaf, wanted in (("logits_a", (rank, n // b, len(bank))), ("logits_b", (m // b, rank, len(bank)))):
            if n % b or m % b or part[leaf].shape[::-1] != wanted:
                raise InputError(
                    f"an adapter for another base: {name}.vblora_{leaf[:-1]}{leaf[-1].upper()} has shape "
                    f"{part[leaf].shape[::-1]}; a {n} x {m} kernel, the rank {rank} of {first} and a bank of "
                    f"{bank.shape[0]} x {b} need {wanted}"
                )
        if lacking := [other for other, module in base.modules.items() if module.site == site and other not in parts]:
            raise InputError(f"{lacking[0]} has no adapter, and {name} has one; of a stack's layers all must have it")
    return {**parts, _BESIDE: bank}


def _whole(tensors: Mapping[str, np.ndarray], vectors: int) -> dict[str, np.ndarray]:
    """Tensors with logits in place of indices and weights of the top k.

    Raises:
      InputError: for one without the other, or of another shape, or an index that no vector has.
    """
    whole = {key: x for key, x in tensors.items() if not key.endswith((_INDICES, _WEIGHTS))}
    for name in dict.fromkeys(key.removesuffix(_INDICES).removesuffix(_WEIGHTS) for key in tensors if key not in whole):
        chosen, weights = (tensors.get(name + end) for end in (_INDICES, _WEIGHTS))
        if chosen is None or weights is None or (*weights.shape[:-1], weights.shape[-1] + 1) != chosen.shape:
            raise InputError(f"{name} has no {_INDICES[1:]} and {_WEIGHTS[1:]} that are one fewer")
        chosen = chosen.astype(np.int64)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < vectors:
            raise InputError(f"{name}{_INDICES} holds {chosen.max()}; the bank has {vectors} vectors")
        last = 1 - weights.sum(-1, keepdims=True, dtype=np.float32)
        weights = np.concatenate([weights, last], -1).clip(np.finfo(np.float32).tiny)
        whole[name] = np.full((*chosen.shape[:-1], vectors), _NEVER, np.float32)
        np.put_along_axis(whole[name], chosen, np.log(weights).astype(np.float32), -1)
    return whole


def _read(fields: Mapping[str, Any], parts: dict[str, Any], base: form.Base) -> tuple[dict[str, Any], Any]:
    own = [name for name in parts if name != _BESIDE]
    (vectors, length), rank = parts[_BESIDE].shape, parts[own[0]]["logits_a"].shape[-1]
    for field, size in (("r", rank), ("num_vectors", vectors), ("vector_length", length)):
        if (said := fields.get(field, size)) != size:
            raise InputError(f"{field} {said} should be {size}, as the tensors have it")
    topk = int(fields.get("topk") or 2)
    if topk > vectors:
        raise InputError(f"topk {topk} should be at most {vectors}, the vectors of the bank")
    return {
        "rank": rank,
        "vectors": vectors,
        "length": length,
        "topk": topk,
        "targets": form.sites_as_targets({base.modules[name].site for name in own}, base),
        "dropout": float(fields.get("vblora_dropout") or 0.0),
        "bound": float(fields.get("init_vector_bank_bound") or 0.02),
        "std": float(fields.get("init_logits_std") or 0.1),
        "only_topk": bool(fields.get("save_only_topk_weights")),
    }, parts


def _restore(config: Mapping[str, Any], parts: dict[str, Any], facts: Mapping[str, Any], base: form.Base) -> tree.Flat:
    own = {name: part for name, part in parts.items() if name != _BESIDE}
    return {**_FORM.restore(config, own, facts, base), "vblora/bank": jnp.asarray(parts[_BESIDE])}


def _check(fields: Mapping[str, Any]) -> None:
    """Refuses what trains more than the logits and the bank."""
    if (bias := fields.get("bias", "none")) != "none":
        raise InputError(f"bias {bias!r} is not supported; supported: 'none'")


def _reversed(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves (..., x, y, z) as (..., z, y, x)."""
    return {name: jnp.swapaxes(leaf, -1, -3) for name, leaf in leaves.items()}


_FORM = form.per_site(
    "VBLORA",
    "vblora",
    {"logits_a": form.Tensor("vblora_logits_A", "pih"), "logits_b": form.Tensor("vblora_logits_B", "jph")},
    _to_config,
    _read,
    _FIELDS,
    to_tensors=lambda config, leaves, module: _reversed(leaves),
    from_tensors=lambda config, leaves, extra: _reversed(leaves),
    check=_check,
)
PEFT = _FORM._replace(write=_write, parse=_parse, restore=_restore, integers=(_INDICES,))


ABOUT = About(
    summary="LoRA's factors, mixed of vectors of a bank that all kernels share",
    level="site",
    trains="the bank, and logits over it: h r (n + m) / b numbers per kernel",
    saves="as LoRA does in memory; an adapter of the top k alone is a small fraction of LoRA's on a disk",
    reference="Li et al. 2024, arXiv:2405.15179",
    example={"rank": 2, "vectors": 12, "length": 8},
    promises=Promises(site_bytes=saved_bytes, starts_at_base=False),
    defaults=Defaults(lr=1e-3),
    peft=PEFT,
)
