"""The pure-function view of a model, and the stack that methods act on.

A model is a stack: `embed`, one `block` whose parameters are stacked over layers, `head`.

    logits = head(params, run(stack, params, batch))        run = scan over layers by default

Methods change a stack by replacing its functions: adapters wrap `block`, prompts wrap `embed`, a reversible or a side
network replaces `run`, a memory plan (`jaxpeft.backward.residuals`) too. As `run` takes the stack that it runs, these
changes compose in any order. A Flax module of any other shape is a stack with no layers (`jaxpeft.linen.from_linen`,
`jaxpeft.nnx.from_nnx`).

What a layer is told beside its parameters and the stream travels in a `Context`, a pytree, which says of everything
whether it has rows: a loop that takes a few rows at a time divides those and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpeft import constraints, decoding, tree

Batch = Mapping[str, jax.Array]
Cache = Mapping[str, jax.Array]
Sums = Mapping[str, jax.Array]


def last_position(x: jax.Array, batch: Batch) -> jax.Array:
    """x (B, S, d) at each row's last token that is not padding, (B, d): what has seen the row in a causal model."""
    chex.assert_rank(x, 3)
    segments = batch.get("segment_ids")
    if segments is None:
        return x[:, -1]
    chex.assert_shape(segments, x.shape[:2])
    last = x.shape[1] - 1 - jnp.argmax(jnp.flip(segments > 0, axis=1), axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def first_position(x: jax.Array, batch: Batch) -> jax.Array:
    """x (B, S, d) at each row's first token, (B, d): [CLS]."""
    del batch
    return x[:, 0]


def reads_stacks(block: Callable[..., Any], like: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function, marked as one that takes a layer's frozen kernels where they lie (`pallas_kernels.stacked`).

    It may do nothing with its layer's parameters but hand them on to modules whose products read them, as
    `models.layers.Dense` does. A function around a block is not marked, and gets plain arrays, unless it marks itself.

    Args:
      block: to be marked.
      like: marks `block` only if this one is marked.
    """
    if like is None or takes_stacks(like):
        block.reads_stacks = True  # type: ignore[attr-defined]
    return block


def takes_stacks(block: Callable[..., Any]) -> bool:
    """Whether `reads_stacks` has marked a block."""
    return getattr(block, "reads_stacks", False)


def by_token(part: Callable[..., Any]) -> Callable[..., Any]:
    """A stack's part, marked as one that takes tokens one by one: what it gives of a token follows from that token.

    A function around a part is not marked unless it marks itself (`marked_as`).
    """
    part.by_token = True  # type: ignore[attr-defined]
    return part


def takes_by_token(part: Callable[..., Any]) -> bool:
    """Whether `by_token` has marked a part."""
    return getattr(part, "by_token", False)


def marked_as(function: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """A function around a block or part, which reads nothing in a way of its own, with the marks of the inner one."""
    function = reads_stacks(function, like=inner)
    return by_token(function) if takes_by_token(inner) else function


def through_blocks(run: Callable[..., Any]) -> Callable[..., Any]:
    """The `run` of a stack, marked as one that reads layers' parameters in no other way than through `block`."""
    run.through_blocks = True  # type: ignore[attr-defined]
    return run


def runs_through_blocks(run: Callable[..., Any]) -> bool:
    """Whether `through_blocks` has marked a `run`: what changes parameters may do so inside the block."""
    return getattr(run, "through_blocks", False)


class Context(NamedTuple):
    """What one forward pass tells its layers; `embed` makes it, methods add to it.

    rows: {name: pytree of arrays with leading axis B}: what belongs to the rows of the batch. Of the models:
      positions (B, S) int32; segment_ids (B, S) int32, absent where each row is one segment; rotary tables.
    shared: {name: pytree of arrays}: what all rows share, of any shape: window sizes. It may be differentiated.
    layer: () int32, this layer's number; None outside the layers.
    key: PRNG key of this layer; None without dropout.
    """

    rows: dict[str, Any] = {}  # noqa: RUF012 - never changed in place
    shared: dict[str, Any] = {}  # noqa: RUF012
    layer: Any = None
    key: Any = None

    def at(self, layer: Any, key: jax.Array | None = None) -> Context:
        """The context of a layer; `key` is that of the forward pass, of which layer i gets `fold_in(key, i)`."""
        return self._replace(layer=layer, key=None if key is None else jax.random.fold_in(key, layer))

    def add(self, rows: Mapping[str, Any] | None = None, shared: Mapping[str, Any] | None = None) -> Context:
        """With more entries."""
        return self._replace(rows={**self.rows, **(rows or {})}, shared={**self.shared, **(shared or {})})

    @property
    def rngs(self) -> dict[str, jax.Array]:
        """For `apply` of a Flax module."""
        return {} if self.key is None else {"dropout": self.key}


def nothing_before(
    stack: Stack, params: tree.Params, ctx: Context, key: jax.Array | None = None
) -> tuple[tree.Params, Context]:
    """`before` of a stack whose layers read no more than their parameters, the stream and what `embed` says."""
    del stack, key
    return params, ctx


class Stack(NamedTuple):
    """A model as the functions that methods see.

    embed: (params, batch, key) -> (x, ctx)                     x (B, S, d) in the compute dtype
    block: (layer, x, ctx, cache, segment) -> (x, cache)        one layer's parameters; None or the cache. Without one
      what the layer says beside the stream (`sums`) is in its place, or None
    head:  (params, x) -> logits float32 (..., V)               final norm and unembedding, for any leading axes
    run:   (stack, params, batch, key, cache) -> (x, cache)     embed and all layers; without a cache, what these say:
      {name: (L, B, n) float32}, or None
    pool:  (x, batch) -> (B, d)                                 what stands for a whole row where rows are classified
    parts: functions like `block` that make it up, one after the other, cut at its residual connections: attention, MLP;
      () where a method has changed `block` in a way that has no parts
    init_cache: (rows, length) -> an empty cache for decoding, a pytree that `run` takes and gives back; None where the
      model does not decode
    frozen_layers: whether `run` differentiates nothing of the layers' parameters
    layered: whether there are layers; otherwise all of the model is in `embed`
    before: (stack, params, ctx, key) -> (params, ctx), once per batch between `embed` and the layers (`entered`): adds
      what the layers read that the layers make, such as a prompt's keys and values; `stack` is the one that runs
    sums: ((name, n), ...), what each layer says beside the stream, for a loss (`Model.ran`): {name: (B, n) float32}, n
      numbers of each row of the batch, which follow from that row alone
    """

    embed: Callable[..., tuple[jax.Array, Context]]
    block: Callable[..., tuple[jax.Array, Cache | None]]
    head: Callable[[tree.Params, jax.Array], jax.Array]
    run: Callable[..., tuple[jax.Array, Cache | None]]
    pool: Callable[[jax.Array, Batch], jax.Array] = last_position
    parts: tuple[Callable[..., tuple[jax.Array, Cache | None]], ...] = ()
    init_cache: Callable[[int, int], Cache] | None = None
    frozen_layers: bool = False
    layered: bool = True
    before: Callable[..., tuple[tree.Params, Context]] = nothing_before
    sums: tuple[tuple[str, int], ...] = ()

    def map_layers(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Stack:
        """The stack with `block` and each of its parts replaced by `wrap` of it."""
        return self._replace(block=wrap(self.block), parts=tuple(wrap(part) for part in self.parts))


class Model(NamedTuple):
    """A pure-function model.

    init: (key, params) -> params; creates whatever the model needs and `params` lacks, and keeps the rest.
      `init(key, {})` is a freshly initialised model; given pretrained parameters an adapted model adds its adapters.
    stack: the functions that compute it.
    config: the family's frozen configuration, or None.
    base: of an adapted model, the model before any method.
    adopt: params -> params as this library keeps them: without boxes, kernels as matrices; what is so already stays.
    shapes: () -> {path: shape and dtype} of the parameters of a model that has no configuration; None for one that has.
    axes: () -> {path: names of its axes} of the parameters to which a module of one's own gives such names, for whoever
      places them on a mesh; nothing here reads them.
    methods: the names of the methods that `setup` has put on it.
    """

    init: Callable[[jax.Array, tree.Params], tree.Params]
    stack: Stack
    config: Any = None
    base: Model | None = None
    adopt: Callable[[tree.Params], tree.Params] = dict
    shapes: Callable[[], tree.Flat] | None = None
    axes: Callable[[], dict[str, PartitionSpec]] = dict
    methods: tuple[str, ...] = ()

    def hidden(self, params: tree.Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """The stream after the last layer, (B, S, d); `head` turns it, or a part of it, into logits.

        `key=None` is deterministic; otherwise it seeds dropout.
        """
        return self.stack.run(self.stack, params, batch, key, None)[0]

    def ran(
        self, params: tree.Params, batch: Batch, key: jax.Array | None = None
    ) -> tuple[Model, jax.Array, Sums | None]:
        """(the model with a forward pass behind it, its `hidden`, what its layers have said beside the stream).

        That model's `run` gives this pass's results, so that a loss which reads them, and the loss that it is put
        around, take one pass.
        """
        x, sums = self.stack.run(self.stack, params, batch, key, None)
        return self._replace(stack=self.stack._replace(run=lambda *_: (x, sums))), x, sums

    def head(self, params: tree.Params, x: jax.Array) -> jax.Array:
        """(..., d) -> float32 logits (..., V)."""
        return self.stack.head(params, x)

    def apply(self, params: tree.Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """The whole forward pass: float32 logits (B, S, V)."""
        return self.head(params, self.hidden(params, batch, key))

    def classify(self, params: tree.Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Float32 logits (B, labels), one row's each; for a model whose head is a classifier."""
        return self.head(params, self.stack.pool(self.hidden(params, batch, key), batch))


def entered(
    stack: Stack, params: tree.Params, batch: Batch, key: jax.Array | None = None, cache: Cache | None = None
) -> tuple[jax.Array, Context, tree.Params]:
    """(x, ctx, params) as the first layer gets them: `embed`, and `before` in a text's first pass."""
    x, ctx = stack.embed(params, batch, key)
    if cache is None or decoding.is_empty_before(cache):
        params, ctx = stack.before(stack, params, ctx, key)
    return constraints.rows(x), ctx, params


@through_blocks
def scan_layers(
    stack: Stack,
    params: tree.Params,
    batch: Batch,
    key: jax.Array | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """`run` of an ordinary stack: one `lax.scan` per segment, so that compile time does not grow with depth.

    Args:
      stack: the functions.
      params: nested parameters.
      batch: dict of (B, S) arrays.
      key: PRNG key for dropout, or None; layer i gets `fold_in(key, i)`.
      cache: None, or what `init_cache` makes (see `jaxpeft.decoding`), which comes back with this pass's tokens; in its
        place, without one, what the layers say beside the stream.
    """
    x, ctx, params = entered(stack, params, batch, key, cache)
    said: list[Sums | None] = []
    for segment, first, end in tree.segments(params):

        def step(x, layer, index, past, segment=segment):
            x, past = stack.block(constraints.gathered(layer, segment), x, ctx.at(index, key), past, segment)
            return constraints.rows(x), past

        if cache is None:
            layers = (params[segment], jnp.arange(first, end, dtype=jnp.int32))
            x, sums = jax.lax.scan(lambda x, layer, step=step: step(x, *layer, None), x, layers)
            said.append(sums)
        else:
            x, cache = decoding.scan(step, x, params[segment], range(first, end), cache, takes_stacks(stack.block))
    return x, joined(said) if cache is None else decoding.advanced(cache, x.shape[1])


def joined(said: Sequence[Sums | None]) -> Sums | None:
    """What the layers of all segments have said, one after the other; None if they have said nothing."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *said) if said else None


def opaque(apply: Callable[..., Any]) -> Stack:
    """A model without visible layers: everything happens in `embed`."""

    def embed(params, batch, key):
        return apply(params, batch, key), Context()

    def block(layer, x, ctx, cache, segment):
        raise NotImplementedError("this model shows no layers; methods on the stack need one of jaxpeft.models")

    def run(stack, params, batch, key=None, cache=None):
        if cache is not None:
            raise NotImplementedError("this model has no key-value cache")
        return stack.embed(params, batch, key)[0], None

    return Stack(embed, block, head=lambda params, x: x, run=run, layered=False)
