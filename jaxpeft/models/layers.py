"""The only Dense, norms, rotary embedding, Attention and MLPs of the library; each names what it computes.

Every activation passes through `jax.ad_checkpoint.checkpoint_name`, so that a memory plan can say by name which are
saved for the backward pass. Parameters are stored in `param_dtype`; computation is in the dtype of the stream,
float32 inside norms and softmax. There is no dropout: the rates in a pretrained model's configuration are not read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import constraints, decoding
from jaxpeft.backward import norms
from jaxpeft.model import Context
from jaxpeft.quant import dot
from pallas_kernels import attention as attention_op
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.swiglu import swiglu


@functools.singledispatch
def lookup(table: Any, ids: jax.Array) -> jax.Array:
    """Rows of a table (V, d) by number: (...) int32 -> (..., d); a number outside the table gives NaN.

    Another type of table registers its own, and its own `unembed`, as with `jaxpeft.quant.dot`.
    """
    return jnp.take(table, ids, axis=0)


@functools.singledispatch
def with_inner(table: Any, change: Callable[[Any], Any]) -> Any:
    """A table with `change` of the one that tokens' numbers are looked up in, in the place of that.

    Another type of table that has one in it registers its own.
    """
    return change(table)


@functools.singledispatch
def unembed(table: Any, x: jax.Array) -> jax.Array:
    """x (..., d) times a table (V, d) transposed, in x's dtype: the logits of a tied head."""
    return jnp.einsum("...d,vd->...v", x, table.astype(x.dtype))  # no transpose, which a loop would keep as a copy


class Dense(nn.Module):
    """y = x W + bias, x (..., n), W (n, m). `linear` is where adapters attach (see `jaxpeft.sites`)."""

    features: int
    use_bias: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")  # a quantized kernel has no shape that `param` would accept
        else:
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.param_dtype)
        with constraints.at("/".join(("layers", *self.path))):
            y = self.linear(x, kernel)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(y.dtype)
        return checkpoint_name(y, self.name or "dense")

    def linear(self, x: jax.Array, kernel: Any) -> jax.Array:
        """The site's product."""
        return dot(x, kernel)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32.

    Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        name, y = self.name or "norm", rms_norm(x, scale, self.epsilon)
        if norms.names():
            wide = x.astype(jnp.float32)
            rstd = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1) + self.epsilon)
            y = norms.from_normalized(name, x, scale.astype(x.dtype), None, y, wide * rstd[..., None], rstd)
        return checkpoint_name(y, name)


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias over the last axis, in float32.

    Ba et al. 2016, arXiv:1607.06450.
    """

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        rstd = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        wide = wide * rstd
        name, y = self.name or "norm", (wide * scale + bias).astype(x.dtype)
        if norms.names():
            y = norms.from_normalized(name, x, scale, bias, y, wide, rstd[..., 0])
        return checkpoint_name(y, name)


def rotary_tables(positions: jax.Array, frequencies: jax.Array, factor: float = 1.0) -> dict[str, jax.Array]:
    """cos and sin, float32 (B, S, 1, D/2), of positions (B, S) times frequencies (D/2,).

    `factor` scales both (YaRN).
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return {"cos": jnp.cos(angles) * factor, "sin": jnp.sin(angles) * factor}


