"""Exact attention in linear memory, in plain JAX: any backend, any mask, grouped queries.

    out[q] = sum_k softmax_k(scale * <query[q], key[k]>) value[k]      over the keys that q may see

computed tile by tile with a running maximum and sum (Dao et al. 2022, "FlashAttention", arXiv:2205.14135; Rabe &
Staats 2021, arXiv:2112.05682). The forward pass keeps its inputs, the output and one float32 log-sum-exp per query
and head; the backward pass computes each tile of scores again. No array of queries x keys exists in either, masks
included: a tile's mask comes from indices and segment ids. Tiles above the diagonal of causal attention and tiles left
of a sliding window are skipped.

Shapes: B batch, S queries, K keys, H heads, N key-value heads (H = N * G), D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30
EVERYONE = -1  # the segment id of a key that every query sees (a prefix)
_NO_ONE = -2  # that of a key that no query sees (padding to whole tiles)


class Where(NamedTuple):
    """Who may see whom. All int32; None where there is nothing to say.

    query_index (S,), key_index (K,): positions in the row; where attention is causal, a query sees keys at its own
      index and before. None: both are 0 .. S-1.
    query_segment (B, S), key_segment (B, K): a query sees keys of its own segment, and those of segment `EVERYONE`.
      None: the row is one segment.
    window (): a query sees keys less than `window` behind it, where that differs from layer to layer.
    """

    query_index: jax.Array | None = None
    key_index: jax.Array | None = None
    query_segment: jax.Array | None = None
    key_segment: jax.Array | None = None
    window: jax.Array | None = None


class _Tiles(NamedTuple):
    """Arrays padded to whole tiles: query (B, S, N, G, D), key, value, the mask without None, tile sizes."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    where: Where
    sizes: tuple[int, int]


def filled(where: Where, rows: int, queries: int, keys: int, window: int | None = None) -> Where:
    """The mask with the indices and segments that it leaves out, and with a window of all layers."""
    if where.query_index is None:
        own = [jnp.arange(count, dtype=jnp.int32) for count in (queries, keys)]
        where = where._replace(query_index=own[0], key_index=own[1])
    if where.query_segment is None:
        ones = [jnp.ones((rows, count), jnp.int32) for count in (queries, keys)]
        where = where._replace(query_segment=ones[0], key_segment=ones[1])
    return where if window is None else where._replace(window=jnp.asarray(window, jnp.int32))


def _tiled(query, key, value, where, window, tile):
    b, s = query.shape[:2]
    k, n = key.shape[1:3]
    tile = tile or 256
    tile_q, tile_k = min(tile, s), _one_querys_tile(k) if s == 1 else min(tile, k)
    pad_q, pad_k = -s % tile_q, -k % tile_k
    where = filled(where, b, s, k, window)
    # Padding: keys that no query sees, at an index that no causal query reaches.
    where = where._replace(
        query_index=jnp.pad(where.query_index, (0, pad_q), constant_values=-1),
        key_index=jnp.pad(where.key_index, (0, pad_k), constant_values=np.iinfo(np.int32).max),
        query_segment=jnp.pad(where.query_segment, ((0, 0), (0, pad_q))),
        key_segment=jnp.pad(where.key_segment, ((0, 0), (0, pad_k)), constant_values=_NO_ONE),
    )
    key, value = (jnp.pad(x, ((0, 0), (0, pad_k), (0, 0), (0, 0))) for x in (key, value))
    return _Tiles(_grouped(query, n, pad_q), key, value, where, (tile_q, tile_k))


