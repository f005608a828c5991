"""The form of the LORA family: a pair of factors per module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft import patterns
from jaxpeft.errors import InputError
from jaxpeft.peft.base import Module
from jaxpeft.peft.form.kinds import (
    ALWAYS,
    Config,
    Fields,
    Fill,
    Form,
    FromTensors,
    Tensor,
)
from jaxpeft.peft.form.sites import as_target_modules, commonest, last_names_suffice, per_site, sites_as_targets

_PAIR = {"a": Tensor("lora_A.weight", "rn"), "b": Tensor("lora_B.weight", "mr")}
_LORA_FIELDS = (
    "r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora init_lora_weights bias "
    "target_modules exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config "
    "ensure_weight_tying "
    # What an initialisation was made with (init_lora_weights says which one it was, and so whether kernels changed) ...
    "eva_config corda_config loftq_config lora_ga_config "
    # ... what acts in training alone, and what acts on modules of Megatron's alone.
    "velora_config monteclora_config megatron_config"
).split()
# Initialisations that leave the base's kernels as they are.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Tensors that PEFT reads in training alone: VeLoRA's projections, MonteCLoRA's variances.
_OF_TRAINING = re.compile(r"\.lora_(velora_embed|monteclora_sampler)\b")


def lora_pairs(
    scope: str,
    scale: Callable[[Config, str], float],
    tensors: Mapping[str, Tensor] | None = None,
    fields: Callable[[Config], dict[str, Any]] = lambda config: {},
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: arguments,
    to_tensors: Callable[[Config, Mapping[str, Any], Module], Mapping[str, Any]] = lambda config, leaves, module: (
        leaves
    ),
    from_tensors: FromTensors = lambda config, leaves, extra: leaves,
    fill: Mapping[str, Fill] | None = None,
    extra: Sequence[str] = (),
    when: Mapping[str, Any] | None = ALWAYS,
) -> Form:
    """The form of x A B: leaves `a` (n, r), `b` (r, m) at a site, and perhaps more; peft_type LORA.

    Ranks and scales become PEFT's r and lora_alpha, with patterns where modules differ. In reading, layers of a site
    share one scale: the commonest, and the rest is folded into B.

    Args:
      scope: see `per_site`.
      scale: (config, site) -> the factor of A B.
      tensors: leaf -> tensor, beside a and b.
      fields: config -> fields of adapter_config.json that are not the default; "use_rslora" and "lora_dropout" if the
        method has them.
      arguments: the factory's from {rank, alpha, targets, dropout, rslora, rank_pattern, alpha_pattern}, which
        `jaxpeft.lora` takes.
      to_tensors, from_tensors, fill, extra, when: see `per_site`.
    """

    def to_config(config, parts, base):
        own = {"use_rslora": False, "use_dora": False, "lora_dropout": 0.0, **fields(config)}
        ranks = {name: part.leaves["b"].shape[0] for name, part in parts.items()}
        alphas = {
            name: _tidy(scale(config, part.path) * _divisor(ranks[name], own["use_rslora"]))
            for name, part in parts.items()
        }
        short = last_names_suffice(parts, base)
        rank, alpha = commonest(ranks.values()), commonest(alphas.values())
        return {
            "alpha_pattern": as_pattern(alphas, alpha, short),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": alpha,
            "r": rank,
            "rank_pattern": as_pattern(ranks, rank, short),
            "target_modules": as_target_modules(parts, base),
            **own,
        }

    def from_config(found, parts, base):
        rslora = bool(found.get("use_rslora"))
        members: dict[str, list[str]] = {}
        for name in parts:
            members.setdefault(base.modules[name].site, []).append(name)
        ranks, alphas, scaled = {}, {}, dict(parts)
        for site, names in members.items():
            own_ranks = {name: parts[name]["a"].shape[1] for name in names}
            own_alphas = {name: _alpha(found, name) for name in names}
            scales = {name: own_alphas[name] / _divisor(own_ranks[name], rslora) for name in names}
            ranks[site], common = max(own_ranks.values()), commonest([abs(x) for x in scales.values() if x] or [1.0])
            _, _, n, m = base.modules[names[0]]
            if ranks[site] > min(n, m):
                raise InputError(f"{names[0]} has rank {ranks[site]}, above the smaller side of its {n} x {m} kernel")
            for name, rank in own_ranks.items():
                if (said := by_pattern(found, "rank_pattern", name, found.get("r", rank))) != rank:
                    raise InputError(f"{name} has rank {said} by r and rank_pattern, and {rank} by its tensors")
            same = len({*own_ranks.values()}) == len({*own_alphas.values()}) == 1 and own_alphas[names[0]] > 0
            alphas[site] = own_alphas[names[0]] if same else common / (1 / _divisor(ranks[site], rslora))
            for name in names:
                if (ratio := scales[name] / common) != 1:  # of an alpha that is 0 or below, too
                    scaled[name] = {**parts[name], "b": parts[name]["b"] * np.float32(ratio)}
        rank, alpha = commonest(ranks.values()), commonest(alphas.values())
        made = {
            "rank": rank,
            "alpha": alpha,
            "targets": sites_as_targets(members, base),
            "dropout": float(found.get("lora_dropout") or 0.0),
            "rslora": rslora,
            "rank_pattern": {f"^{re.escape(site)}$": r for site, r in ranks.items() if r != rank} or None,
            "alpha_pattern": {f"^{re.escape(site)}$": x for site, x in alphas.items() if x != alpha} or None,
        }
        return arguments(made), scaled

    form = per_site(
        "LORA",
        scope,
        {**_PAIR, **(tensors or {})},
        to_config,
        from_config,
        _LORA_FIELDS,
        to_tensors,
        from_tensors,
        fill,
        extra,
        when,
        _check_lora,
    )
    acting = lambda found: {name: tensor for name, tensor in found.items() if not _OF_TRAINING.search(name)}
    parse = lambda found, base: form.parse(acting(found), base)
    return form._replace(parse=parse, scale=None if tensors else scale)


def _check_lora(fields: Fields) -> None:
    """Refuses what changes biases or kernels, and a rank of none."""
    if fields.get("r") == 0:
        raise InputError("r 0 should be at least 1")
    if (bias := fields.get("bias", "none")) != "none":
        raise InputError(f"bias {bias!r} is not supported; supported: 'none'")
    init = fields.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _INITS):
        raise InputError(
            f"init_lora_weights {init!r} changes the base's kernels; save the adapter for the original base "
            "with PEFT's save_pretrained(directory, path_initial_model_for_weight_conversion=...)"
        )


def scale_of(fields: Fields, name: str, rank: int) -> float:
    """The factor of a module's A B, from adapter_config.json."""
    return _alpha(fields, name) / _divisor(rank, bool(fields.get("use_rslora")))


