"""ViT: an encoder of images with norms before its parts.

    x = [cls; patches(pixels) W + b] + P
    block: x += attention(norm(x)); x += mlp(norm(x))         every token sees all
    output = norm(x);  a classifier reads the first token's

A batch holds `pixels` (B, H, W, C) float32, normalised as the model's preprocessor says; H and W are the model's
image_size. The patch convolution, whose windows do not overlap, is a linear map of patches (`patch_embed`). ViTModel's
pooler is not loaded. Dropout rates in the configuration are not read. Adapters are exported under the names of
checkpoints; newer versions of transformers call ViT's modules otherwise in memory, where PEFT does not find these.

Dosovitskiy et al. 2020, arXiv:2010.11929.
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
from jaxpeft.model import Batch, Model
from jaxpeft.models import fields
from jaxpeft.models.assembly import assemble
from jaxpeft.models.labels import num_labels
from jaxpeft.models.layers import ACTIVATIONS, MLP, Attention, Dense, LayerNorm, PreNormBlock
from jaxpeft.models.names import dense, norm

MODEL_TYPES = {"vit": "ViTForImageClassification"}
HEADS = {"ViTModel": "none", "ViTForImageClassification": "classifier"}
PREFIX = "vit."
CLASSIFIER = r"classifier/.*"
OTHER_HEADS = r"classifier\..*|vit\.pooler\..*"
TIED: dict[str, str] = {}
TIES = False
_LAYER = "vit.encoder.layer.{i}"
NAMES = (
    ("cls_token", "vit.embeddings.cls_token", False),
    ("embed_positions", "vit.embeddings.position_embeddings", False),
    *dense("patch_embed", "vit.embeddings.patch_embeddings.projection"),
    *norm("layers/attention_norm", f"{_LAYER}.layernorm_before"),
    *dense("layers/self_attn/q_proj", f"{_LAYER}.attention.attention.query"),
    *dense("layers/self_attn/k_proj", f"{_LAYER}.attention.attention.key"),
    *dense("layers/self_attn/v_proj", f"{_LAYER}.attention.attention.value"),
    *dense("layers/self_attn/o_proj", f"{_LAYER}.attention.output.dense"),
    *norm("layers/mlp_norm", f"{_LAYER}.layernorm_after"),
    *dense("layers/mlp/up_proj", f"{_LAYER}.intermediate.dense"),
    *dense("layers/mlp/down_proj", f"{_LAYER}.output.dense"),
    *norm("norm", "vit.layernorm"),
    *dense("classifier", "classifier"),
)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The numbers of a config.json, under Hugging Face's names where they mean the same."""

    model_type: str
    image_size: int  # pixels of a side
    patch_size: int  # likewise
    num_channels: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    layer_norm_eps: float
    hidden_act: str
    qkv_bias: bool
    head: str  # a value of HEADS
    num_labels: int = 0
    dtype: Any = jnp.float32  # of the stream; parameters are created in it too

    @property
    def num_patches(self) -> int:
        """Of an image; its tokens are one more."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], dtype: Any = jnp.float32) -> ViTConfig:
        """From a parsed config.json.

        Raises:
          InputError: for a missing field, one of the wrong type, or a feature that is not supported.
        """
        image, patch = fields.count(config, "image_size", 224), fields.count(config, "patch_size", 16)
        if image % patch:
            raise InputError(f"config.json: image_size {image} is not a multiple of patch_size {patch}")
        heads, head_dim = fields.heads_of(config)
        return cls(
            model_type=config["model_type"],
            image_size=image,
            patch_size=patch,
            num_channels=fields.count(config, "num_channels", 3),
            hidden_size=fields.count(config, "hidden_size"),
            intermediate_size=fields.count(config, "intermediate_size"),
            num_hidden_layers=fields.count(config, "num_hidden_layers"),
            num_attention_heads=heads,
            head_dim=head_dim,
            layer_norm_eps=fields.number(config, "layer_norm_eps", 1e-12),
            hidden_act=fields.one_of(config, "hidden_act", ACTIVATIONS, "gelu"),
            qkv_bias=fields.switch(config, "qkv_bias", True),
            head=fields.head_of(config, HEADS),
            num_labels=num_labels(config),
            dtype=dtype,
        )


def file_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that have more axes in a checkpoint than here."""
    c, prefix = config, "" if config.head == "none" else PREFIX
    return {
        f"{prefix}embeddings.cls_token": (1, 1, c.hidden_size),
        f"{prefix}embeddings.position_embeddings": (1, c.num_patches + 1, c.hidden_size),
        f"{prefix}embeddings.patch_embeddings.projection.weight": (
            c.hidden_size,
            c.num_channels,
            c.patch_size,
            c.patch_size,
        ),
    }


