"""Model families by Hugging Face `model_type`.

A family file has

    MODEL_TYPES     config.json's model_type -> the architecture that classifies rows
    from_hf         (config.json, dtype) -> Model, whose `config` is the family's own; of its fields this library reads
                    model_type, vocab_size, max_position_embeddings, num_labels, and head: "causal_lm", "masked_lm",
                    "classifier", or "none": a trunk whose output is the stream
    <file's name>   that configuration -> Model: bert.bert, decoder.decoder
    shapes          that configuration -> {path: ShapeDtypeStruct}
    NAMES           our path -> Hugging Face's name, and whether the matrix is transposed there
    PREFIX          what Hugging Face's names of the trunk's tensors begin with where there is a head
    CLASSIFIER      regular expression: paths of a classifier's parameters, new where the checkpoint has none
    OTHER_HEADS     regular expression: names of tensors of heads that a checkpoint may have and the model does not
    TIED            names of tensors that a checkpoint may have, though they are others' -> those others
    TIES            whether that is so where config.json has no tie_word_embeddings
    file_shapes     (where they differ from ours:) the configuration -> {Hugging Face's name: shape there}
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax

from jaxpeft.errors import InputError
from jaxpeft.model import Model
from jaxpeft.models import bert, decoder, fields, opt, quantized, roberta, rotary, vit
from jaxpeft.models.labels import with_labels

FAMILIES: dict[str, ModuleType] = {
    kind: file for file in (decoder, bert, roberta, opt, vit) for kind in file.MODEL_TYPES
}


def family(config: Mapping[str, Any]) -> ModuleType:
    """The family file for a parsed config.json.

    Raises:
      InputError: for a `model_type` that no family knows, or weights that are quantized as nothing here reads them.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"config.json: unsupported model_type {kind!r}; supported: {', '.join(sorted(FAMILIES))}")
    quantized.scheme_of(config)
    return FAMILIES[kind]


def model_of(config: Any) -> Model:
    """The Model of a family's configuration; nothing is allocated."""
    file = sys.modules[type(config).__module__]  # RoBERTa's is BERT's
    build: Callable[[Any], Model] = getattr(file, file.__name__.rpartition(".")[2])
    return build(config)


def for_classification(config: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A parsed config.json with a classifier of rows in place of the model's head.

    Args:
      config: of any family.
      labels: names in the order of their numbers; a single one is a regression.
    """
    return with_labels(config, family(config).MODEL_TYPES[config["model_type"]], labels)


def compute_dtype(config: Mapping[str, Any], given: str | None = None, platform: str | None = None) -> str:
    """What a model's frozen weights and its computation are in: the one place where that is decided.

    On a CPU float32, in which it computes faster than in bfloat16; elsewhere what the checkpoint is in, bfloat16 where
    that is neither bfloat16 nor float32.

    Args:
      config: a parsed config.json.
      given: by the user, who is right; None: nothing.
      platform: that it runs on: "cpu", another; None: JAX's own.

    Raises:
      InputError: for a config.json whose dtype is no text.
    """
    named = fields.dtype(config)
    if given is not None:
        return given
    if (platform or jax.default_backend()) == "cpu":
        return "float32"
    return "float32" if named == "float32" else "bfloat16"


def for_longer(config: Mapping[str, Any], rope_scaling: str | None) -> Mapping[str, Any]:
    """A parsed config.json whose rotary positions are scaled to longer texts.

    Args:
      config: of any family.
      rope_scaling: KIND=FACTOR (see `rotary.parse`); None: as it is.

    Raises:
      InputError: if its positions are not rotary, or scaled already.
    """
    if rope_scaling is None:
        return config
    if family(config) is not decoder:
        raise InputError(
            f"--rope-scaling {rope_scaling}: {config['model_type']} has learned positions, not rotary ones"
        )
    return rotary.extended(config, rope_scaling)


def hf_name(config: Any, path: str) -> tuple[str, bool]:
    """Hugging Face's name of the parameter at `path`, with {i} for the layer, and whether it is transposed there.

    Args:
      config: the family's configuration.
      path: of a parameter.

    Raises:
      ValueError: if the family's NAMES has none.
    """
    own = FAMILIES[config.model_type]
    for pattern, name, transposed in own.NAMES:
        if found := re.fullmatch(pattern, path):
            name = found.expand(name)
            return name.removeprefix(own.PREFIX) if config.head == "none" else name, transposed
    raise ValueError(f"{path} has no name in a Hugging Face checkpoint; adapters are merged or exported first")
