"""One adapter of several, weighted: what PEFT's `add_weighted_adapter` computes, module by module.

With weights w_i, scales s_i, A_i (n, r_i), B_i (r_i, m) and D_i = s_i A_i B_i of the adapters that a module has:

    cat              A = [w_1 s_1 A_1, ..], B = [B_1; ..]: sum_i w_i D_i exactly, of rank sum_i r_i
    svd              the best rank-r approximation of sum_i w_i D_i
    linear           A = sum_i sign(w_i) c_i A_i, B = sum_i c_i B_i, c_i = sqrt(|w_i| s_i): products of different
                     adapters mix. All ranks must be the same
    magnitude_prune  as linear, of factors in which the largest numbers are kept, a share `density` of each
    ties             so pruned; a number counts where its sign is the majority's; then the mean of those that count
    dare_linear      as linear, of factors in which numbers are kept at random, and divided by the density
    dare_ties        so pruned, signs and means as ties
    <type>_svd       <type> of the D_i in place of the factors, and its best rank-r approximation

Papers: Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708; Yu et al. 2023, "Language Models are Super Mario" (DARE),
arXiv:2311.03099. Source: huggingface/peft 0.21.

Deviations: the result's scale is 1, also where the first adapter is rsLoRA's (PEFT scales it by sqrt(r) once more); the
SVD of a sum of low-rank products is that of its small core. DARE draws as torch does from a seed, module by module in
our order. Where `svd_clamp` clamps depends on the signs of singular vectors, which LAPACK's builds choose differently.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxpeft import files, tree
from jaxpeft import method as methods
from jaxpeft.errors import InputError
from jaxpeft.method import Method
from jaxpeft.model import Model
from jaxpeft.peft import twister
from jaxpeft.peft.base import config_of
from jaxpeft.peft.form import base_of
from jaxpeft.peft.form.lora import scale_of
from jaxpeft.peft.read import tensors_of
from jaxpeft.peft.schema import adapter_config
from jaxpeft.peft.several import read_pair

Combination = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]
Merge = Callable[[list[np.ndarray], Sequence[float]], np.ndarray]


class _Pair(NamedTuple):
    """A module's factors (n, r), (r, m) in float32, and their scale."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def weighted_adapter(
    folders: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    base: Model,
    params: tree.Params | None = None,
    *,
    combination_type: Combination = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
    seed: int = 0,
) -> tuple[Method, tree.Flat]:
    """One LoRA adapter of several.

    Args:
      folders: of adapters of LoRA's kind for one base; their sites and, but for linear types, ranks may differ.
      weights: of each; they may be negative.
      base: their base.
      params: its nested parameters, to recognise an adapter for another base of the same sizes.
      combination_type: see above; a single adapter is always `linear`.
      svd_rank: r of the types with an SVD; None: the largest of the adapters'.
      svd_clamp: the quantile of the numbers in A and B at which both are clamped.
      density: share of the numbers that pruning keeps, above 0 and at most 1.
      majority_sign_method: whether a majority is of numbers' sums or of their signs.
      seed: of DARE's draws.

    Returns:
      (method, leaves) as `import_adapter` gives them.

    Raises:
      InputError: for arguments out of range, an adapter that cannot be used, or ranks that differ where they may not.
    """
    _check(folders, weights, combination_type, svd_rank, svd_clamp, density, majority_sign_method)
    known, plain = base_of(config_of(base), params), methods.about("lora").peft
    adapters = [_pairs(folder, base, params, known) for folder in folders]
    kind = combination_type if len(adapters) > 1 else "linear"
    merge = _merge(kind.removesuffix("_svd"), density, majority_sign_method, twister.seeded(seed))
    rank = svd_rank or max(pair.a.shape[1] for pairs in adapters for pair in pairs.values())
    parts = {}
    for name in known.modules:
        here = [(weight, pairs[name]) for weight, pairs in zip(weights, adapters, strict=True) if name in pairs]
        if here:
            own = min(rank, *known.modules[name][2:])
            with np.errstate(over="ignore", invalid="ignore"):
                parts[name] = dict(zip("ab", _combined(name, kind, here, merge, own, svd_clamp), strict=True))
            if not all(np.isfinite(x).all() for x in parts[name].values()):
                raise InputError(f"{name}: becomes infinite or no number with weights {', '.join(map(str, weights))}")
    ranks = {name: part["a"].shape[1] for name, part in parts.items()}
    fields = {"lora_alpha": 1, "alpha_pattern": {re.escape(name): r for name, r in ranks.items()}}
    arguments, parts = plain.read(fields, parts, known)
    method = methods.make("lora", arguments)
    return method, plain.restore(method.specs[0].config, parts, {}, known)


def _check(folders, weights, kind, rank, clamp, density, sign) -> None:
    if not folders or len(weights) != len(folders):
        raise InputError(f"{len(weights)} weights for {len(folders)} adapters; give each adapter one")
    for weight in weights:
        if not math.isfinite(weight):
            raise InputError(f"the weight {weight} should be a finite number")
    for name, value, choices in (
        ("combination_type", kind, get_args(Combination)),
        ("majority_sign_method", sign, get_args(MajoritySign)),
    ):
        if value not in choices:
            raise InputError(f"{name} {value!r} is not one of {', '.join(choices)}")
    prunes = kind not in ("svd", "linear", "cat")
    if prunes != (density is not None):
        raise InputError(
            f"combination_type {kind}: " + ("needs a density" if prunes else "has no density; it keeps all")
        )
    if density is not None and not 0 < density <= 1:
        raise InputError(f"density {density} should be above 0 and at most 1")
    for name, value in (("svd_rank", rank), ("svd_clamp", clamp)):
        if value is not None and not kind.endswith("svd"):
            raise InputError(f"{name} {value}: belongs to the types with an SVD, and not to {kind}")
    if rank is not None and rank < 1:
        raise InputError(f"svd_rank {rank} should be at least 1")
    if clamp is not None and not 0 <= clamp <= 1:
        raise InputError(f"svd_clamp {clamp} should be a quantile, between 0 and 1")


