"""Keys and values in front of those of every row: what prefix tuning and prompt tuning share.

    attention(q, [K; k], [V; v])        K, V (p, N, D) per layer, N key-value heads; k, v (S, N, D)

Every query sees them, whatever its segment, its place and the layer's window; tokens are at positions p, p + 1, ...
Decoding puts them into the first p slots of the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import decoding, features
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Context, Model, Stack
from pallas_kernels.attention import EVERYONE

_TILE = 256  # of attention: a longer cache is a multiple of it, or each step would pad it


def heads_of(config: Any) -> tuple[int, int]:
    """(N, D): key-value heads and their size."""
    return getattr(config, "num_key_value_heads", config.num_attention_heads), config.head_dim


def row_bytes(config: Any, itemsize: int, length: int, **_) -> int:
    """Bytes per row of the batch that all layers keep: K and V in front of the row's keys and values, a mask."""
    n, size = heads_of(config)
    return length * (2 * config.num_hidden_layers * n * size * itemsize + 4)


class Front(NamedTuple):
    """p keys and values in front of a model's rows.

    name: the method that puts them there.
    length: p.
    room: positions that the model has; None where it counts none.
    learned: whether its positions are a table, which ends.
    """

    name: str
    length: int
    room: int | None
    learned: bool

    @classmethod
    def of(cls, name: str, model: Model, length: int) -> Front:
        """Of a model.

        Raises:
          InputError: if it shows no layers, or has no more than p positions.
        """
        features.width(name, model)
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and length >= room:
            raise InputError(f"{name}: length {length} leaves no room; the model has {room} positions")
        return cls(name, length, room, room is not None and not hasattr(model.config, "rope_theta"))

    def batch(self, batch: Batch) -> Batch:
        """With positions p, p + 1, ... where the model counts any."""
        if self.room is None:
            return batch
        positions = batch.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
        return {**batch, "positions": positions + self.length}

    def config(self, config: Any) -> Any:
        """The model's, with room for p tokens fewer."""
        return (
            config
            if self.room is None
            else dataclasses.replace(config, max_position_embeddings=self.room - self.length)
        )

    def call(
        self,
        function: Callable[..., Any],
        layer: Mapping[str, Any],
        x: jax.Array,
        ctx: Context,
        cache: Any,
        segment: str,
        own: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, Any]:
        """A layer, or a part of one, with `own` {"k", "v"} (p, N, D) in front of the keys and values of x (B, S, d).

        Raises:
          InputError: for rows that are too long, or if another method gives the layer keys of its own.
        """
        if self.learned and cache is None and x.shape[1] + self.length > (self.room or 0):
            raise InputError(
                f"{self.name}: rows of {x.shape[1]} tokens and a {self.name} of {self.length}: the model has "
                f"{self.room} positions"
            )
        own = {name: jnp.broadcast_to(leaf.astype(x.dtype), (len(x), *leaf.shape)) for name, leaf in own.items()}
        if cache is None:
            return function(layer, x, ctx, own, segment)[0], None
        if "index" not in cache:
            raise InputError(f"{self.name}: another method of the chain gives the layers keys of its own")
        return function(layer, x, ctx, decoding.in_front(cache, own["k"], own["v"]), segment)

    def cache(self, stack: Stack) -> Callable[[int, int], Any] | None:
        """`init_cache` of the stack with p slots in front, which every query sees."""
        if (empty := stack.init_cache) is None:
            return None

        def init_cache(rows, slots):
            total = slots + self.length
            cache = empty(rows, total if total <= _TILE else -(-total // _TILE) * _TILE)
            segments = cache["segment_ids"].at[..., : self.length].set(EVERYONE)
            return {**cache, "segment_ids": segments, "index": cache["index"] + self.length}

        return init_cache
