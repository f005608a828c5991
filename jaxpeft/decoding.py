"""The cache of keys and values that decoding carries through the layers and from token to token.

    k (L, B, N, C, D), v (L, B, N, D, C)    of all layers; C slots, the last axis of each is what its product sums over
    segment_ids (B, C) int32                of the slots: 0 where nothing is written
    index () int32                          slots that are written, and the next one

A loop over the layers carries the whole cache, writes the slots of this pass in place, and reads a layer's part where
it lies, as it reads the kernels (`pallas_kernels.stacked`): nothing of the size of a layer is copied, so a token costs
the weights once, the cache once, and one slot per layer. What a layer is given is the whole cache with its own number,
`layer` () int32.

The first pass over a text knows that it is (`index` is a number, not traced): its tokens see themselves and the slots
before `index`, where a prefix lies, and nothing of the empty ones is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from jaxpeft import host
from jaxpeft.quant import is_packed
from pallas_kernels import attention
from pallas_kernels.attention import Where
from pallas_kernels.stacked import Stacked

Cache = Mapping[str, Any]


def empty(layers: int, rows: int, slots: int, heads: int, head_size: int, dtype: Any) -> dict[str, Any]:
    """A cache with nothing in it, for key-value heads N of size D; k and v are of `dtype`."""
    return {
        "k": jnp.zeros((layers, rows, heads, slots, head_size), dtype),
        "v": jnp.zeros((layers, rows, heads, head_size, slots), dtype),
        "segment_ids": jnp.zeros((rows, slots), jnp.int32),
        "index": np.int32(0),
    }


def is_empty_before(cache: Cache) -> bool:
    """Whether it is known that nothing is written from `index` on and no text before it: a text's first pass."""
    return isinstance(cache["index"], np.integer)


def advanced(cache: Cache, tokens: int) -> dict[str, Any]:
    """The cache after a pass over so many tokens, which all layers have written."""
    return {**cache, "index": (cache["index"] + tokens).astype(np.int32)}


def scan(
    step: Callable[..., tuple[Any, Cache | None]],
    carry: Any,
    params: Any,
    numbers: Any,
    cache: Cache | None = None,
    stacked: bool = False,
) -> tuple[Any, Cache | None]:
    """The layers one after the other, in one `lax.scan`.

    Args:
      step: (carry, layer, number, cache) -> (carry, cache), where layer is of `params`, and number of `numbers`.
      carry: what goes from layer to layer.
      params: nested, stacked over layers, as everything that a layer has of its own.
      numbers: (L,) int32, the layers' in the cache.
      cache: None, or as above; each layer is told its number and may write.
      stacked: whether the layers take kernels where they lie. They get them so while there is a cache.

    Returns:
      (carry, cache).
    """
    # Counted, where they can be: XLA for GPUs fails on some loops that read them from an array.
    counted = isinstance(numbers, range) and numbers.step == 1
    numbers = jnp.arange(numbers.start, numbers.stop) if counted else jnp.asarray(numbers, jnp.int32)
    if cache is None:
        plain = lambda carry, per_layer: (step(carry, *per_layer, None)[0], None)
        return jax.lax.scan(plain, carry, (params, numbers))[0], None
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    whole = [stacked and _is_kernel(path, leaf) and not host.holds(leaf) for path, leaf in leaves]
    sliced = [None if stays else leaf for stays, (_, leaf) in zip(whole, leaves, strict=True)]
    fixed, held = {"index": cache["index"]}, {name: leaf for name, leaf in cache.items() if name != "index"}

    def body(state, per_layer):
        (carry, held), (own, place, number) = state, per_layer
        parts = [
            Stacked(leaf, place) if stays else part for stays, part, (_, leaf) in zip(whole, own, leaves, strict=True)
        ]
        carry, new = step(carry, treedef.unflatten(parts), number, {**held, **fixed, "layer": number})
        assert new is not None
        return (carry, {name: new[name] for name in held}), None

    places = jnp.arange(len(numbers), dtype=jnp.int32)
    (carry, held), _ = jax.lax.scan(body, (carry, held), (sliced, places, numbers))
    return carry, {**held, **fixed}