def _one_querys_tile(keys: int, most: int = 2048) -> int:
    """Keys in a tile of a single query, as in decoding: few scores, and keys that were copied if they were padded.

    The most, up to `most`, that need no padding; 256 where fewer than that would.
    """
    for count in range(-(-keys // most), keys // 256 + 1):
        if keys % count == 0:
            return keys // count
    return min(256, keys) if keys > most else keys


def _grouped(x, n, pad):
    """(B, S, H, D) -> (B, S + pad, N, G, D)."""
    b, s, h, d = x.shape
    return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, s + pad, n, h // n, d)


def forward(query, key, value, where, *, scale, window=None, causal=True, tile=None):
    """(out (B, S, H, D) in query's dtype, lse (B, H, S) float32)."""
    b, s, h, d = query.shape
    tiles = _tiled(query, key, value, where, window, tile)
    out, lse = _forward(tiles.query, tiles.key, tiles.value, tiles.where, scale, causal, tiles.sizes)
    return out.reshape(b, -1, h, d)[:, :s], lse.reshape(b, h, -1)[..., :s]


def backward(query, key, value, where, out, lse, d_out, *, scale, window=None, causal=True, tile=None):
    """Cotangents of query, key and value."""
    b, s, h, d = query.shape
    n = key.shape[2]
    tiles = _tiled(query, key, value, where, window, tile)
    pad = tiles.query.shape[1] - s
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, pad))).reshape(b, n, h // n, s + pad)
    saved = (tiles.query, tiles.key, tiles.value, tiles.where, _grouped(out, n, pad), lse)
    d_query, d_key, d_value = _backward(scale, causal, tiles.sizes, saved, _grouped(d_out, n, pad))
    return d_query.reshape(b, -1, h, d)[:, :s], d_key[:, : key.shape[1]], d_value[:, : key.shape[1]]


def _rows(x, start, size, axis=1):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def sees(qi, ki, qs, ks, window=None, causal=True):
    """Whether queries see keys, by their indices and segments (of `Where`), all of shapes that broadcast."""
    seen = (qs == ks) | (ks == EVERYONE)
    if causal:
        seen &= ki <= qi
    if window is not None:
        seen &= (qi - ki < window) | (ks == EVERYONE)
    return seen


def _scores(q, k, where, i, j, scale, causal, tiles):
    """Tile (i, j) of the masked scores: (B, N, G, tq, tk) float32."""
    tq, tk = tiles
    qi, ki = (
        _rows(where.query_index, i * tq, tq, 0)[:, None],
        _rows(where.key_index, j * tk, tk, 0)[None],
    )
    qs = _rows(where.query_segment, i * tq, tq)[:, :, None]
    ks = _rows(where.key_segment, j * tk, tk)[:, None]
    seen = sees(qi, ki, qs, ks, where.window, causal)
    scores = scale * jnp.einsum("bqngd,bknd->bngqk", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen[:, None, None], scores, MASKED)


def _key_tiles(where, i, causal, tiles):
    """Range [first, end) of the key tiles that query tile i can see, as far as indices tell."""
    tq, tk = tiles
    count = where.key_index.shape[0] // tk
    queries = _rows(where.query_index, i * tq, tq, 0)
    lowest = where.key_index.reshape(count, tk).min(1)
    end = jnp.sum(lowest <= jnp.max(queries)) if causal else count
    if where.window is None:
        return 0, end
    first_query = jnp.min(jnp.where(queries >= 0, queries, np.iinfo(np.int32).max))
    highest = where.key_index.reshape(count, tk).max(1)
    everyone = (where.key_segment == EVERYONE).any(0).reshape(count, tk).any(1)
    return jnp.argmax((highest > first_query - where.window) | everyone), end


def _forward(query, key, value, where, scale, causal, tiles):
    b, s, n, g, d = query.shape
    tq, tk = tiles

    def queries(_, i):
        q = _rows(query, i * tq, tq)

        def keys(j, carry):
            total, top, acc = carry
            scores = _scores(q, _rows(key, j * tk, tk), where, i, j, scale, causal, tiles)
            new_top = jnp.maximum(top, scores.max(-1))
            # A row with every key masked so far has top = MASKED, where exp(0) would count the masked keys.
            weights = jnp.where(scores > MASKED / 2, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            v = _rows(value, j * tk, tk)
            part = jnp.einsum("bngqk,bknd->bngqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return total * shrink + weights.sum(-1), new_top, acc * shrink[..., None] + part

        zeros = jnp.zeros((b, n, g, tq), jnp.float32)
        start = (zeros, jnp.full_like(zeros, MASKED), jnp.zeros((b, n, g, tq, d), jnp.float32))
        total, top, acc = jax.lax.fori_loop(*_key_tiles(where, i, causal, tiles), keys, start)
        total = jnp.where(total == 0, 1.0, total)
        out = (acc / total[..., None]).astype(query.dtype)
        return None, (out.transpose(0, 3, 1, 2, 4), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(queries, None, jnp.arange(s // tq))
    out = out.transpose(1, 0, 2, 3, 4, 5).reshape(query.shape)
    return out, lse.transpose(1, 2, 3, 0, 4).reshape(b, n, g, s)


def _backward(scale, causal, tiles, saved, d_out):
    query, key, value, where, out, lse = saved
    tq, tk = tiles
    delta = jnp.einsum("bqngd,bqngd->bngq", d_out, out, preferred_element_type=jnp.float32)

    def queries(carry, i):
        q, d_o = _rows(query, i * tq, tq), _rows(d_out, i * tq, tq)
        lse_i, delta_i = (
            _rows(lse, i * tq, tq, 3)[..., None],
            _rows(delta, i * tq, tq, 3)[..., None],
        )

        def keys(j, carry):
            d_key, d_value, d_q = carry
            k, v = _rows(key, j * tk, tk), _rows(value, j * tk, tk)
            scores = _scores(q, k, where, i, j, scale, causal, tiles)
            weights = jnp.where(scores > MASKED / 2, jnp.exp(scores - lse_i), 0.0)
            d_v = jnp.einsum(
                "bngqk,bqngd->bknd",
                weights.astype(v.dtype),
                d_o,
                preferred_element_type=jnp.float32,
            )
            d_weights = jnp.einsum("bqngd,bknd->bngqk", d_o, v, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta_i) * scale).astype(q.dtype)
            d_q += jnp.einsum("bngqk,bknd->bqngd", d_scores, k, preferred_element_type=jnp.float32)
            d_k = jnp.einsum("bngqk,bqngd->bknd", d_scores, q, preferred_element_type=jnp.float32)
            return _add(d_key, d_k, j * tk), _add(d_value, d_v, j * tk), d_q

        start = (*carry, jnp.zeros(q.shape, jnp.float32))
        d_key, d_value, d_q = jax.lax.fori_loop(*_key_tiles(where, i, causal, tiles), keys, start)
        return (d_key, d_value), d_q.astype(query.dtype)

    zeros = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    (d_key, d_value), d_query = jax.lax.scan(queries, zeros, jnp.arange(query.shape[1] // tq))
    d_query = d_query.transpose(1, 0, 2, 3, 4, 5).reshape(query.shape)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype)


def _add(whole, part, start):
    """whole[:, start:start+size] += part."""
    rows = _rows(whole, start, part.shape[1]) + part
    return jax.lax.dynamic_update_slice_in_dim(whole, rows, start, 1)
