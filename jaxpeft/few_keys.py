"""Attention of each query to few keys: those of like codes (a product quantizer), as `spt` has it.

    code m of z (D), in M parts      the codeword c of C_m (E, D / M) with the smallest |z_m - c|_1
    kept of the keys that are seen   the L = ceil(keep K) with the most codes equal to the query's, ties to the latest
    out[q]                           the softmax of clip(scale <q, k>, -10, 10) over the kept keys, times their values

The scores of a few queries with all keys are there at a time, masked, and made again in the backward pass. Keys are
counted by their number of equal codes, M + 1 of them: nothing is sorted.

Shapes: B batch, S queries, K keys, H heads, N key-value heads (H = N * G), D head size.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import features, tree
from jaxpeft.errors import InputError
from jaxpeft.model import Context, Model
from jaxpeft.models.layers import Attention
from pallas_kernels.attention.chunked import Where, filled, sees

CLAMP = 10.0  # of scores
TILE = 64  # queries whose scores are there at a time
_again = functools.partial(jax.checkpoint, prevent_cse=False)


def distances(z: jax.Array, codebooks: jax.Array) -> jax.Array:
    """|z_m - c|_1 (..., N, G, M, E) float32 of z (..., N, G, D) and codebooks (N, M, E, D / M)."""
    parts = z.reshape(*z.shape[:-1], codebooks.shape[1], 1, -1).astype(jnp.float32)
    return jnp.sum(jnp.abs(parts - codebooks[:, None].astype(jnp.float32)), axis=-1)


def quantized(z: jax.Array, live: jax.Array, codebooks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes (B, S, N, G, M) int8, what the codebooks lose (B,) float32, a sum over live tokens of means over numbers).

    Args:
      z: (B, S, N, G, D), not differentiated.
      live: (B, S) bool.
      codebooks: (N, M, E, D / M).
    """
    shape, count = z.shape, codebooks.shape[1]
    z = jax.lax.stop_gradient(z)

    @_again
    def tile(z, live, codebooks):
        far = distances(z, codebooks)
        codes = jax.lax.stop_gradient(jnp.argmin(far, axis=-1))
        product = functools.partial(jnp.einsum, "bsngme,nmed->bsngmd", preferred_element_type=jnp.float32)
        words = codebooks.astype(z.dtype)
        hard = product(jax.nn.one_hot(codes, words.shape[2], dtype=z.dtype), words)
        soft = product(jax.nn.softmax(-far).astype(z.dtype), words)
        parts = z.reshape(hard.shape).astype(jnp.float32)
        off = jnp.mean((parts - hard) ** 2 + (soft - hard) ** 2, axis=(2, 3, 4, 5))
        return codes.astype(jnp.int8), jnp.sum(jnp.where(live, off, 0), axis=1)

    codes, lost = jax.lax.map(lambda own: tile(*own, codebooks), (_tiles(z), _tiles(live)))
    return _joined(codes, shape[1]).reshape(*shape[:4], count), jnp.sum(lost, axis=0)


def _tiles(x: jax.Array, fill: Any = 0) -> jax.Array:
    """x (B, S, ...) as (tiles, B, T, ...), the last filled up."""
    size = min(TILE, x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
    return x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)


