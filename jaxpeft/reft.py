"""Representation finetuning: a few hidden states of each layer are edited in a subspace of rank r.

    h <- h + z R^T        h (d,) at an edited position behind a layer, z (r,) a linear function of h, R (d, r)

What z and R are is in `loreft.py` and `direft.py`. Which positions are edited is a question of the prompt:

    "f7+l7"    the first 7 and the last 7 tokens of the prompt; "f7" or "l7" alone
    "all"      every token, those of the completion and those that are generated, too

A prompt of p tokens gets at most p // 2 edits at each end, so the ends never meet. While training it reaches to the
token that predicts the first one with a loss: a document's tokens up to the first with `loss_weights`. Without any, or
where a batch has no such weights, it is the whole document, as in decoding, where the pass that reads the prompts edits
them and the generated tokens are left alone. Each document of a packed row is a text of its own; padding on either side
is none. So a completion that is cut, packed or generated sees its prompt edited in one way.

Kept for the backward pass, per edited layer: h of all tokens, d numbers each, where a batch has `segment_ids`, since a
row then holds any number of documents. Without them a row is one document, and the states of its f + l positions are
gathered: (f + l) d numbers per row and nothing per token. z and R are made again.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import constraints, decoding, features, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.model import Batch, Cache, Model, reads_stacks

POSITIONS = re.compile(r"f([1-9]\d*)|l([1-9]\d*)|f([1-9]\d*)\+l([1-9]\d*)")
ENDS = ("first", "last")

Leaves = Mapping[str, jax.Array]


class Edits(NamedTuple):
    """Where the stream of a batch is edited.

    here: (B, n) bool: whether a position is.
    places: (B, n) int32, the positions; None: n = S, all of them in order.
    """

    here: jax.Array
    places: jax.Array | None = None


def parse(name: str, positions: str) -> tuple[int, int] | None:
    """(f, l) of "f7+l7"; None of "all".

    Raises:
      InputError: for any other text.
    """
    if positions == "all":
        return None
    if not isinstance(positions, str) or not (found := POSITIONS.fullmatch(positions)):
        raise InputError(f'{name}: positions {positions!r} should be "f7+l7", "f7", "l7" (numbers from 1) or "all"')
    first, last, *both = (int(number or 0) for number in found.groups())
    return (both[0] or first, both[1] or last)


def prompts(segments: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(B, S) int32 each: of every token, the first and the last index of its document's prompt.

    Args:
      segments: (B, S) int32, the documents' numbers.
      weights: (B, S) float32, above 0 where the next token counts in the loss; None: nowhere.
    """
    size = segments.shape[1]
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), segments.shape)
    edge = segments[:, 1:] != segments[:, :-1]
    opens, closes = jnp.pad(edge, ((0, 0), (1, 0)), constant_values=True), jnp.pad(edge, ((0, 0), (0, 1)))
    start = jax.lax.cummax(jnp.where(opens, index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(closes, index, size - 1), axis=1, reverse=True)
    if weights is None:
        return start, end
    counts = jax.lax.cummin(jnp.where(weights > 0, index, size), axis=1, reverse=True)
    counts = jnp.take_along_axis(counts, start, axis=1)
    return start, jnp.where(counts <= end, counts, end)


def edits(x: jax.Array, batch: Batch, first: int, last: int) -> tuple[Edits, Edits]:
    """The edits of a stream x (B, S, d) at both ends of its prompts."""
    segments, weights = features.segments_of(x, batch), batch.get("loss_weights")
    start, stop = prompts(segments, None if weights is None else jnp.asarray(weights))
    half = (stop - start + 1) // 2
    if "segment_ids" in batch or constraints.shards(*x.shape[:2])[1] > 1:
        index = jnp.arange(x.shape[1], dtype=jnp.int32)
        told = segments > 0
        return (
            Edits(told & (index - start < jnp.minimum(half, first))),
            Edits(told & (index <= stop) & (stop - index < jnp.minimum(half, last))),
        )
    stop, half = stop[:, :1], half[:, :1]
    near, far = jnp.arange(first, dtype=jnp.int32), jnp.arange(last, dtype=jnp.int32)
    return (
        Edits(near < half, jnp.broadcast_to(jnp.minimum(near, x.shape[1] - 1), (len(x), first))),
        Edits(far < half, jnp.maximum(stop - far, 0)),
    )


def joined(one: Edits, other: Edits) -> Edits:
    """The edits of both."""
    if one.places is None or other.places is None:
        return Edits(one.here | other.here)
    both = (jnp.concatenate(pair, axis=1) for pair in zip(one, other, strict=True))
    return Edits(*both)


def edited(change: Callable[[Leaves, jax.Array], jax.Array], own: Leaves, h: jax.Array, at: Edits | None) -> jax.Array:
    """h (B, S, d) plus change(own, h) at some positions; None: at all."""
    if at is None:
        return h + jax.checkpoint(change, prevent_cse=False)(own, h)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def added(own, states, here):
        return jnp.where(here[..., None], change(own, states), 0)

    if at.places is None:
        return h + added(own, h, at.here)
    states = jnp.take_along_axis(h, at.places[..., None], axis=1)
    return h.at[jnp.arange(len(h))[:, None], at.places].add(added(own, states, at.here))


def is_later_pass(cache: Cache | None) -> bool:
    """Whether the tokens of this pass come behind a prompt that has been read."""
    return cache is not None and "index" in cache and not decoding.is_empty_before(cache)


def orthonormal(x: jax.Array) -> jax.Array:
    """Q (d, r) of the QR decomposition of x (d, r) whose diagonal is positive, float32; x has rank r.

    By Cholesky's decomposition of x^T x: two products and a triangular system of r equations.
    """
    x = x.astype(jnp.float32)
    lower = jnp.linalg.cholesky(jnp.matmul(x.T, x, precision="highest"))
    return jax.scipy.linalg.solve_triangular(lower, x.T, lower=True).T


def uniform(key: jax.Array, d: int, *shape: int) -> jax.Array:
    """U(-1 / sqrt(d), 1 / sqrt(d)): the start of weights and bias of a linear map from d numbers."""
    return jax.random.uniform(key, shape, minval=-(d**-0.5), maxval=d**-0.5)


def interventions(
    name: str,
    config: Mapping[str, Any],
    change: Callable[[Leaves, jax.Array], jax.Array],
    start: Callable[[jax.Array, int], Leaves],
    *,
    rank: int,
    positions: str,
    share: bool,
    layers: Sequence[int] | None,
) -> Method:
    """The method that edits the stream behind layers.

    Args:
      name: of the method, and the scope of its parameters in a layer.
      config: what its factory was called with.
      change: (leaves of one layer, h (..., d)) -> what is added to h.
      start: (key, d) -> the leaves of one layer.
      rank: r.
      positions: see `parse`.
      share: whether both ends of a prompt have one set of leaves.
      layers: numbers of those whose output is edited, ascending; None: all.

    Raises:
      InputError: for a setting out of range. Of the model, when set up: if it shows no layers, lacks one of `layers`,
        or is narrower than `rank`. Of the data: if its first batches have no prompt of two tokens.
    """
    features.check_settings(name, 1, layers)
    if rank < 1:
        raise InputError(f"{name}: rank {rank} must be at least 1")
    counts = parse(name, positions)
    if not share and (counts is None or not all(counts)):
        raise InputError(f"{name}: share=False needs both ends of a prompt, as in f7+l7; positions is {positions}")
    scopes = () if share else ENDS

    def chosen(params):
        return features.check_layers(name, layers, features.count_layers(name, params))

    def prepare(params, view):
        own, count = chosen(params), features.count_layers(name, params)
        if counts is not None and view.batches is not None:
            check_prompts(name, positions, view.batches())
        for layer in range(1, count):
            if (layer in own) != (layer - 1 in own):
                params = tree.cut_layers(params, layer)
        return params

    def forward(model: Model, view) -> Model:
        d = features.width(name, model)
        if rank > d:
            raise InputError(f"{name}: rank {rank} is above the model's width, {d}; a subspace has at most {d}")

        def fresh(key):
            if share:
                return start(key, d)
            return {scope: start(one, d) for scope, one in zip(scopes, jax.random.split(key), strict=True)}

        def init(key, params):
            params = model.init(key, params)
            wanted = chosen(params)
            for segment, first, end in tree.segments(params):
                if first in wanted and name not in params[segment]:
                    own = jax.random.fold_in(key, zlib.crc32(f"{segment}/{name}".encode()))
                    leaves = jax.vmap(fresh)(jax.random.split(own, end - first))
                    params = {**params, segment: {**params[segment], name: leaves}}
            return params

        def embed(params, batch, key):
            x, ctx = model.stack.embed(params, batch, key)
            if counts is None:
                return x, ctx
            ends = edits(x, batch, *counts)
            return x, ctx.add(rows={name: joined(*ends) if share else dict(zip(scopes, ends, strict=True))})

        def behind(function):
            def call(layer, x, ctx, cache, segment):
                x, past = function(layer, x, ctx, cache, segment)
                if name not in layer or (counts is not None and is_later_pass(cache)):
                    return x, past
                own, at = layer[name], ctx.rows.get(name)
                if share:
                    return edited(change, own, x, at), past
                for scope in scopes:
                    x = edited(change, own[scope], x, at[scope])
                return x, past

            return reads_stacks(call, like=function)

        stack = model.stack
        parts = (*stack.parts[:-1], behind(stack.parts[-1])) if stack.parts else ()
        return model._replace(init=init, stack=stack._replace(embed=embed, block=behind(stack.block), parts=parts))

    return Method(
        prepare,
        forward,
        trains(lambda path: f"/{name}/" in path),
        merge=features.no_merge(name, "its edits depend on a token's place in the prompt"),
        specs=(Spec(name, dict(config)),),
    )


def check_prompts(name: str, positions: str, batches: Iterable[Batch]) -> None:
    """Raises InputError for batches of tokens of which no document has a prompt of two tokens: nothing is edited."""
    batch: Batch = {}
    for batch in batches:
        if "tokens" not in batch:
            return
        weights = batch.get("loss_weights")
        segments = features.segments_of(jnp.asarray(batch["tokens"]), batch)
        start, stop = prompts(segments, None if weights is None else jnp.asarray(weights))
        if jnp.any((segments > 0) & (stop > start)):
            return
    if batch:
        raise InputError(
            f"{name}: positions {positions} are of prompts, and no text of the first batches has one of two tokens; "
            "give the data prompts, or use positions=all"
        )


def block_bytes(config: Any, itemsize: int, **_) -> int:
    """Bytes per token that one edited layer keeps beyond a frozen backbone's: h."""
    return config.hidden_size * itemsize