def _is_kernel(path: Any, leaf: Any) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel" and leaf.ndim == 3


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    where: Where,
    cache: Cache,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> tuple[jax.Array, Cache]:
    """A layer's attention with the cache: (out (B, S, H, D), the cache with this pass's slots written).

    Args:
      query: (B, S, H, D).  key, value: (B, S, N, D), of this pass.
      where: the mask of this pass's tokens alone: segments, and a window that differs by layer.
      cache: as above, with `layer`.
      scale, window, causal: as of `pallas_kernels.attention.attention`.
    """
    b, s = query.shape[:2]
    segments = where.query_segment
    if segments is None:
        segments = jnp.ones((b, s), jnp.int32)
    cache = _written(cache, key, value, segments)
    start, options = cache["index"], (scale, window, causal)
    if is_empty_before(cache):
        if start:
            key, value, where = _behind(cache, key, value, where, segments)
        return attention.attention(query, key, value, where, *options), cache
    where = where._replace(
        query_index=start + jnp.arange(s, dtype=jnp.int32),
        key_index=jnp.arange(cache["k"].shape[3], dtype=jnp.int32),
        query_segment=segments,
        key_segment=cache["segment_ids"],
    )
    if s == 1:
        return attention.of_cache(query, cache["k"], cache["v"], cache["layer"], where, *options), cache
    k, v = (jax.lax.dynamic_index_in_dim(cache[name], cache["layer"], keepdims=False) for name in "kv")
    k, v = k.swapaxes(1, 2).astype(key.dtype), v.transpose(0, 3, 1, 2).astype(value.dtype)
    return attention.attention(query, k, v, where, *options), cache


def in_front(cache: Cache, key: jax.Array, value: jax.Array) -> dict[str, Any]:
    """A layer's cache with keys and values (B, P, N, D) in its first slots."""
    return {**cache, **_put(cache, key, value, 0)}


def _put(cache: Cache, key: jax.Array, value: jax.Array, start: Any) -> dict[str, jax.Array]:
    """k and v with (B, S, N, D) from slot `start` on, in the layer's part."""
    layer, update = cache["layer"], jax.lax.dynamic_update_slice
    k, v = key.swapaxes(1, 2)[None].astype(cache["k"].dtype), value.transpose(0, 2, 3, 1)[None].astype(cache["v"].dtype)
    return {
        "k": _as_kept(update(cache["k"], k, (layer, 0, 0, start, 0))),
        "v": _as_kept(update(cache["v"], v, (layer, 0, 0, 0, start))),
    }


def _as_kept(x: jax.Array) -> jax.Array:
    """x laid out by its axes on a GPU: what comes from the projections may not lay the cache out as it lies itself."""
    by_axes = Layout(tuple(range(x.ndim)))
    return jax.lax.platform_dependent(x, cuda=lambda x: with_layout_constraint(x, by_axes), default=lambda x: x)


def _written(cache: Cache, key: jax.Array, value: jax.Array, segments: jax.Array) -> dict[str, Any]:
    start = cache["index"]
    own = jax.lax.dynamic_update_slice(cache["segment_ids"], segments, (0, start))
    return {**cache, **_put(cache, key, value, start), "segment_ids": own}


def _behind(cache: Cache, key: jax.Array, value: jax.Array, where: Where, segments: jax.Array):
    """Keys, values and mask of a first pass with those of the slots before it."""
    count, s = int(cache["index"]), key.shape[1]
    k, v = (jax.lax.dynamic_index_in_dim(cache[name], cache["layer"], keepdims=False) for name in "kv")
    k, v = k[:, :, :count].swapaxes(1, 2), v[..., :count].transpose(0, 3, 1, 2)
    index = jnp.arange(count + s, dtype=jnp.int32)
    where = where._replace(
        query_index=index[count:],
        key_index=index,
        query_segment=segments,
        key_segment=jnp.concatenate([cache["segment_ids"][:, :count], segments], axis=1),
    )
    join = lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1)
    return join(k, key), join(v, value), where
