"""The form of one vector per module: IA3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxpeft.errors import InputError
from jaxpeft.peft.form.kinds import (
    ALWAYS,
    Form,
    Tensor,
)
from jaxpeft.peft.form.sites import last_names_suffice, per_site, sites_as_targets


def vectors(
    type: str,
    scope: str,
    suffix: str,
    arguments: Callable[[list[str], list[str]], dict[str, Any]],
    outputs: str = "out",
    inputs: str = "in",
    when: Mapping[str, Any] | None = ALWAYS,
) -> Form:
    """The form of one vector at a site, over its outputs or over its inputs, as PEFT's IA3 has them.

    A layer without one gets ones, which compute the same; they train, where PEFT has nothing to train.

    Args:
      type: PEFT's peft_type.
      scope: see `per_site`.
      suffix: the tensor's name at a module; (m, 1) over the outputs, (1, n) over the inputs.
      arguments: (targets of all sites, targets of those with a vector over their inputs) -> the factory's arguments.
      outputs, inputs: the leaves (m,) and (n,); a site has one of them.
      when: see `Form`.
    """

    def to_config(config, parts, base):
        del config
        feed = [name for name, part in parts.items() if inputs in part.leaves]
        last = tuple(name.rsplit(".", 1)[-1] for name in feed)
        short = last_names_suffice(parts, base) and not any(
            name.endswith(last) for name, part in parts.items() if outputs in part.leaves
        )
        names = (lambda found: sorted({name.rsplit(".", 1)[-1] for name in found})) if short else list
        return {
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "feedforward_modules": names(feed),
            "init_ia3_weights": True,
            "target_modules": names(parts),
        }

    def from_config(fields, parts, base):
        del fields
        sites = {base.modules[name].site: leaf for name, part in parts.items() for leaf in part}
        for name, part in parts.items():
            if sites[base.modules[name].site] not in part:
                raise InputError(f"{name} scales its {'inputs' if inputs in part else 'outputs'}, other layers do not")
        feed = [site for site, leaf in sites.items() if leaf == inputs]
        return arguments(sites_as_targets(sites, base), sites_as_targets(feed, base)), parts

    return per_site(
        type,
        scope,
        {outputs: Tensor(suffix, "m1"), inputs: Tensor(suffix, "1n")},
        to_config,
        from_config,
        ("target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights"),
        fill={outputs: 1.0, inputs: 1.0},
        when=when,
    )
