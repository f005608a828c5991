"""Decoders of the Llama family: Llama 2, 3 and 3.x, Mistral, Qwen2 and 2.5, Qwen3.

One block: x += attention(norm(x)); x += mlp(norm(x)). The members differ in what their configuration says: biases on
q, k, v (Qwen2), norms on the heads of q and k (Qwen3), sliding windows (Mistral; Qwen2 by layer), rotary scaling
(Llama 3.1 and later), tied embeddings.

Parameters are called as in Hugging Face's checkpoints; NAMES is the whole translation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import constraints, decoding, tree
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Context, Model, Stack, by_token, reads_stacks, scan_layers
from jaxpeft.models import fields, rotary
from jaxpeft.models.labels import num_labels
from jaxpeft.models.layers import Attention, Dense, GatedMLP, RMSNorm, lookup, rotary_tables, unembed

# config.json's model_type -> the architecture that classifies rows.
MODEL_TYPES = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}
PREFIX = "model."
# Our paths of parameters that belong to the classifier: new where the checkpoint is of a model without one.
CLASSIFIER = r"classifier/.*"
# Tensors of heads that a checkpoint may have and the model does not.
OTHER_HEADS = r"lm_head\.weight|score\.weight"
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
TIES = False

# our path -> (Hugging Face name, whether the matrix is transposed there); {i} is the layer. First match wins.
NAMES = (
    (r"embed_tokens/embedding", "model.embed_tokens.weight", False),
    (r"layers/(\w+)/kernel", r"model.layers.{i}.\1.weight", True),
    (r"layers/(\w+)/(\w+)/kernel", r"model.layers.{i}.\1.\2.weight", True),
    (r"layers/(\w+)/(\w+)/bias", r"model.layers.{i}.\1.\2.bias", False),
    (r"layers/(\w+)/scale", r"model.layers.{i}.\1.weight", False),
    (r"layers/(\w+)/(\w+)/scale", r"model.layers.{i}.\1.\2.weight", False),
    (r"norm/scale", "model.norm.weight", False),
    (r"lm_head/kernel", "lm_head.weight", True),
    (r"classifier/kernel", "score.weight", True),
)

NO_WINDOW = np.iinfo(np.int32).max // 2


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a config.json, under Hugging Face's names where they mean the same."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int  # tokens that the model has room for: with a scaling, more than it was trained on
    rope_theta: float
    rope_scaling: tuple[tuple[str, Any], ...] = ()  # items of the scaling's dict, so that configurations hash
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    windows: tuple[int, ...] | None = None  # tokens per layer; None: no layer has a window
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    num_labels: int = 0  # 0: the head is the unembedding, else a classifier of rows
    dtype: Any = jnp.float32  # of the stream; parameters are created in it too

    @property
    def head(self) -> str:
        """What reads the stream."""
        return "classifier" if self.num_labels else "causal_lm"

    @property
    def window(self) -> int | None:
        """The window of all layers, in tokens; None where they differ or have none."""
        same = self.windows is not None and len(set(self.windows)) == 1
        return self.windows[0] if same and self.windows else None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], dtype: Any = jnp.float32) -> DecoderConfig:
        """From a parsed config.json.

        Raises:
          InputError: for a missing field, one of the wrong type, or a feature that is not supported.
        """
        kind = fields.one_of(config, "model_type", MODEL_TYPES, None)
        fields.one_of(config, "hidden_act", ("silu",), "silu")
        heads = fields.count(config, "num_attention_heads")
        kv_heads = fields.count(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        size = fields.count(config, "hidden_size")
        head_dim = fields.count(config, "head_dim", 128 if kind == "qwen3" else size // heads)
        theta, scaling, room = rotary.of_config(config, head_dim)
        bias = fields.switch(config, "attention_bias")
        layers = fields.count(config, "num_hidden_layers")
        return cls(
            model_type=kind,
            vocab_size=fields.count(config, "vocab_size"),
            hidden_size=size,
            intermediate_size=fields.count(config, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number(config, "rms_norm_eps", 1e-6),
            max_position_embeddings=room,
            rope_theta=theta,
            rope_scaling=tuple(sorted(scaling.items())),
            qkv_bias=kind == "qwen2" or bias,
            out_bias=bias,
            mlp_bias=fields.switch(config, "mlp_bias"),
            qk_norm=kind == "qwen3",
            tie_word_embeddings=fields.switch(config, "tie_word_embeddings"),
            windows=_windows(kind, config, layers),
            bos_token_id=fields.token(config, "bos_token_id"),
            eos_token_id=fields.tokens(config, "eos_token_id"),
            num_labels=num_labels(config),
            dtype=dtype,
        )


def _windows(kind: str, config: Mapping[str, Any], layers: int) -> tuple[int, ...] | None:
    used = kind == "mistral" or (kind.startswith("qwen") and fields.switch(config, "use_sliding_window"))
    if not used or not config.get("sliding_window"):
        return None
    window = fields.count(config, "sliding_window")
    if types := fields.names(config, "layer_types"):
        if len(types) != layers:
            raise InputError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers {layers}")
        sliding = [name == "sliding_attention" for name in types]
    elif kind == "mistral":
        sliding = [True] * layers
    else:
        full = 0 if config.get("max_window_layers") == 0 else fields.count(config, "max_window_layers", 28)
        sliding = [i >= full for i in range(layers)]
    return tuple(window if slides else NO_WINDOW for slides in sliding) if any(sliding) else None


class Embed(nn.Module):
    """Token embeddings, (B, S) int32 -> (B, S, d) in the compute dtype."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        table = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), c.dtype)
        return checkpoint_name(constraints.looked_up(lookup(table, tokens).astype(c.dtype)), "embed_tokens")


