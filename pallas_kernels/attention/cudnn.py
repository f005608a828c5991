"""Attention on an NVIDIA GPU: cuDNN's fused attention, forward and backward called apart.

The public function would run the forward kernel again wherever the output was kept by name; its derivative's second
half is therefore taken by itself. Segments become a mask of queries x keys (cuDNN's packed layout needs the number of
segments at compile time), which is why long rows with segments run in tiles instead.
"""

from __future__ import annotations

import inspect

import jax.numpy as jnp

LONGEST_MASK = 4096


def supports(query, key, value, where, *rest, scale, window, causal) -> bool:
    """Whole rows in bfloat16 or float16 with head sizes up to 128; with segments up to 4096 tokens."""
    s, d = query.shape[1], query.shape[3]
    whole = where.query_index is None and where.window is None and key.shape[1] == s and s > 1
    short = where.query_segment is None or (s <= LONGEST_MASK and s % 2 == 0)
    known = causal or window is None
    return whole and short and known and query.dtype in (jnp.bfloat16, jnp.float16) and d <= 128 and d % 8 == 0


def _options(query, where, scale, window, causal):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    unused = jnp.zeros(0, query.dtype)
    bias = unused
    if where.query_segment is not None:
        seen = where.query_segment[:, None, :, None] == where.key_segment[:, None, None, :]
        bias = jnp.where(seen, jnp.zeros((), query.dtype), cudnn.get_large_negative_number(query.dtype))
    static = {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (where.query_segment is not None, False),
        "mask_type": cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    parameters = inspect.signature(cudnn._dot_product_attention_fwd_impl).parameters
    newer = {"score_mod_args": (), "score_mod": None}  # of JAX 0.12
    static |= {name: value for name, value in newer.items() if name in parameters}
    return cudnn, (bias, *[unused] * 6), static


def forward(query, key, value, where, *, scale, window, causal):
    """(out (B, S, H, D), lse (B, H, S) float32)."""
    cudnn, arrays, static = _options(query, where, scale, window, causal)
    cudnn.check_cudnn_version()
    out, lse = cudnn._dot_product_attention_fwd_impl(query, key, value, *arrays, **static, is_training=True)
    return out, lse


def backward(query, key, value, where, out, lse, d_out, *, scale, window, causal):
    """Cotangents of query, key and value."""
    cudnn, arrays, static = _options(query, where, scale, window, causal)
    grads = cudnn._dot_product_attention_bwd_impl(query, key, value, *arrays, lse, out, d_out, **static)
    return tuple(grads[:3])
