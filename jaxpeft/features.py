"""What a frozen backbone's layers say, for a network beside it.

    h_0 = embed(tokens)        h_{i+1} = block_i(h_i), i = 0 .. L - 1        all under stop_gradient

The layers run in the ordinary scan, without dropout, and write the outputs of the layers that somebody reads into one
array. Nothing in here is differentiated, so nothing else is kept and no product with a transposed kernel exists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import decoding, tree
from jaxpeft.backward.loop import num_groups
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Cache, Context, Model, Stack, nothing_before, scan_layers, takes_stacks


class Features(NamedTuple):
    """A frozen forward pass.

    embedded: h_0 (B, S, d).
    kept: (K, B, S, d), the outputs of the chosen layers in order.
    last: h_L (B, S, d).
    ctx: the context, of no layer.
    cache: the backbone's, which these layers have written; its index is still that of before. None without.
    """

    embedded: jax.Array
    kept: jax.Array
    last: jax.Array
    ctx: Context
    cache: Cache | None


def frozen_pass(
    stack: Stack,
    params: tree.Params,
    batch: Batch,
    layers: Sequence[int],
    cache: Cache | None = None,
    until: int | None = None,
) -> Features:
    """Runs a stack's embedding and layers, from which no gradient comes back.

    Args:
      stack: the functions; `run` is not called.
      params: nested parameters.
      batch: as the model takes it.
      layers: whose outputs are kept, ascending, counted from 0.
      cache: None, or the backbone's.
      until: the layer to stop before, where the stack has been cut (`tree.cut_layers`); None: all run.
    """
    x, ctx = jax.lax.stop_gradient(stack.embed(params, batch, None))
    embedded, slots = x, jnp.asarray(layers, jnp.int32)
    kept = jnp.zeros((len(layers), *x.shape), x.dtype)
    for segment, first, end in tree.segments(params):
        if until is not None and first >= until:
            break

        def step(carry, layer, index, past, segment=segment):
            x, kept = carry
            x, past = jax.lax.stop_gradient(stack.block(layer, x, ctx.at(index), past, segment))
            # Every layer writes where the next chosen one will; what comes after the last is written nowhere.
            with jax.named_scope("save:features"):
                kept = kept.at[jnp.searchsorted(slots, index)].set(x, mode="drop")
            return (x, kept), past

        frozen, stacked = jax.lax.stop_gradient(params[segment]), takes_stacks(stack.block)
        (x, kept), cache = decoding.scan(step, (x, kept), frozen, range(first, end), cache, stacked)
    return Features(embedded, kept, x, ctx, cache)


def by_rows(function: Callable[..., Any], *arrays: Any, axes: Sequence[int], tokens: int = 256) -> jax.Array:
    """function(*arrays) for a few rows at a time; each group is computed again in the backward pass.

    So what is kept is `arrays` themselves, and what the function needs in between is that of one group.

    Args:
      function: arrays of b rows -> (b, ...), each row's result its own.
      arrays: pytrees.  axes: where the rows are in each.
      tokens: of one group at most, or one row; the last axis but one of the first array is the tokens'.
    """
    first = jax.tree.leaves(arrays[0])[0]
    rows = first.shape[axes[0]]
    groups = num_groups(rows, first.shape[-2], tokens)

    def part(tree, axis, group):
        def rows_of(x):  # rows g, g + G, ...: rows that are divided over devices stay where they are
            x = x.reshape(*x.shape[:axis], rows // groups, groups, *x.shape[axis + 1 :])
            return jax.lax.dynamic_index_in_dim(x, group, axis + 1, keepdims=False)

        return jax.tree.map(rows_of, tree)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(group):
        return function(*(part(tree, axis, group) for tree, axis in zip(arrays, axes, strict=True)))

    out = jax.lax.map(one, jnp.arange(groups))
    return out.swapaxes(0, 1).reshape(rows, *out.shape[2:])


class Seen(NamedTuple):
    """What a network that reads other positions may see.

    queries, keys: segment ids (B, S), (B, C).
    first: () int32, the index of the first query among the keys.
    """

    queries: jax.Array
    keys: jax.Array
    first: jax.Array

    def mask(self, causal: bool) -> jax.Array:
        """(B, S, C) bool: keys of the query's own segment, in a causal model at its own index and before."""
        seen = (self.queries[:, :, None] == self.keys[:, None, :]) & (self.keys[:, None, :] > 0)
        if not causal:
            return seen
        index = self.first + jnp.arange(self.queries.shape[1])
        return seen & (jnp.arange(self.keys.shape[1]) <= index[:, None])


def segments_of(x: jax.Array, batch: Batch) -> jax.Array:
    """Segment ids (B, S) of the stream x (B, S, d); one segment per row where the batch has none."""
    ids = batch.get("segment_ids")
    return jnp.ones(x.shape[:2], jnp.int32) if ids is None else jnp.asarray(ids)


def segments_in(name: str, ctx: Context, x: jax.Array) -> jax.Array | None:
    """Segment ids (B, S) of the tokens x (B, S, d) of a layer, as its context has them; None where it has none.

    Raises:
      InputError: where a member of the chain in front of `name` lets the layer take a part of the tokens only.
    """
    ids = ctx.rows.get("segment_ids")
    if ids is not None and ids.shape != x.shape[:2]:
        raise InputError(
            f"{name}: a member before it takes {x.shape[1]} of {ids.shape[1]} tokens into a layer; put {name} before it"
        )
    return ids


