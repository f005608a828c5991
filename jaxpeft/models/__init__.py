"""Model families by Hugging Face `model_type`.

A family file has

    MODEL_TYPES     config.json's model_type -> the architecture that classifies rows
    from_hf         (config.json, dtype) -> Model, whose `config` is the family's own
    shapes          that configuration -> {path: ShapeDtypeStruct}
    NAMES           our path -> Hugging Face's name, and whether the matrix is transposed there
    CLASSIFIER      regular expression: paths of a classifier's parameters, new where the checkpoint has none
    OTHER_HEADS     regular expression: names of tensors of heads that a checkpoint may have and the model does not
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from jaxpeft.errors import InputError
from jaxpeft.models import decoder
from jaxpeft.models.labels import with_labels

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


def for_classification(config: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A parsed config.json with a classifier of rows in place of the model's head.

    Args:
      config: of any family.
      labels: names in the order of their numbers; a single one is a regression.
    """
    return with_labels(config, family(config).MODEL_TYPES[config["model_type"]], labels)


def hf_name(family: ModuleType, path: str) -> tuple[str, bool]:
    """Hugging Face's name of the parameter at `path`, with {i} for the layer, and whether it is transposed there.

    Raises:
      ValueError: if the family's NAMES has none.
    """
    for pattern, name, transposed in family.NAMES:
        if found := re.fullmatch(pattern, path):
            return found.expand(name), transposed
    raise ValueError(f"{path} has no name in a Hugging Face checkpoint; adapters are merged or exported first")
