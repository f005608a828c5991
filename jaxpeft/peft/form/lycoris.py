"""The form of LoHa and LoKr: factors whose sizes follow from a rank, with an alpha, each by patterns of modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxpeft.errors import InputError
from jaxpeft.peft.form.kinds import Config, Fields, Form, Tensor
from jaxpeft.peft.form.lora import as_pattern, by_pattern
from jaxpeft.peft.form.sites import as_target_modules, commonest, last_names_suffice, per_site, sites_as_targets
from jaxpeft.targets import first_match

_FIELDS = (
    "r alpha rank_pattern alpha_pattern init_weights target_modules exclude_modules layers_to_transform layers_pattern "
    # What acts in training alone, and on convolutions alone.
    "rank_dropout rank_dropout_scale module_dropout use_effective_conv2d"
).split()


def rank_and_alpha(config: Config, site: str) -> tuple[int, float]:
    """r and alpha of a site, of a factory's `rank`, `alpha`, `rank_pattern` and `alpha_pattern`."""
    rank = first_match(config["rank_pattern"] or {}, site, config["rank"])
    default = rank if config["alpha"] is None else config["alpha"]
    return rank, first_match(config["alpha_pattern"] or {}, site, default)


def lycoris(
    type: str,
    scope: str,
    tensors: Mapping[str, Tensor],
    shapes: Callable[..., dict[str, tuple[int, ...]]],
    to_fields: Callable[[Config], dict[str, Any]] = lambda config: {},
    to_arguments: Callable[[Fields], dict[str, Any]] = lambda fields: {},
    fields: Iterable[str] = (),
) -> Form:
    """The form of factors (..., in, out) at a site, which PEFT keeps transposed.

    Args:
      type: PEFT's peft_type.
      scope: of the leaves at a site.
      tensors: leaf -> tensor; which of those in place of others a module has follows from `shapes`.
      shapes: (rank, n, m, **the arguments that `to_arguments` gives) -> {leaf: shape} of a kernel of n x m.
      to_fields: config -> fields of adapter_config.json beside ranks and alphas.
      to_arguments: of those fields the factory's arguments.
      fields: their names.
    """

    def to_config(config, parts, base):
        found = {name: rank_and_alpha(config, part.path) for name, part in parts.items()}
        ranks, alphas = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
        rank, alpha = commonest(ranks.values()), commonest(alphas.values())
        short = last_names_suffice(parts, base)
        return {
            "alpha": alpha,
            "alpha_pattern": as_pattern(alphas, alpha, short),
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "module_dropout": 0.0,
            "r": rank,
            "rank_dropout": 0.0,
            "rank_pattern": as_pattern(ranks, rank, short),
            "target_modules": as_target_modules(parts, base),
            "use_effective_conv2d": False,
            **to_fields(config),
        }

    def from_config(found, parts, base):
        own, ranks, alphas = to_arguments(found), dict[str, int](), dict[str, float]()
        for name in parts:
            site = base.modules[name].site
            rank = by_pattern(found, "rank_pattern", name, found.get("r", 8))
            alpha = float(by_pattern(found, "alpha_pattern", name, found.get("alpha", 8)))
            if (rank, alpha) != (first := (ranks.setdefault(site, rank), alphas.setdefault(site, alpha))):
                raise InputError(f"{name} has r {rank} and alpha {alpha:g}, other layers {first[0]} and {first[1]:g}")
        rank, alpha = commonest(ranks.values()), commonest(alphas.values())
        return {
            "rank": rank,
            "alpha": alpha,
            "targets": sites_as_targets(ranks, base),
            **own,
            "rank_pattern": {f"^{re.escape(site)}$": r for site, r in ranks.items() if r != rank} or None,
            "alpha_pattern": {f"^{re.escape(site)}$": x for site, x in alphas.items() if x != alpha} or None,
        }, parts

    def restore(config, parts, facts, base):
        own = {name: config[name] for name in to_arguments({})}
        for name, part in parts.items():
            site, _, n, m = base.modules[name]
            rank, _ = rank_and_alpha(config, site)
            expected = shapes(rank, n, m, **own)
            for leaf in dict.fromkeys([*expected, *part]):
                there, wanted = (x[leaf][::-1] if leaf in x else "none" for x in (_shapes(part), expected))
                if there != wanted:
                    raise InputError(
                        f"an adapter for another base or rank: {name}.{tensors[leaf].suffix} is {there}, where r "
                        f"{rank} on a kernel of {n} inputs and {m} outputs means {wanted}"
                    )
        return form.restore(config, parts, facts, base)

    form = per_site(type, scope, tensors, to_config, from_config, (*_FIELDS, *fields), check=_check)
    return form._replace(restore=restore)


def _shapes(part: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {leaf: x.shape for leaf, x in part.items()}


def _check(fields: Fields) -> None:
    """Refuses a rank of none."""
    if fields.get("r") == 0:
        raise InputError("r 0 should be at least 1")
