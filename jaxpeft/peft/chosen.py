"""Which modules PEFT adapts by an adapter_config.json.

Source: `check_target_module_exists` of huggingface/peft 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft import patterns

_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # without a layers_pattern: the first number


def is_target(fields: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts a module of this name; "all-linear", in whose place PEFT saves names, chooses none here.

    Args:
      fields: of adapter_config.json: exclude_modules, modules_to_save, target_modules, layers_to_transform and
        layers_pattern.
      name: the module's, in the model without an adapter.

    Raises:
      InputError: for what is no regular expression.
    """
    targets, excluded = fields.get("target_modules") or (), fields.get("exclude_modules") or ()
    if _matches(excluded, name, "exclude_modules"):
        return False
    for module in fields.get("modules_to_save") or ():
        if patterns.compiled(module, "modules_to_save", r"(^|.*\.){}($|\..*)").begins(name):
            return False
    if not _matches(targets, name, "target_modules"):
        return False
    layers = fields.get("layers_to_transform")
    if isinstance(targets, str) or name in targets or layers in (None, []):
        return True
    layer = _layer(fields.get("layers_pattern"), name)
    return layer is not None and layer in (layers if isinstance(layers, list) else [layers])


def _matches(chosen: str | Sequence[str], name: str, field: str) -> bool:
    """Whether a regular expression is the whole name, or one of some names is the last parts of it."""
    if isinstance(chosen, str):
        return bool(chosen) and patterns.compiled(chosen, field).is_whole(name)
    return any(name == own or name.endswith(f".{own}") for own in chosen)


def _layer(pattern: str | Sequence[str] | None, name: str) -> int | None:
    """The layer's number in a module's name, behind the first pattern that is found; None without one."""
    given = [pattern] if isinstance(pattern, str) and pattern else pattern or ()
    tried = [patterns.compiled(own, "layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.") for own in given]
    for one in tried or [patterns.compiled(_LAYER, "layers_to_transform")]:
        if (number := one.part(name, "idx")) is not None:
            return int(number)
    return None
