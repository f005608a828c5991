"""Classification of rows, as a checkpoint's config.json declares it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.models import fields

_CLASSIFY = ("ForSequenceClassification", "ForImageClassification")
SCOPE = "classifier/"  # every family's parameters of a classifier lie here


def num_labels(config: Mapping[str, Any]) -> int:
    """How many labels a parsed config.json's architecture tells apart; 0 for one that classifies no rows.

    Raises:
      InputError: if it names none, or not a whole number of them.
    """
    if not any(name.endswith(_CLASSIFY) for name in fields.names(config, "architectures")):
        return 0
    return len(fields.mapping(config, "id2label")) or fields.count(config, "num_labels", 2)


def names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a parsed config.json, in the order of their numbers; () where it classifies no rows.

    One that does not name them has LABEL_0, LABEL_1, ..., as transformers calls them.
    """
    given = fields.mapping(config, "id2label")
    return tuple(str(given.get(str(i), f"LABEL_{i}")) for i in range(num_labels(config)))


def with_labels(config: Mapping[str, Any], architecture: str, labels: Sequence[str]) -> dict[str, Any]:
    """The config.json of the same model with a classifier in place of its head.

    Args:
      config: parsed.
      architecture: such as BertForSequenceClassification.
      labels: names in the order of their numbers; a single one is a regression.
    """
    named = {str(i): label for i, label in enumerate(labels)}
    own = {"architectures": [architecture], "id2label": named, "label2id": {x: int(i) for i, x in named.items()}}
    kind = "regression" if len(labels) == 1 else "single_label_classification"
    return {**config, **own, "problem_type": kind}