class Block(nn.Module):
    """One layer: (x (B, S, d), ctx, cache) -> (x, cache)."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        self.input_layernorm = RMSNorm(c.rms_norm_eps, c.dtype)
        self.self_attn = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.qkv_bias,
            c.out_bias,
            c.rms_norm_eps if c.qk_norm else None,
            c.window,
            c.dtype,
        )
        self.post_attention_layernorm = RMSNorm(c.rms_norm_eps, c.dtype)
        self.mlp = GatedMLP(c.intermediate_size, c.mlp_bias, c.dtype)

    def __call__(self, x: jax.Array, ctx: Context, cache: Mapping[str, jax.Array] | None = None):
        x, cache = self.attend(checkpoint_name(x, "block_input"), ctx, cache)
        return self.feed_forward(x), cache

    def attend(self, x, ctx, cache):
        """The first part."""
        attended, cache = self.self_attn(self.input_layernorm(x), ctx, cache)
        return checkpoint_name(x + attended, "after_attention"), cache

    def feed_forward(self, x):
        """The second part."""
        return checkpoint_name(x + self.mlp(self.post_attention_layernorm(x)), "block_output")


class Head(nn.Module):
    """Final norm, and unembedding or classifier: (..., d) -> float32 logits (..., V)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
        c = self.config
        x = RMSNorm(c.rms_norm_eps, c.dtype, name="norm")(x)
        if c.num_labels:
            logits = Dense(c.num_labels, False, c.dtype, name="classifier")(x)
        elif c.tie_word_embeddings:
            assert embedding is not None
            logits = checkpoint_name(unembed(embedding, x), "lm_head")
        else:
            logits = Dense(c.vocab_size, False, c.dtype, name="lm_head")(x)
        return logits.astype(jnp.float32)


@functools.cache  # models of one configuration share what is compiled of them
def decoder(config: DecoderConfig) -> Model:
    """The Model of a configuration: pure functions, nothing allocated."""
    embed_module, block_module, head_module = Embed(config), Block(config), Head(config)
    scaling = dict(config.rope_scaling)
    freqs, factor = rotary.frequencies(config.head_dim, config.rope_theta, scaling, config.max_position_embeddings)

    def embed(params: tree.Params, batch: Batch, key: jax.Array | None = None):
        del key
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segments = batch.get("segment_ids")
        own = jnp.asarray(freqs)
        if scaling.get("rope_type") == "dynamic":
            own = rotary.by_length(rotary.lengths(positions, segments), config.head_dim, config.rope_theta, scaling)
        rows = {"positions": positions, "rotary": rotary_tables(positions, own, factor)}
        if segments is not None:
            rows["segment_ids"] = segments
        mixed = config.windows is not None and config.window is None
        ctx = Context(rows, {"window": jnp.asarray(config.windows, jnp.int32)} if mixed else {})
        return embed_module.apply({"params": params["embed_tokens"]}, tokens), ctx

    def apply(layer, *args, ctx, method=None):
        return block_module.apply({"params": layer}, *args, rngs=ctx.rngs, method=method)

    def block(layer, x, ctx, cache=None, segment="layers"):
        del segment
        return apply(layer, x, ctx, cache, ctx=ctx)

    def attend(layer, x, ctx, cache=None, segment="layers"):
        del segment
        return apply(layer, x, ctx, cache, ctx=ctx, method=Block.attend)

    def feed_forward(layer, x, ctx, cache=None, segment="layers"):
        del segment
        return apply(layer, x, ctx=ctx, method=Block.feed_forward), cache

    def head(params: tree.Params, x: jax.Array) -> jax.Array:
        own = {name: params[name] for name in ("norm", "lm_head", "classifier") if name in params}
        embedding = params["embed_tokens"]["embedding"] if config.tie_word_embeddings else None
        return head_module.apply({"params": own}, x, embedding)

    def init(key: jax.Array, params: tree.Params) -> tree.Params:
        return params or fresh(key)

    @jax.jit
    def fresh(key):
        keys = jax.random.split(key, config.num_hidden_layers + 2)
        x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
        ones = jnp.ones((1, 1), jnp.int32)
        ctx = Context({"rotary": rotary_tables(ones, jnp.asarray(freqs), factor)}, layer=jnp.zeros((), jnp.int32))
        table = embed_module.init(keys[0], ones)["params"]
        embedding = table["embedding"]
        return {
            "embed_tokens": table,
            "layers": jax.vmap(lambda k: block_module.init(k, x, ctx)["params"])(keys[2:]),
            **head_module.init(keys[1], x, embedding)["params"],
        }

    cache = functools.partial(init_cache, config)
    parts = (attend, by_token(feed_forward))
    stack = Stack(embed, reads_stacks(block), head, scan_layers, parts=parts, init_cache=cache)
    return Model(init, stack, config)


def from_hf(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Model:
    """The Model of a parsed config.json; see `DecoderConfig.from_hf`."""
    return decoder(DecoderConfig.from_hf(config, dtype))


@functools.cache
def shapes(config: DecoderConfig) -> tree.Flat:
    """`{path: ShapeDtypeStruct}` of every parameter; nothing is allocated."""
    return tree.flatten(jax.eval_shape(lambda key: decoder(config).init(key, {}), jax.random.key(0)))


def init_cache(config: Any, batch_size: int, length: int) -> dict[str, Any]:
    """An empty key-value cache for all layers of any decoder; see `jaxpeft.decoding`."""
    heads, size = config.num_key_value_heads, config.head_dim
    return decoding.empty(config.num_hidden_layers, batch_size, length, heads, size, config.dtype)
