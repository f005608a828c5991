"""Attention on a TPU: JAX's splash attention, forward and backward kernels called apart.

The library's differentiable function would run its forward kernel again wherever the output was kept by name; its two
halves are therefore taken by themselves. Blocks are 512 queries by 512 keys where the row allows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCKS = (512, 256, 128)


def supports(query, key, value, where, *rest, scale, window, causal) -> bool:
    """Whole rows of a multiple of 128 tokens, head sizes that are multiples of 64."""
    s, d = query.shape[1], query.shape[3]
    whole = where.query_index is None and where.window is None and key.shape[1] == s and (causal or window is None)
    return whole and s % 128 == 0 and d % 64 == 0


def _kernel(heads: int, s: int, window: int | None, causal: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in _BLOCKS if s % size == 0)
    if not causal:
        mask = masks.FullMask((s, s))
    else:
        mask = masks.CausalMask((s, s)) if window is None else masks.LocalMask((s, s), (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    return splash, kernel


def _rows(where):
    """Per row of the batch: (segments of its queries, of its keys), or None."""
    return None if where.query_segment is None else (where.query_segment, where.key_segment)


def _heads_first(*arrays):
    return tuple(x.swapaxes(1, 2) for x in arrays)


def forward(query, key, value, where, *, scale, window, causal):
    """(out (B, S, H, D), lse (B, H, S) float32)."""
    splash, kernel = _kernel(query.shape[2], query.shape[1], window, causal)

    def row(q, k, v, segments):
        ids = None if segments is None else splash.SegmentIds(*segments)
        out, (lse,) = splash._splash_attention_forward(
            kernel.fwd_mask_info, q, k, v, ids, None, save_residuals=True, **_kernel_options(kernel)
        )
        return out, lse

    q, k, v = _heads_first(query * jnp.asarray(scale, query.dtype), key, value)
    out, lse = jax.vmap(row)(q, k, v, _rows(where))
    return out.swapaxes(1, 2), lse


def backward(query, key, value, where, out, lse, d_out, *, scale, window, causal):
    """Cotangents of query, key and value."""
    splash, kernel = _kernel(query.shape[2], query.shape[1], window, causal)
    options = _kernel_options(kernel)

    def row(q, k, v, o, lse, d_o, segments):
        ids = None if segments is None else splash.SegmentIds(*segments)
        saved = (q, k, v, ids, None, o, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        grads = splash._splash_attention_bwd(save_residuals=False, **options, res=saved, do=d_o)
        return grads[3:6]

    factor = jnp.asarray(scale, query.dtype)
    arrays = _heads_first(query * factor, key, value, out)
    (d_o,) = _heads_first(d_out)
    d_q, d_k, d_v = _heads_first(*jax.vmap(row)(*arrays, lse, d_o, _rows(where)))
    return d_q.astype(query.dtype) * factor, d_k.astype(key.dtype), d_v.astype(value.dtype)


def _kernel_options(kernel) -> dict:
    """The static arguments that both halves take."""
    names = (
        "mask_value",
        "is_mqa",
        "block_sizes",
        "residual_checkpoint_name",
        "mask_function",
        "attn_logits_soft_cap",
        "interpret",
    )
    return {name: kernel.kwargs[name] for name in names if name in kernel.kwargs}
