"""Trained embeddings in front of every row of a causal model: what prompt tuning and DePT share.

    [P; E[tokens]]        P (p, d) trained; tokens are at positions p, p + 1, ...

In a causal model the prompt's states depend on nothing behind it, and are those of every row. So they are computed once
per batch: layer by layer (`Stack.before`), from p embeddings at positions 0 .. p - 1, and what each layer makes of them
as keys and values stands in front of those of its rows (`jaxpeft.in_front`). The stream keeps its length.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import features, tree
from jaxpeft.errors import InputError
from jaxpeft.in_front import Front
from jaxpeft.model import Batch, Context, Model, Stack, last_position, reads_stacks
from jaxpeft.models.layers import lookup, with_inner

INITS = ("vocabulary", "text", "random")
Start = Callable[[jax.Array, tree.Params], jax.Array]  # (key, the model's parameters) -> P (p, d)
Begin = Callable[[jax.Array, tree.Params], tree.Params]  # (key, the model's parameters) -> leaves
Words = Callable[[Any, tree.Params, Batch], Any]  # (table, leaves, batch) -> table


@functools.partial(jax.tree_util.register_dataclass, data_fields=("table", "rows"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class _Prompt:
    """In place of a model's table of words (V, d): one whose words are the rows (p, d) of a prompt."""

    table: Any
    rows: Any


@lookup.register
def _(table: _Prompt, ids: jax.Array) -> jax.Array:
    return lookup(table.rows, ids)


@with_inner.register
def _(table: _Prompt, change: Callable[[Any], Any]) -> _Prompt:
    return dataclasses.replace(table, table=change(table.table))


def check(name: str, length: int, init: str, text: str, tokenizer: str) -> None:
    """Raises InputError for a setting out of range, or settings that do not go together."""
    if length < 1:
        raise InputError(f"{name}: length {length} must be at least 1")
    if init not in INITS:
        raise InputError(f"{name}: init {init!r} is not one of {', '.join(INITS)}")
    for key, value, what in (("text", text, "words to start from"), ("tokenizer", tokenizer, "a folder or hub id")):
        if init == "text" and not value:
            raise InputError(f"{name}: init=text needs a {key}: {what}")
        if init != "text" and value:
            raise InputError(f"{name}: {key} {value!r} is of init=text; here init is {init}")


def start(name: str, length: int, init: str, text: str, tokenizer: str) -> Start:
    """Where a prompt starts: at words, drawn or of a text, or at N(0, 1).

    Raises:
      InputError: when called, for a text without tokens, or with one that the model does not know.
    """

    def of_words(key, params):
        table = params["embed_tokens"]["embedding"]
        if init == "random":
            return jax.random.normal(key, (length, table.shape[1]))
        ids = jax.random.randint(key, (length,), 0, len(table))
        if init == "text":
            from jaxpeft import hf  # for which this package is one of many

            found = np.asarray(hf.load_tokenizer(tokenizer)(text)["input_ids"], np.int32)
            if not found.size:
                raise InputError(f"{name}: text {text!r} has no tokens")
            if found.max() >= len(table):
                raise InputError(
                    f"{name}: tokenizer {tokenizer}: token {found.max()} of the text; the model has {len(table)} words"
                )
            ids = np.resize(found, length)  # cut, or repeated
        return jnp.take(table, ids, axis=0).astype(jnp.float32)

    return of_words


def attach(name: str, model: Model, length: int, begin: Begin, words: Words | None = None) -> Model:
    """The model behind a prompt.

    Args:
      name: the method; its leaves are `<name>/embedding` (p, d) and what else `begin` gives.
      model: a decoder.
      length: p.
      begin: where the leaves start.
      words: what stands in place of the model's table of words, for tokens; None: that table.

    Returns:
      A model that has room for p tokens fewer.

    Raises:
      InputError: if the model shows no layers, has no more than p positions, reads rows in both directions, or if
        another method of the chain runs its layers or feeds them.
    """
    front = Front.of(name, model, length)
    features.check_run(name, model)
    if model.stack.pool is not last_position:
        raise InputError(
            f"{name}: {model.config.model_type} is an encoder, whose prompt would read each row; use prefix"
        )

    def init(key, params):
        params = model.init(key, params)
        if name in params:
            return params
        return {**params, name: begin(jax.random.fold_in(key, zlib.crc32(name.encode())), params)}

    def embed(params, batch, key):
        table, own = params["embed_tokens"]["embedding"], params[name]
        places = jnp.arange(length, dtype=jnp.int32)[None]
        of = {"tokens": places, "positions": places}
        prompt, of_prompt = model.stack.embed(with_table(params, _Prompt(table, own["embedding"])), of, None)
        params = params if words is None else with_table(params, words(table, own, batch))
        x, ctx = model.stack.embed(params, front.batch(batch), key)
        return x, ctx.add(shared={name: {"x": prompt, "rows": of_prompt.rows}})

    def behind(function):
        def call(layer, x, ctx, cache, segment):
            if name not in layer:  # the prompt itself, or tokens behind a first pass
                return function(layer, x, ctx, cache, segment)
            own = {leaf: value for leaf, value in layer.items() if leaf != name}
            return front.call(function, own, x, ctx, cache, segment, layer[name])

        return reads_stacks(call, like=function)

    stack = model.stack.map_layers(behind)._replace(
        embed=embed, init_cache=front.cache(model.stack), before=functools.partial(_before, name)
    )
    return model._replace(init=init, stack=stack, config=front.config(model.config))


def with_table(params: tree.Params, table: Any) -> tree.Params:
    """Nested parameters with another table of words."""
    return {**params, "embed_tokens": {**params["embed_tokens"], "embedding": table}}


def _before(
    name: str, stack: Stack, params: tree.Params, ctx: Context, key: jax.Array | None
) -> tuple[tree.Params, Context]:
    """The parameters with `<segment>/<name>/k` and `/v` (L, p, N, D), which the layers make of the prompt.

    What is kept for the backward pass is the prompt's stream in front of each layer, (L, p, d). On a mesh the kernels
    are read where they lie: over `fsdp` p tokens are summed up, and no kernel is gathered but for the rows.
    """
    shared = {other: value for other, value in ctx.shared.items() if other != name}
    x, own = ctx.shared[name]["x"], Context(ctx.shared[name]["rows"], shared)
    for segment, first, end in tree.segments(params):

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x, per_layer, segment=segment):
            layer, index = per_layer
            x, seen = stack.block(layer, x, own.at(index, key), {}, segment)
            assert seen is not None
            return x, {name: seen[name][0] for name in ("k", "v")}

        x, made = jax.lax.scan(layer, x, (params[segment], jnp.arange(first, end)))
        params = {**params, segment: {**params[segment], name: made}}
    return params, ctx._replace(shared=shared)
