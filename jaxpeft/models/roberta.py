"""RoBERTa: BERT (bert.py) whose positions start behind the padding token's number, with names of its own.

Its classifier has a dense layer of its own instead of BERT's pooler, which is not loaded.

Liu et al. 2019, arXiv:1907.11692.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxpeft.model import Model
from jaxpeft.models import fields
from jaxpeft.models.bert import BertConfig, bert, shapes, trunk_names
from jaxpeft.models.names import dense, norm

__all__ = ["CLASSIFIER", "HEADS", "MODEL_TYPES", "NAMES", "OTHER_HEADS", "PREFIX", "TIED", "TIES", "from_hf", "shapes"]

MODEL_TYPES = {"roberta": "RobertaForSequenceClassification"}
HEADS = {
    "RobertaModel": "none",
    "RobertaForMaskedLM": "masked_lm",
    "RobertaForSequenceClassification": "classifier",
}
PREFIX = "roberta."
CLASSIFIER = r"classifier/.*"
OTHER_HEADS = r"lm_head\..*|roberta\.pooler\..*|classifier\..*"
TIED = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"}
TIES = True
NAMES = (
    *trunk_names(PREFIX),
    *dense("lm_head/dense", "lm_head.dense"),
    *norm("lm_head/norm", "lm_head.layer_norm"),
    ("lm_head/bias", "lm_head.bias", False),
    *dense("classifier/dense", "classifier.dense"),
    *dense("classifier/out_proj", "classifier.out_proj"),
)


def from_hf(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Model:
    """The Model of a parsed config.json; see `BertConfig.from_hf`."""
    padding = fields.token(config, "pad_token_id", 1)
    return bert(BertConfig.from_hf(config, dtype, HEADS, (1 if padding is None else padding) + 1))
