"""A Model made of three Flax modules: what turns a batch into the stream, one block, what reads the stream.

    embedder(batch) -> x (B, S, d)
    block(x, ctx, cache) -> (x, cache), the composition of its methods
      attend(x, ctx, cache) -> (x, cache) and feed_forward(x) -> x
    head(x (..., d), embedding) -> float32 logits (..., V);    `embedding`: the tokens' table, for a tied head

Their parameters lie side by side, those of the block under `layers` with the layer as axis 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.model import Batch, Context, Model, Stack, first_position, reads_stacks, scan_layers


def assemble(
    config: Any,
    embedder: nn.Module,
    block_module: Any,
    head_module: nn.Module,
    example: Mapping[str, jax.Array],
    pool: Callable[[jax.Array, Batch], jax.Array] = first_position,
    init_cache: Callable[[int, int], Any] | None = None,
) -> Model:
    """The Model; nothing is allocated.

    Args:
      config: with `num_hidden_layers`, `hidden_size` and `dtype`.
      embedder, block_module, head_module: as above.
      example: a batch of the smallest shape, to initialise with.
      pool: what stands for a whole row (see `Stack`).
      init_cache: the stack's, for models that decode.
    """

    def embed(params: tree.Params, batch: Batch, key: jax.Array | None = None):
        del key
        batch = dict(batch)
        if "tokens" in batch and batch.get("positions") is None:
            batch["positions"] = positions_of(batch["tokens"])
        rows = {name: batch[name] for name in ("positions", "segment_ids") if batch.get(name) is not None}
        return embedder.apply({"params": params}, batch), Context(rows)

    def apply(layer, *args, ctx, method=None):
        return block_module.apply({"params": layer}, *args, rngs=ctx.rngs, method=method)

    def block(layer, x, ctx, cache=None, segment="layers"):
        del segment
        return apply(layer, x, ctx, cache, ctx=ctx)

    def attend(layer, x, ctx, cache=None, segment="layers"):
        del segment
        return apply(layer, x, ctx, cache, ctx=ctx, method="attend")

    def feed_forward(layer, x, ctx, cache=None, segment="layers"):
        del segment
        return apply(layer, x, ctx=ctx, method="feed_forward"), cache

    def table(params):
        return params["embed_tokens"]["embedding"] if "embed_tokens" in params else None

    def head(params: tree.Params, x: jax.Array) -> jax.Array:
        own = {name: value for name, value in params.items() if not tree.stacked(name)}
        return head_module.apply({"params": own}, x, table(params))

    def init(key: jax.Array, params: tree.Params) -> tree.Params:
        return params or fresh(key)

    @jax.jit
    def fresh(key):
        keys = jax.random.split(key, config.num_hidden_layers + 2)
        own = dict(embedder.init(keys[0], {**example})["params"])
        x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
        ctx = Context(layer=jnp.zeros((), jnp.int32))
        layers = jax.vmap(lambda k: block_module.init(k, x, ctx)["params"])(keys[2:])
        return {**own, "layers": layers, **head_module.init(keys[1], x, table(own)).get("params", {})}

    stack = Stack(embed, reads_stacks(block), head, scan_layers, pool, (attend, feed_forward), init_cache)
    return Model(init, stack, config)


def positions_of(tokens: jax.Array) -> jax.Array:
    """0, 1, ... in every row: (B, S) int32."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


TEXT = {name: np.ones((1, 1), np.int32) for name in ("tokens", "positions")}  # an example of rows of tokens