def _pairs(folder: Any, base: Model, params: tree.Params | None, known: Any) -> dict[str, _Pair]:
    """An adapter's factors by module, as its file has them: for the original base, whatever method trained them."""
    read_pair(os.fspath(folder), folder, base, params)  # which checks all that is said of it
    fields, tensors = adapter_config(files.expanded(folder)), tensors_of(folder)
    parts = methods.about("lora").peft.parse(tensors, known)
    return {
        name: _Pair(part["a"], part["b"], scale_of(fields, name, part["a"].shape[1])) for name, part in parts.items()
    }


def _combined(
    name: str, kind: str, here: list[tuple[float, _Pair]], merge: Merge, rank: int, clamp: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """A (n, r) and B (r, m) of a module, of a scale of 1."""
    weights, pairs = [weight for weight, _ in here], [pair for _, pair in here]
    if kind == "cat" or (kind == "svd" and clamp is None):
        a = np.concatenate([weight * pair.scale * pair.a for weight, pair in here], axis=1)
        b = np.concatenate([pair.b for pair in pairs], axis=0)
        return (a, b) if kind == "cat" else _best(*_svd_of_product(a, b), rank)
    if kind.endswith("svd"):
        u, s, vt = _svd(merge([pair.scale * (pair.a @ pair.b) for pair in pairs], weights).T)
        return _best(vt.T, s, u.T, rank, clamp)
    if len({pair.a.shape[1] for pair in pairs}) > 1:
        ranks = " and ".join(str(pair.a.shape[1]) for pair in pairs)
        raise InputError(f"combination_type {kind}: {name} has ranks {ranks}, which must be the same; use cat or svd")
    roots = [math.sqrt(abs(weight * pair.scale)) for weight, pair in here]
    signed = [math.copysign(root, weight * pair.scale) for root, (weight, pair) in zip(roots, here, strict=True)]
    return merge([pair.a for pair in pairs], signed), merge([pair.b for pair in pairs], roots)


def _svd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u, s, vt); of what is not finite, as it is, for the caller to say."""
    if not np.isfinite(x).all():
        k = min(x.shape)
        return x[:, :k], np.full(k, np.nan, x.dtype), x[:k]
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u, s, vt


def _svd_of_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of A B, by that of the core between their orthonormal bases."""
    left, of_a = np.linalg.qr(a)
    right, of_b = np.linalg.qr(b.T)
    u, s, vt = _svd(of_a @ of_b.T)
    return left @ u, s, vt @ right.T


def _best(
    u: np.ndarray, s: np.ndarray, vt: np.ndarray, rank: int, clamp: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A, B of the first singular values; these are B's, as in PEFT."""
    a, b = u[:, :rank], s[:rank, None] * vt[:rank]
    if clamp is not None:
        most = float(np.quantile(np.concatenate([a.ravel(), b.ravel()]), clamp))
        a, b = (np.clip(x, -most, most) if most > 0 else np.full_like(x, most) for x in (a, b))
    return a, b


# What is done to the tensors of a module's adapters: (tensors, weights) -> the one that they become. Tensors are ours,
# (inputs, outputs); what is random is drawn over PEFT's, which have the axes in reverse.


def _merge(kind: str, density: float | None, sign: str, draws: np.random.RandomState) -> Merge:
    def prune(tensor: np.ndarray) -> np.ndarray:
        if density is None or density >= 1:
            return tensor
        if kind.startswith("dare"):
            kept = np.float32(density) > twister.uniform(draws, tensor.T.shape).T
            return np.where(kept, tensor / np.float32(density), np.float32(0))
        return _largest(tensor, int(density * tensor.size))

    def merge(tensors: list[np.ndarray], weights: Sequence[float]) -> np.ndarray:
        pruned = np.stack([prune(tensor) for tensor in tensors])
        weighted = pruned * np.asarray(weights, np.float32)[:, None, None]
        if not kind.endswith("ties"):
            return weighted.sum(0)
        counts = _agrees(pruned, sign)
        return (weighted * counts).sum(0) / np.maximum(counts.sum(0), 1)

    return merge


def _largest(tensor: np.ndarray, count: int) -> np.ndarray:
    """The tensor with all but its `count` largest numbers at zero."""
    order = np.argsort(-np.abs(tensor), axis=None, kind="stable")[:count]
    kept = np.zeros(tensor.size, bool)
    kept[order] = True
    return np.where(kept.reshape(tensor.shape), tensor, np.float32(0))


def _agrees(tensors: np.ndarray, method: str) -> np.ndarray:
    """Where a number's sign is the majority's at its place; a tie is positive, and zero agrees with neither."""
    signs = np.sign(tensors)
    majority = np.where((tensors if method == "total" else signs).sum(0) >= 0, 1, -1)
    return signs == majority


__all__ = ["Combination", "MajoritySign", "weighted_adapter"]
