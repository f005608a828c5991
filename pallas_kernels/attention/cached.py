"""Attention of one token per row to a layer of a cache, in forms that the compilers read where it lies.

    out[h] = sum_c softmax_c(scale <query[h], key[c]>) value[:, c]

A slice of the cache that a product reads is copied by some compilers, and one that a sum reads is not:

    dots    two products                 TPU (the slice becomes part of the product), CPU
    sums    products written as sums     GPU: its products are calls, which want operands whole

The keys are (L, B, N, C, D) and the values (L, B, N, D, C): what is summed over is the last axis, so that no compiler
has a reason to lay the cache out anew. All slots are read, written or not. On a GPU the weights stand behind a barrier:
fused with the softmax, the values' sum would be a kernel that wants its operands whole, too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.chunked import EVERYONE, MASKED


def _layer(cache, layer):
    return jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)


def _seen(where, window, causal):
    """(B, C) bool."""
    segments, own = where.key_segment, where.query_segment
    seen = (segments == own) | (segments == EVERYONE)
    behind = where.query_index[0] - where.key_index
    if causal:
        seen &= behind >= 0
    for limit in (window, where.window):
        if limit is not None:
            seen &= (behind < limit) | (segments == EVERYONE)
    return seen


def _weights(scores, seen, axis):
    """Softmax in float32; 0 everywhere where nothing is seen."""
    scores = jnp.where(seen, scores, MASKED)
    weights = jnp.where(seen, jnp.exp(scores - scores.max(axis, keepdims=True)), 0.0)
    total = weights.sum(axis, keepdims=True)
    return weights, jnp.where(total == 0, 1.0, total)


def _grouped(query, heads):
    b, _, h, d = query.shape
    return query.reshape(b, heads, h // heads, d)


def dots(query, keys, values, layer, where, *, scale, window=None, causal=True):
    """(B, 1, H, D), by products."""
    k, v = _layer(keys, layer), _layer(values, layer)
    q = _grouped(query, k.shape[1]).astype(k.dtype)
    scores = scale * jnp.einsum("bngd,bncd->bngc", q, k, preferred_element_type=jnp.float32)
    weights, total = _weights(scores, _seen(where, window, causal)[:, None, None], -1)
    out = jnp.einsum("bngc,bndc->bngd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).astype(query.dtype).reshape(query.shape)


def sums(query, keys, values, layer, where, *, scale, window=None, causal=True):
    """(B, 1, H, D), by sums over the last axis; queries of one key-value head lie together, which reads it once."""
    k, v = _layer(keys, layer), _layer(values, layer)
    q = _grouped(query, k.shape[1]).astype(k.dtype).astype(jnp.float32)
    scores = scale * jnp.sum(q[:, :, None] * k[:, :, :, None].astype(jnp.float32), -1)  # (B, N, C, G)
    weights, total = _weights(scores, _seen(where, window, causal)[:, None, :, None], 2)
    weights = jax.lax.optimization_barrier((weights / total).swapaxes(2, 3))  # (B, N, G, C)
    out = jnp.sum(weights[:, :, None] * v[:, :, :, None].astype(jnp.float32), -1)  # (B, N, D, G)
    return out.swapaxes(2, 3).astype(query.dtype).reshape(query.shape)
