"""Model families by Hugging Face `model_type`.

A family file has: MODEL_TYPES, a frozen configuration, `from_hf` (config.json -> Model), the NAMES table, and `shapes`
(the parameters of a configuration).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxpeft.errors import InputError
from jaxpeft.models import decoder

FAMILIES: dict[str, ModuleType] = dict.fromkeys(decoder.MODEL_TYPES, decoder)


def family(config: Mapping[str, Any]) -> ModuleType:
    """The family file for a parsed config.json.

    Raises:
      InputError: for a `model_type` that no family knows.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"config.json: unsupported model_type {kind!r}; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def hf_name(family: ModuleType, path: str) -> tuple[str, bool]:
    """Hugging Face's name of the parameter at `path`, with {i} for the layer, and whether it is transposed there.

    Raises:
      ValueError: if the family's NAMES has none.
    """
    for pattern, name, transposed in family.NAMES:
        if found := re.fullmatch(pattern, path):
            return found.expand(name), transposed
    raise ValueError(f"{path} has no name in a Hugging Face checkpoint; adapters are merged or exported first")