def rotate(x: jax.Array, tables: Mapping[str, jax.Array]) -> jax.Array:
    """Rotary embedding of x (B, S, H, D), halves paired as in Hugging Face's Llama.

    Su et al. 2021, arXiv:2104.09864.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = tables["cos"], tables["sin"]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Self-attention with grouped queries; rotary positions where the context's rows have a "rotary".

    `cache` holds other keys and values of this layer, in one of these forms:
      {"k", "v"} (B, P, N, D): a prefix that every query sees; it is only read.
      {"k", "v", "segment_ids" (B, C)}: of other tokens, which alone are seen, all that are of a query's segment; it is
      only read. {}: it comes back as this pass's own, in that form.
      One with an "index": the cache of all layers (`jaxpeft.decoding`) and this one's number, "layer". The new keys are
      written from slot `index` on; it comes back updated.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    use_bias: bool = False
    use_out_bias: bool = False
    norm_epsilon: float | None = None  # RMSNorm on each head of q and k (Qwen3)
    window: int | None = None  # of every layer; windows that differ by layer are what all rows share
    param_dtype: Any = jnp.float32
    causal: bool = True  # otherwise every token sees all of its segment

    @nn.compact
    def __call__(
        self, x: jax.Array, ctx: Context, cache: Mapping[str, jax.Array] | None = None
    ) -> tuple[jax.Array, Mapping[str, jax.Array] | None]:
        b, s, d = x.shape
        decodes = cache is not None and "index" in cache

        def project(name, heads):
            y = Dense(heads * self.head_dim, self.use_bias, self.param_dtype, name=name)(x)
            if decodes and s == 1:  # a TPU's product that knew of the heads would want the kernels transposed
                y = jax.lax.optimization_barrier(y)
            return y.reshape(b, s, heads, self.head_dim)

        q = project("q_proj", self.num_heads)
        k = project("k_proj", self.num_kv_heads)  # dead code where only other tokens are seen
        v = project("v_proj", self.num_kv_heads)
        if self.norm_epsilon is not None:
            q = RMSNorm(self.norm_epsilon, self.param_dtype, name="q_norm")(q)
            k = RMSNorm(self.norm_epsilon, self.param_dtype, name="k_norm")(k)
        if "rotary" in ctx.rows:
            q = checkpoint_name(rotate(q, ctx.rows["rotary"]), "q_rotary")
            k = checkpoint_name(rotate(k, ctx.rows["rotary"]), "k_rotary")

        segments = ctx.rows.get("segment_ids")
        window = ctx.shared["window"][ctx.layer] if "window" in ctx.shared else None
        where = attention_op.Where(None, None, segments, segments, window)
        if cache is not None and decodes:
            out, cache = decoding.attend(q, k, v, where, cache, self.head_dim**-0.5, self.window, self.causal)
        else:
            if cache:
                k, v, where = _with_others(k, v, where, cache)
            elif cache is not None:
                cache = {"k": k, "v": v, "segment_ids": jnp.ones((b, s), jnp.int32) if segments is None else segments}
            out = self.attended(q, k, v, where)
        return Dense(d, self.use_out_bias, self.param_dtype, name="o_proj")(out.reshape(b, s, -1)), cache

    def attended(self, q: jax.Array, k: jax.Array, v: jax.Array, where: attention_op.Where) -> jax.Array:
        """What o_proj reads, (B, S, H, D), of a pass without a cache that is written (see `jaxpeft.methods.spt`)."""
        options = (self.head_dim**-0.5, self.window, self.causal)
        return attention_op.attention(q, k, v, where, *options, constraints.of_attention())


def _with_others(k, v, where, cache):
    """Keys, values and mask with those of a cache that is only read."""
    b, s = k.shape[:2]
    index = jnp.arange(s, dtype=jnp.int32)
    where = where._replace(query_index=index, key_index=index)
    if where.query_segment is None:
        ones = jnp.ones((b, s), jnp.int32)
        where = where._replace(query_segment=ones, key_segment=ones)
    if "segment_ids" in cache:
        count = cache["k"].shape[1]
        where = where._replace(
            query_index=jnp.full(s, count, jnp.int32),  # behind all of them
            key_index=jnp.arange(count, dtype=jnp.int32),
            key_segment=cache["segment_ids"],
        )
        return cache["k"].astype(k.dtype), cache["v"].astype(v.dtype), where
    prefix = cache["k"].shape[1]
    every = jnp.full((b, prefix), attention_op.EVERYONE, jnp.int32)
    where = where._replace(
        key_index=jnp.concatenate([jnp.zeros(prefix, jnp.int32), where.key_index]),
        key_segment=jnp.concatenate([every, where.key_segment], axis=1),
    )
    k, v = (jnp.concatenate([cache[name].astype(x.dtype), x], 1) for name, x in (("k", k), ("v", v)))
    return k, v, where


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    intermediate_size: int
    use_bias: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Dense(self.intermediate_size, self.use_bias, self.param_dtype, name="gate_proj")(x)
        up = Dense(self.intermediate_size, self.use_bias, self.param_dtype, name="up_proj")(x)
        product = checkpoint_name(self.activated(gate, up), "mlp_product")
        return Dense(x.shape[-1], self.use_bias, self.param_dtype, name="down_proj")(product)

    def activated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """What down reads: where experts attach (see `jaxpeft.methods.mixlora`)."""
        return swiglu(gate, up)


# Hugging Face's names of activation functions. "gelu" is exact: x Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
}


class MLP(nn.Module):
    """down(activation(up(x))), with biases."""

    intermediate_size: int
    activation: str  # one of ACTIVATIONS
    use_bias: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up = Dense(self.intermediate_size, self.use_bias, self.param_dtype, name="up_proj")(x)
        activated = checkpoint_name(self.activated(up), "mlp_activation")
        return Dense(x.shape[-1], self.use_bias, self.param_dtype, name="down_proj")(activated)

    def activated(self, up: jax.Array) -> jax.Array:
        """What down reads, as `GatedMLP.activated`."""
        return ACTIVATIONS[self.activation](up)


class Embed(nn.Module):
    """Rows of a table by number: (...) int32 -> (..., d) in `param_dtype`; a number outside the table gives NaN."""

    count: int
    features: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param("embedding", nn.initializers.normal(0.02), (self.count, self.features), self.param_dtype)
        rows = lookup(table, ids).astype(self.param_dtype)  # a master that trains is wider
        return checkpoint_name(constraints.looked_up(rows), self.name or "embed")


class PreNormBlock(nn.Module):
    """One layer of four modules that a family sets up: x += self_attn(attention_norm(x)); x += mlp(mlp_norm(x))."""

    def __call__(self, x: jax.Array, ctx: Context, cache: Mapping[str, jax.Array] | None = None):
        x, cache = self.attend(checkpoint_name(x, "block_input"), ctx, cache)
        return self.feed_forward(x), cache

    def attend(self, x, ctx, cache=None):
        """The first part."""
        attended, cache = self.self_attn(self.attention_norm(x), ctx, cache)
        return checkpoint_name(x + attended, "after_attention"), cache

    def feed_forward(self, x):
        """The second part."""
        return checkpoint_name(x + self.mlp(self.mlp_norm(x)), "block_output")
