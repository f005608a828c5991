"""Exact attention, causal or not, by the kernel of the platform that the program is lowered for.

    out[q] = sum_k softmax_k(scale * <query[q], key[k]>) value[k]      over the keys that q may see

    tpu      splash attention (JAX's own Pallas kernel)                splash.py
    cuda     cuDNN's fused attention                                   cudnn.py
    else     tiles in plain JAX, any mask                              chunked.py (smaller tiles on a CPU)

`of_cache` is decoding's: one token per row, the keys and values a layer of a cache                   cached.py

On a mesh rows, heads and tokens may be divided; of divided tokens keys and values go round in a ring         ring.py

Kernels take whole rows (no cache, no prefix) and one window for all layers; everything else runs in tiles. None holds
an array of queries x keys in float32; cuDNN gets segments as a mask of queries x keys, for rows of up to 4096 tokens.

The output and the float32 log-sum-exp of the scores are all that the backward pass needs besides query, key and value.
They are named `attention` and `attention_lse` (`jax.ad_checkpoint.checkpoint_name`), so that a memory plan may keep
both, or run the forward kernel again.

Shapes: B batch, S queries, K keys, H heads, N key-value heads (H = N * G), D head size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import cached, chunked, cudnn, ring, splash
from pallas_kernels.attention.chunked import EVERYONE, Where
from pallas_kernels.divided import Dims, Divided
from pallas_kernels.platform import Implementation, operation

__all__ = ["EVERYONE", "Where", "attention", "of_cache"]


def _products(count):
    """FLOPs of `count` products of queries and keys; causal masks halve them where queries are keys."""

    def flops(query, key, *rest, causal=True, **static):
        b, s, h, d = query.shape
        return count * 2.0 * b * h * s * key.shape[1] * d / (2 if causal and s == key.shape[1] else 1)

    return flops


def _on_cpu(function):
    """Tiles of 64: a CPU's caches hold the scores of such a tile."""
    return Implementation(functools.partial(function, tile=64), lambda *args, **static: True, partitions=True)


_WHERE = Where("s", "k", "bs", "bk", "")  # type: ignore[arg-type]
_INPUTS = ("bshd", "bkhd", "bkhd", _WHERE)  # h of keys: fewer heads, divided alike

forward = operation(
    "attention_forward",
    chunked.forward,
    flops=_products(2),
    dims=Dims(_INPUTS, ("bshd", "bhs"), ("", ""), ring.forward),
    cpu=_on_cpu(chunked.forward),
    tpu=Implementation(splash.forward, splash.supports),
    cuda=Implementation(cudnn.forward, cudnn.supports),
)
backward = operation(
    "attention_backward",
    chunked.backward,
    flops=_products(5),
    dims=Dims((*_INPUTS, "bshd", "bhs", "bshd"), ("bshd", "bkhd", "bkhd"), ("", "", ""), ring.backward),
    cpu=_on_cpu(chunked.backward),
    tpu=Implementation(splash.backward, splash.supports),
    cuda=Implementation(cudnn.backward, cudnn.supports),
)


def _of_cache_flops(query, keys, *rest, **static):
    return 4.0 * query.size * keys.shape[3]


_of_cache = operation(
    "attention_of_cache",
    lambda *args, **static: (cached.dots(*args, **static),),
    flops=_of_cache_flops,
    cuda=Implementation(
        lambda *args, **static: (cached.sums(*args, **static),), lambda *args, **static: True, partitions=True
    ),
)


def of_cache(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    where: Where,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> jax.Array:
    """Attention of one token per row to a layer of a cache, which is read where it lies; it has no derivative.

    Args:
      query: (B, 1, H, D).
      keys: (L, B, N, C, D) of all layers.  values: (L, B, N, D, C).
      layer: () int32, whose are read.
      where: the mask, all of its indices and segments.
      scale, window, causal: as of `attention`.

    Returns:
      (B, 1, H, D) in query's dtype. A query that may see no key gets 0.
    """
    return _of_cache(query, keys, values, layer, where, scale=scale, window=window, causal=causal)[0]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    where: Where,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    divided: Divided | None = None,
) -> jax.Array:
    """Attention with segments, windows and grouped queries.

    Args:
      query: (B, S, H, D).
      key: (B, K, N, D), N dividing H; head h reads key-value head h // (H / N).
      value: (B, K, N, D).
      where: the mask, by indices and segments.
      scale: factor of the scores.
      window: a query sees keys less than `window` behind it; None: no limit.
      causal: whether a query sees only keys at its own index and before; else all of its segment (an encoder).
      divided: how b, s (of queries and keys) and h lie on the mesh of the program.

    Returns:
      (B, S, H, D) in query's dtype; scores and sums are float32. A query that may see no key gets 0.
    """
    inputs = jax.lax.stop_gradient((query, key, value, where))
    if divided is not None:
        divided = divided.renamed(k="s")
        if where.query_index is not None or key.shape[1] != query.shape[1]:
            divided = divided.renamed(s="", k="")
        parts, heads = divided.count("h"), key.shape[2]
        if query.shape[2] % parts == 0 and parts % heads == 0:  # a key-value head for each device
            key, value = (jnp.repeat(x, parts // heads, axis=2) for x in (key, value))
            inputs = jax.lax.stop_gradient((query, key, value, where))
    options = _Options(scale, window, causal, divided)
    out, lse = forward(*inputs, **options._asdict())
    # Named flat: a head size below 128 would be padded where it is kept.
    out = checkpoint_name(out.reshape(*out.shape[:2], -1), "attention").reshape(out.shape)
    return _computed(query, key, value, where, out, checkpoint_name(lse, "attention_lse"), options)


class _Options(NamedTuple):
    scale: float
    window: int | None
    causal: bool
    divided: Divided | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _computed(query, key, value, where, out, lse, options):
    """`out`, which attention has computed, with attention's derivative."""
    return out


def _keep(query, key, value, where, out, lse, options):
    return out, (query, key, value, where, out, lse)


def _pull(options, saved, d_out):
    return *backward(*saved, d_out, **options._asdict()), None, None, None


_computed.defvjp(_keep, _pull)