def said_by_layers(
    name: str, who: str, otherwise: str, model: Model, params: tree.Params, batch: Batch, key: jax.Array | None
) -> tuple[Model, jax.Array]:
    """(the model after a forward pass, for the loss put around it; what its layers say under a name (L, B, n)).

    Raises:
      InputError: for a chain whose layers run so that it is lost; `who` says it, `otherwise` is what does without.
    """
    ran, _, sums = model.ran(params, batch, key)
    if not sums or name not in sums:
        raise InputError(
            f"{name}: the chain's layers run in a way that loses what {who} say; leave that method out, put {name} "
            f"behind it, or give {otherwise}"
        )
    return ran, sums[name]


def mean_of_rows(values: jax.Array, batch: Batch) -> jax.Array:
    """The mean of a number of each row (B,), as rows count in the loss: one of micro-batches is that of the batch."""
    weights = batch["weights"] if "weights" in batch else jnp.sum(batch["loss_weights"], axis=-1, dtype=jnp.float32)
    return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1e-9)


def decodes(model: Model) -> bool:
    """Whether a model is causal: whether it has a cache for decoding."""
    return model.stack.init_cache is not None


def linear(x: jax.Array, leaves: tree.Params) -> jax.Array:
    """x (..., n) times kernel (n, m) plus bias (m,), in the stream's dtype."""
    return x @ leaves["kernel"].astype(x.dtype) + leaves["bias"].astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array | float = 1.0, bias: jax.Array | float = 0.0) -> jax.Array:
    """Layer norm over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)
    return (wide * scale + bias).astype(x.dtype)


def fresh_linear(key: jax.Array, *shape: int) -> tree.Params:
    """Leaves of linear maps (..., n, m): kernels N(0, 1 / n), biases 0."""
    kernel = jax.random.normal(key, shape) / shape[-2] ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros((*shape[:-2], shape[-1]))}


def fresh_norm(*shape: int) -> tree.Params:
    """Leaves of layer norms."""
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def fresh_projections(key: jax.Array, count: int, d: int, k: int) -> tree.Params:
    """Leaves that `project` reads, for features of `count` layers."""
    return {"project": fresh_linear(key, count, d, k), "project_norm": fresh_norm(count, k)}


def project(own: tree.Params, f: jax.Array) -> jax.Array:
    """t_i = LN(P_i F_i): features F (N, B, S, d) -> (N, B, S, k), every layer by a map and a norm of its own."""
    t = jnp.einsum("nbsd,ndk->nbsk", f, own["project"]["kernel"].astype(f.dtype))
    t = t + own["project"]["bias"].astype(f.dtype)[:, None, None]
    norm = own["project_norm"]
    return layer_norm(t, norm["scale"][:, None, None], norm["bias"][:, None, None])


def count_layers(name: str, params: tree.Params) -> int:
    """L of a model's parameters.

    Raises:
      InputError: for a model that shows no layers.
    """
    if not (count := tree.count_layers(params)):
        raise InputError(f"{name}: this model shows no layers; use one of jaxpeft.models")
    return count


def width(name: str, model: Model) -> int:
    """d of a model.

    Raises:
      InputError: for a model without a configuration.
    """
    if model.config is None:
        raise InputError(f"{name}: this model shows no layers; use one of jaxpeft.models")
    return model.config.hidden_size


def divided(name: str, what: str, size: int, factor: int) -> int:
    """size / factor.

    Raises:
      InputError: if it is no whole number.
    """
    if size % factor:
        raise InputError(f"{name}: reduction {factor} does not divide the model's {what}, {size}")
    return size // factor


def check_run(name: str, model: Model) -> None:
    """Raises InputError if a `run` that is not the stack's own would be replaced: its parameters would not train."""
    if not model.stack.layered:
        raise InputError(f"{name}: this model shows no layers; use one of jaxpeft.models")
    if model.stack.run is not scan_layers:
        raise InputError(f"{name}: another method of the chain runs the layers in its own way")
    if model.stack.before is not nothing_before:
        raise InputError(f"{name}: runs the layers in its own way, and another method of the chain feeds them")


def check_settings(name: str, reduction: Any, layers: Any) -> None:
    """Raises InputError unless `reduction` is a whole number of at least 1 and `layers` None or whole numbers."""
    if not isinstance(reduction, int) or reduction < 1:
        raise InputError(f"{name}: reduction {reduction!r} should be a whole number of at least 1")
    if layers is not None and not (isinstance(layers, list | tuple) and all(isinstance(i, int) for i in layers)):
        raise InputError(f"{name}: layers {layers!r} should be a list of whole numbers, such as [0, 2, 4]")


def check_layers(name: str, layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The chosen layers, counted from 0; None: all.

    Raises:
      InputError: unless they ascend within 0 .. count - 1.
    """
    if layers is None:
        return tuple(range(count))
    chosen = tuple(layers)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= count:
        raise InputError(f"{name}: layers {list(chosen)} should ascend and lie in 0 to {count - 1}")
    return chosen


def no_merge(name: str, why: str = "its network runs beside the model"):
    """`merge` of a method that stays what it is."""

    def merge(params):
        del params
        raise InputError(f"{name}: has no merged form; {why}")

    return merge