def _joined(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_tiles`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def kept_keys(equal: jax.Array, seen: jax.Array, count: int, most: int) -> jax.Array:
    """(..., K) bool: of the seen keys the `count` with the largest `equal`, 0 to `most`; ties to the latest."""
    equal = jnp.where(seen, equal, -1)
    at_least = jnp.stack([jnp.sum(equal >= c, axis=-1) for c in range(most + 1)], axis=-1)
    edge = jnp.maximum(jnp.sum(at_least >= count, axis=-1, keepdims=True) - 1, 0)
    above, ties = equal > edge, equal == edge
    behind = jnp.cumsum(ties[..., ::-1], axis=-1, dtype=jnp.int32)[..., ::-1]
    return above | (ties & (behind <= count - jnp.sum(above, axis=-1, keepdims=True)))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Where,
    codebooks: jax.Array,
    keep: float,
    window: int | None = None,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """(attention (B, S, H, D) of each query to its kept keys, (B,) what the codebooks lose, a mean over numbers).

    Args:
      q: (B, S, H, D).  k, v: (B, K, N, D).
      where: the mask.
      codebooks: (N, M, E, D / M).
      keep: of the K keys, the share that a query reads.
      window: of all layers.
      causal: whether queries see keys before them alone.
    """
    (b, s, h, d), (length, n) = q.shape, k.shape[1:3]
    where, count = filled(where, b, s, length, window), math.ceil(keep * length)
    assert where.query_segment is not None and where.key_segment is not None
    live = (where.query_segment > 0, where.key_segment != 0)
    grouped = q.reshape(b, s, n, h // n, d)
    (of_q, lost_q), (of_k, lost_k) = (
        quantized(z, here, codebooks) for z, here in zip((grouped, k[:, :, :, None]), live, strict=True)
    )
    numbers = jnp.maximum(jnp.sum(live[0], axis=1) + jnp.sum(live[1], axis=1), 1)

    @_again  # in which keys and values are float32, so that their gradients are summed so
    def layer(q, k, v, of_q, of_k, where):
        wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)

        @_again
        def tile(own):
            q, of_q, index, segment = own
            of_keys = (where.key_index, segment[:, :, None], where.key_segment[:, None])
            seen = sees(index[:, :, None], *of_keys, where.window, causal)
            equal = sum(
                of_q[..., m].transpose(0, 2, 3, 1)[..., None]
                == of_k[:, :, :, 0, m].transpose(0, 2, 1)[:, :, None, None]
                for m in range(of_k.shape[-1])
            )
            kept = kept_keys(equal.astype(jnp.int32), seen[:, None, None], count, of_k.shape[-1])
            own_k, own_v = wide_k.astype(k.dtype), wide_v.astype(v.dtype)
            scores = jnp.einsum("btngd,bknd->bngtk", q, own_k, preferred_element_type=jnp.float32)
            weights = jnp.where(kept, jnp.exp(jnp.clip(d**-0.5 * scores, -CLAMP, CLAMP)), 0)  # no overflow
            weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), math.exp(-CLAMP))
            return jnp.einsum("bngtk,bknd->btngd", weights.astype(v.dtype), own_v)

        index = jnp.broadcast_to(where.query_index, (b, s))
        tiles = (_tiles(q), _tiles(of_q), _tiles(index, -1), _tiles(where.query_segment))
        return _joined(jax.lax.map(tile, tiles), s)

    out = layer(grouped, k, v, of_q, of_k, where).reshape(b, s, -1)
    return checkpoint_name(out, "attention").reshape(q.shape), (lost_q + lost_k) / numbers


def words(q: jax.Array, k: jax.Array, size: int) -> jax.Array:
    """Codebooks (N, M, E, D / M) of some queries (1, E, H, D), the odd ones, and keys (1, E, N, D)."""
    n, width = k.shape[2:]
    odd = (jnp.arange(k.shape[1]) % 2 == 1)[:, None, None]
    z = jnp.where(odd, q[0].reshape(*k.shape[1:3], -1, width)[:, :, 0], k[0]).astype(jnp.float32)
    return z.reshape(len(z), n, -1, size).transpose(1, 2, 0, 3)


def start(name: str, model: Model, params: tree.Params, key: jax.Array, codewords: int, size: int) -> tree.Flat:
    """{path: codebooks (L, N, M, E, D / M)} of the layers' queries and keys of random vectors; {} where there are some.

    Args:
      name: of the method, a scope of the attention's.
      model: whose layers have attention.  params: nested.
      codewords: E.  size: D / M.

    Raises:
      InputError: if there is no attention of the library, or `size` does not divide D.
    """
    if any(path.endswith(f"/{name}/codebooks") for path in tree.flatten(params)):
        return {}
    stack, found = model.stack, dict[str, jax.Array]()
    attention = stack.parts[0] if stack.parts else stack.block
    shape = (1, codewords, features.width(name, model))
    for segment, first, end in tree.segments(params):

        def asked_of(per_layer, segment=segment):
            layer, index, key = per_layer
            own: dict[str, jax.Array] = {}

            def asked(next_function, args, kwargs, context):
                if isinstance(context.module, Attention) and context.method_name == "attended":
                    q, k, *_ = args
                    if (width := q.shape[-1]) % size:
                        raise InputError(f"{name}: code_size {size} does not divide the size of a head, {width}")
                    own["/".join(context.module.path)] = words(q, k, size)
                return next_function(*args, **kwargs)

            x = jax.random.normal(key, shape).astype(model.config.dtype)
            with nn.intercept_methods(asked):
                attention(layer, x, Context(layer=index), None, segment)
            return own

        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(f"{segment}/{name}".encode())), end - first)
        each = (params[segment], jnp.arange(first, end, dtype=jnp.int32), keys)
        found |= {f"{segment}/{path}/{name}/codebooks": own for path, own in jax.lax.map(asked_of, each).items()}
    if not found:
        raise InputError(f"{name}: this model shows no attention, whose keys could be chosen; give keep=1")
    return found
