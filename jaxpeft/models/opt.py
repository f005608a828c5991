"""OPT: a decoder with learned positions, norms before its parts, and biases everywhere.

    x = E[tokens] + P[2 + positions]
    block: x += attention(norm(x)); x += mlp(norm(x))         causal
    logits = norm(x) E^T

Of the family's models OPT-350m is made differently (norms after its parts, embeddings of another width) and is refused.
Dropout rates in the configuration are not read.

Zhang et al. 2022, arXiv:2205.01068.
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
from jaxpeft.model import Batch, Model, last_position
from jaxpeft.models import fields
from jaxpeft.models.assembly import TEXT, assemble
from jaxpeft.models.decoder import init_cache
from jaxpeft.models.labels import num_labels
from jaxpeft.models.layers import ACTIVATIONS, MLP, Attention, Dense, Embed, LayerNorm, PreNormBlock, unembed
from jaxpeft.models.names import dense, norm, table

MODEL_TYPES = {"opt": "OPTForSequenceClassification"}
HEADS = {"OPTForCausalLM": "causal_lm", "OPTForSequenceClassification": "classifier", "OPTModel": "none"}
PREFIX = "model."
CLASSIFIER = r"classifier/.*"
OTHER_HEADS = r"lm_head\.weight|score\.weight"
TIED = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
TIES = True
_LAYER = "model.decoder.layers.{i}"
NAMES = (
    *table("embed_tokens", "model.decoder.embed_tokens"),
    *table("embed_positions", "model.decoder.embed_positions"),
    *norm("layers/attention_norm", f"{_LAYER}.self_attn_layer_norm"),
    *dense(r"layers/self_attn/(q|k|v)_proj", rf"{_LAYER}.self_attn.\1_proj"),
    *dense("layers/self_attn/o_proj", f"{_LAYER}.self_attn.out_proj"),
    *norm("layers/mlp_norm", f"{_LAYER}.final_layer_norm"),
    *dense("layers/mlp/up_proj", f"{_LAYER}.fc1"),
    *dense("layers/mlp/down_proj", f"{_LAYER}.fc2"),
    *norm("norm", "model.decoder.final_layer_norm"),
    *dense("classifier", "score"),
)

_OFFSET = 2  # rows of the position table that no token reads
_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """The numbers of a config.json, under Hugging Face's names where they mean the same."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: str
    head: str  # a value of HEADS
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    num_labels: int = 0
    dtype: Any = jnp.float32  # of the stream; parameters are created in it too

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], dtype: Any = jnp.float32) -> OPTConfig:
        """From a parsed config.json.

        Raises:
          InputError: for a missing field, one of the wrong type, or a feature that is not supported.
        """
        size = fields.count(config, "hidden_size")
        fields.one_of(config, "do_layer_norm_before", (True,), True)
        fields.one_of(config, "word_embed_proj_dim", (size,), size)
        fields.one_of(config, "_remove_final_layer_norm", (False,), False)
        fields.one_of(config, "enable_bias", (True,), True)
        fields.one_of(config, "layer_norm_elementwise_affine", (True,), True)
        fields.one_of(config, "tie_word_embeddings", (True,), True)
        heads, head_dim = fields.heads_of(config)
        return cls(
            model_type=config["model_type"],
            vocab_size=fields.count(config, "vocab_size"),
            hidden_size=size,
            intermediate_size=fields.count(config, "ffn_dim"),
            num_hidden_layers=fields.count(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=head_dim,
            max_position_embeddings=fields.count(config, "max_position_embeddings", 2048),
            hidden_act=fields.one_of(config, "activation_function", ACTIVATIONS, "relu"),
            head=fields.head_of(config, HEADS),
            bos_token_id=fields.token(config, "bos_token_id", 2),
            eos_token_id=fields.tokens(config, "eos_token_id", 2),
            num_labels=num_labels(config),
            dtype=dtype,
        )


class Embedder(nn.Module):
    """Tokens and positions as the stream, (B, S, d)."""

    config: OPTConfig

    def setup(self):
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, c.dtype)
        self.embed_positions = Embed(_OFFSET + c.max_position_embeddings, c.hidden_size, c.dtype)

    def __call__(self, batch: Batch) -> jax.Array:
        return self.embed_tokens(batch["tokens"]) + self.embed_positions(batch["positions"] + _OFFSET)


class Block(PreNormBlock):
    """One layer: (x (B, S, d), ctx, cache) -> (x, cache)."""

    config: OPTConfig

    def setup(self):
        c = self.config
        heads = c.num_attention_heads
        self.attention_norm = LayerNorm(_EPSILON, c.dtype)
        self.self_attn = Attention(heads, heads, c.head_dim, True, True, param_dtype=c.dtype)
        self.mlp_norm = LayerNorm(_EPSILON, c.dtype)
        self.mlp = MLP(c.intermediate_size, c.hidden_act, param_dtype=c.dtype)


class Head(nn.Module):
    """Final norm, then what the configuration says: (..., d) -> float32 logits, or the normed stream."""

    config: OPTConfig

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        c = self.config
        x = LayerNorm(_EPSILON, c.dtype, name="norm")(x)
        if c.head == "classifier":
            x = Dense(c.num_labels, False, c.dtype, name="classifier")(x)
        elif c.head == "causal_lm":
            x = checkpoint_name(unembed(embedding, x), "lm_head")
        return x.astype(jnp.float32)


def opt(config: OPTConfig) -> Model:
    """The Model of a configuration: pure functions, nothing allocated."""
    cache = functools.partial(init_cache, config) if config.head == "causal_lm" else None
    return assemble(config, Embedder(config), Block(config), Head(config), TEXT, last_position, cache)


def from_hf(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Model:
    """The Model of a parsed config.json; see `OPTConfig.from_hf`."""
    return opt(OPTConfig.from_hf(config, dtype))


@functools.cache
def shapes(config: OPTConfig) -> tree.Flat:
    """`{path: ShapeDtypeStruct}` of every parameter; nothing is allocated."""
    return tree.flatten(jax.eval_shape(lambda key: opt(config).init(key, {}), jax.random.key(0)))