def _divisor(rank: int, rslora: bool) -> float:
    """alpha over the scale."""
    return math.sqrt(rank) if rslora else rank


def _alpha(fields: Fields, name: str) -> float:
    """lora_alpha of a module."""
    return float(by_pattern(fields, "alpha_pattern", name, fields.get("lora_alpha", 8)))


def by_pattern(fields: Fields, field: str, name: str, default: Any) -> Any:
    """The value of the first pattern in a field which PEFT finds at the end of a module's name, else the default."""
    for pattern, value in (fields.get(field) or {}).items():
        if patterns.compiled(pattern, field, r"(.*\.)?({})$").begins(name):
            return value
    return default


def as_pattern(values: Mapping[str, Any], default: Any, short: bool) -> dict[str, Any]:
    """PEFT's patterns (regular expressions for the end of a module's name), for modules that differ from the default.

    A leaf name whose modules all agree stands for them.
    """
    by_leaf: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rsplit(".", 1)[-1], {})[name] = value
    pattern = {}
    for leaf, own in by_leaf.items():
        if short and len(set(own.values())) == 1:
            own = {leaf: next(iter(own.values()))}
        pattern.update({name: value for name, value in own.items() if value != default})
    return pattern


def _tidy(alpha: float) -> float | int:
    """Without what s * r has lost in the last digits, and whole numbers as PEFT writes them."""
    rounded = float(f"{alpha:.12g}")
    return int(rounded) if rounded.is_integer() else rounded
