"""BERT: an encoder with norms after its residual connections.

    x = norm(E[tokens] + P[positions] + T[token types])
    block: x = norm(x + attention(x)); x = norm(x + mlp(x))         every token sees its whole segment

The head is what config.json's architecture says: BertModel has none (the model's output is the stream), BertForMaskedLM
has logits over the vocabulary, tied to E, and BertForSequenceClassification a classifier of rows that reads the first
token: dense, tanh (BERT's pooler), out_proj. The pooler is part of the classifier: without one it is not loaded.

Devlin et al. 2018, arXiv:1810.04805. RoBERTa (roberta.py) differs in where positions start and in names. Dropout rates
in the configuration are not read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Context, Model
from jaxpeft.models import fields
from jaxpeft.models.assembly import TEXT, assemble
from jaxpeft.models.labels import num_labels
from jaxpeft.models.layers import ACTIVATIONS, MLP, Attention, Dense, Embed, LayerNorm, unembed
from jaxpeft.models.names import Names, dense, norm, table

MODEL_TYPES = {"bert": "BertForSequenceClassification"}
HEADS = {
    "BertModel": "none",
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "masked_lm",
    "BertForSequenceClassification": "classifier",
}
PREFIX = "bert."
CLASSIFIER = r"classifier/.*"
OTHER_HEADS = r"cls\..*|bert\.pooler\..*|classifier\..*"
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
TIES = True


def trunk_names(prefix: str) -> Names:
    """What BERT and RoBERTa call alike, below their prefixes."""
    layer = f"{prefix}encoder.layer.{{i}}"
    return (
        *table("embed_tokens", f"{prefix}embeddings.word_embeddings"),
        *table("embed_positions", f"{prefix}embeddings.position_embeddings"),
        *table("embed_token_types", f"{prefix}embeddings.token_type_embeddings"),
        *norm("embed_norm", f"{prefix}embeddings.LayerNorm"),
        *dense("layers/self_attn/q_proj", f"{layer}.attention.self.query"),
        *dense("layers/self_attn/k_proj", f"{layer}.attention.self.key"),
        *dense("layers/self_attn/v_proj", f"{layer}.attention.self.value"),
        *dense("layers/self_attn/o_proj", f"{layer}.attention.output.dense"),
        *norm("layers/attention_norm", f"{layer}.attention.output.LayerNorm"),
        *dense("layers/mlp/up_proj", f"{layer}.intermediate.dense"),
        *dense("layers/mlp/down_proj", f"{layer}.output.dense"),
        *norm("layers/output_norm", f"{layer}.output.LayerNorm"),
    )


NAMES = (
    *trunk_names(PREFIX),
    *dense("lm_head/dense", "cls.predictions.transform.dense"),
    *norm("lm_head/norm", "cls.predictions.transform.LayerNorm"),
    ("lm_head/bias", "cls.predictions.bias", False),
    *dense("classifier/dense", "bert.pooler.dense"),
    *dense("classifier/out_proj", "classifier"),
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The numbers of a config.json, under Hugging Face's names where they mean the same."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int  # tokens that a row has room for
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    head: str  # a value of HEADS
    position_offset: int = 0  # rows of the position table before that of the first token
    num_labels: int = 0  # of the classifier; 1: a regression
    dtype: Any = jnp.float32  # of the stream; parameters are created in it too

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        dtype: Any = jnp.float32,
        heads: Mapping[str, str] = HEADS,
        position_offset: int = 0,
    ) -> BertConfig:
        """From a parsed config.json.

        Raises:
          InputError: for a missing field, one of the wrong type, or a feature that is not supported.
        """
        fields.one_of(config, "position_embedding_type", ("absolute", None), "absolute")
        fields.one_of(config, "is_decoder", (False,), False)
        head = fields.head_of(config, heads)
        if head == "masked_lm":
            fields.one_of(config, "tie_word_embeddings", (True,), True)
        num_heads, head_dim = fields.heads_of(config)
        room = fields.count(config, "max_position_embeddings", 512)
        if room <= position_offset:
            raise InputError(
                f"config.json: max_position_embeddings {room} leaves no room behind the first {position_offset}"
            )
        return cls(
            model_type=config["model_type"],
            vocab_size=fields.count(config, "vocab_size"),
            hidden_size=fields.count(config, "hidden_size"),
            intermediate_size=fields.count(config, "intermediate_size"),
            num_hidden_layers=fields.count(config, "num_hidden_layers"),
            num_attention_heads=num_heads,
            head_dim=head_dim,
            max_position_embeddings=room - position_offset,
            type_vocab_size=fields.count(config, "type_vocab_size", 2),
            layer_norm_eps=fields.number(config, "layer_norm_eps", 1e-12),
            hidden_act=fields.one_of(config, "hidden_act", ACTIVATIONS, "gelu"),
            head=head,
            position_offset=position_offset,
            num_labels=num_labels(config),
            dtype=dtype,
        )


class Embedder(nn.Module):
    """Tokens, positions and token types as the stream, (B, S, d)."""

    config: BertConfig

    def setup(self):
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, c.dtype)
        self.embed_positions = Embed(c.position_offset + c.max_position_embeddings, c.hidden_size, c.dtype)
        self.embed_token_types = Embed(c.type_vocab_size, c.hidden_size, c.dtype)
        self.embed_norm = LayerNorm(c.layer_norm_eps, c.dtype)

    def __call__(self, batch: Batch) -> jax.Array:
        tokens, types = batch["tokens"], batch.get("token_types")
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.embed_tokens(tokens) + self.embed_token_types(types)
        return self.embed_norm(x + self.embed_positions(batch["positions"] + self.config.position_offset))


class Block(nn.Module):
    """One layer: (x (B, S, d), ctx, cache) -> (x, cache)."""

    config: BertConfig

    def setup(self):
        c = self.config
        heads = c.num_attention_heads
        self.self_attn = Attention(heads, heads, c.head_dim, True, True, param_dtype=c.dtype, causal=False)
        self.attention_norm = LayerNorm(c.layer_norm_eps, c.dtype)
        self.mlp = MLP(c.intermediate_size, c.hidden_act, param_dtype=c.dtype)
        self.output_norm = LayerNorm(c.layer_norm_eps, c.dtype)

    def __call__(self, x: jax.Array, ctx: Context, cache: Mapping[str, jax.Array] | None = None):
        x, cache = self.attend(checkpoint_name(x, "block_input"), ctx, cache)
        return self.feed_forward(x), cache

    def attend(self, x, ctx, cache=None):
        """The first part."""
        attended, cache = self.self_attn(x, ctx, cache)
        return self.attention_norm(checkpoint_name(x + attended, "after_attention")), cache

    def feed_forward(self, x):
        """The second part."""
        return self.output_norm(checkpoint_name(x + self.mlp(x), "after_mlp"))


class MaskedLMHead(nn.Module):
    """norm(activation(dense(x))) E^T + bias."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        c = self.config
        x = Dense(c.hidden_size, True, c.dtype, name="dense")(x)
        x = LayerNorm(c.layer_norm_eps, c.dtype, name="norm")(ACTIVATIONS[c.hidden_act](x))
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,), c.dtype)
        return checkpoint_name(unembed(embedding, x) + bias.astype(x.dtype), "lm_head")


class Classifier(nn.Module):
    """out_proj(tanh(dense(x)))."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = jnp.tanh(Dense(c.hidden_size, True, c.dtype, name="dense")(x))
        return Dense(c.num_labels, True, c.dtype, name="out_proj")(x)


class Head(nn.Module):
    """(..., d) -> float32: logits (..., V), labels' (..., num_labels), or x itself."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        if self.config.head == "masked_lm":
            x = MaskedLMHead(self.config, name="lm_head")(x, embedding)
        elif self.config.head == "classifier":
            x = Classifier(self.config, name="classifier")(x)
        return x.astype(jnp.float32)


def bert(config: BertConfig) -> Model:
    """The Model of a configuration: pure functions, nothing allocated."""
    return assemble(config, Embedder(config), Block(config), Head(config), TEXT)


def from_hf(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Model:
    """The Model of a parsed config.json; see `BertConfig.from_hf`."""
    return bert(BertConfig.from_hf(config, dtype))


@functools.cache
def shapes(config: BertConfig) -> tree.Flat:
    """`{path: ShapeDtypeStruct}` of every parameter; nothing is allocated."""
    return tree.flatten(jax.eval_shape(lambda key: bert(config).init(key, {}), jax.random.key(0)))