class Embedder(nn.Module):
    """Images as the stream, (B, 1 + patches, d)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        c, pixels = self.config, batch["pixels"]
        expected = (c.image_size, c.image_size, c.num_channels)
        if pixels.shape[1:] != expected:
            found = " x ".join(map(str, pixels.shape[1:]))
            raise InputError(f"images of {found}: the model reads {' x '.join(map(str, expected))}")
        x = Dense(c.hidden_size, True, c.dtype, name="patch_embed")(patches(pixels, c.patch_size).astype(c.dtype))
        cls = self.param("cls_token", nn.initializers.normal(0.02), (c.hidden_size,), c.dtype)
        positions = self.param(
            "embed_positions", nn.initializers.normal(0.02), (c.num_patches + 1, c.hidden_size), c.dtype
        )
        first = jnp.broadcast_to(cls.astype(c.dtype), (x.shape[0], 1, c.hidden_size))
        return checkpoint_name(jnp.concatenate([first, x], axis=1) + positions.astype(c.dtype), "embed_patches")


def patches(pixels: jax.Array, size: int) -> jax.Array:
    """Images (B, H, W, C) cut into squares, row by row: (B, (H / size) (W / size), C size size)."""
    b, h, w, c = pixels.shape
    cut = pixels.reshape(b, h // size, size, w // size, size, c)
    return cut.transpose(0, 1, 3, 5, 2, 4).reshape(b, (h // size) * (w // size), c * size * size)


class Block(PreNormBlock):
    """One layer: (x (B, S, d), ctx, cache) -> (x, cache)."""

    config: ViTConfig

    def setup(self):
        c = self.config
        heads = c.num_attention_heads
        self.attention_norm = LayerNorm(c.layer_norm_eps, c.dtype)
        self.self_attn = Attention(heads, heads, c.head_dim, c.qkv_bias, True, param_dtype=c.dtype, causal=False)
        self.mlp_norm = LayerNorm(c.layer_norm_eps, c.dtype)
        self.mlp = MLP(c.intermediate_size, c.hidden_act, param_dtype=c.dtype)


class Head(nn.Module):
    """Final norm, and classifier if there is one: (..., d) -> float32 (..., num_labels or d)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array, embedding: None = None) -> jax.Array:
        c = self.config
        x = LayerNorm(c.layer_norm_eps, c.dtype, name="norm")(x)
        if c.head == "classifier":
            x = Dense(c.num_labels, True, c.dtype, name="classifier")(x)
        return x.astype(jnp.float32)


def vit(config: ViTConfig) -> Model:
    """The Model of a configuration: pure functions, nothing allocated."""
    c = config
    example = {"pixels": jnp.zeros((1, c.image_size, c.image_size, c.num_channels))}
    return assemble(config, Embedder(config), Block(config), Head(config), example)


def from_hf(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Model:
    """The Model of a parsed config.json; see `ViTConfig.from_hf`."""
    return vit(ViTConfig.from_hf(config, dtype))


@functools.cache
def shapes(config: ViTConfig) -> tree.Flat:
    """`{path: ShapeDtypeStruct}` of every parameter; nothing is allocated."""
    return tree.flatten(jax.eval_shape(lambda key: vit(config).init(key, {}), jax.random.key(0)))
