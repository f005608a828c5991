"""LeMo: in each layer only the tokens that carry information take part; the others pass it by in the stream.

    blocks of c tokens that follow one another, N = ceil(S / c) of a row;  x_b the mean of a block's tokens
    s_b   = sum over heads, mean over blocks a that see b, of max(0, <q(x_a), k(x_b)> / sqrt(D))
    T     = the ceil(keep N) blocks with the largest s_b, in their order
    y[T]  = layer(x[T])            y = x elsewhere

q and k are the layer's own, norm, adapters and rotary positions too, asked for N vectors in place of S tokens; nothing
of it is differentiated. A token takes its position, its document and what belongs to its row along, and sees of those
that are kept what it sees of all: a packed row's documents stay apart. Blocks of nothing but padding are kept last.
Each layer decides anew, so that a token which one layer drops the next may take.

Only a training step drops: without its key the model is whole, so evaluation and decoding are those of the model. A
small pretrained model misses what it drops: the tests' own, of four layers, starts at a loss of 12 in place of 5 with
half of the tokens, at 6 with nine of ten.

Kept for the backward pass: of what a layer keeps of each token, that of `keep` of the tokens, and N integers per row.
So it is with plain autodiff. A plan keeps the stream in front of each layer whole: with `matmuls` all else is of T,
with `blocks` there is nothing else, and as much is kept as without dropping; what one layer works on is less.

Paper: Wang et al. 2025, "LeMo: Enabling Less Token Involvement for More Context Fine-tuning", arXiv:2501.09767;
Jenga, its published system (USENIX ATC 2025). Deviations: a share of the tokens that is the same in each layer, where
the paper has a threshold for each layer's scores, tuned by finite differences: shapes are static here. The scores of
blocks are those of the model's own queries and keys at their mean tokens, where the paper trains small networks to
tell the largest score within a block. It sums over a (`score="sum"`), which in a causal row favours the first tokens,
seen by all, and the tests' model loses more by it. Its loss by segments of the sequence is the library's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import constraints
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, TRAINED, Method, Spec, View, about
from jaxpeft.methods import full as _full
from jaxpeft.model import Batch, Context, Model, reads_stacks
from jaxpeft.models.layers import Attention, rotate

SCORES = ("mean", "sum")
_OF_TOKENS = ("positions", "segment_ids", "rotary")  # of a context's rows, those with an axis of tokens


def lemo(keep: float = 0.5, block: int = 64, score: str = "mean", which: str = "all") -> Method:
    """LeMo on the layers of the model, as the members of the chain before it have changed them.

    Args:
      keep: of each row's blocks, the share that takes part in a layer.
      block: c, tokens that are kept or dropped together; rows of no more are whole.
      score: over the blocks that see a block, the "mean", or the "sum".
      which: alone: what trains, as in `full`: "all", "biases", "norms", "last:K" or a regular expression.

    Returns:
      The method, a modifier: `lemo+lora`, `lemo+full`. It adds no leaf.

    Raises:
      InputError: for a share outside (0, 1], a block below 1, an unknown score, what `full` refuses, a model that shows
        no layers, or a chain whose layers run in a way of their own. When a step is traced: for a member before it that
        tells layers where tokens are, or rows longer than a layer's window.
    """
    config = dict(locals())
    if not 0 < keep <= 1:
        raise InputError(f"lemo: keep {keep} must be above 0 and at most 1")
    if block < 1:
        raise InputError(f"lemo: block {block} must be at least 1")
    if score not in SCORES:
        raise InputError(f"lemo: score {score!r} is not one of {', '.join(SCORES)}")
    weights = _full.full(which)

    def forward(model: Model, view: View) -> Model:
        if not model.stack.layered:
            raise InputError("lemo: this model shows no layers, which tokens could pass by; use one of jaxpeft.models")
        if own := [spec.name for spec in view.specs if about(spec.name).promises.layer_bytes]:
            raise InputError(f"lemo: {own[0]} runs the layers in a way of its own; leave one of them out")
        inner = model.stack

        def embed(params, batch: Batch, key=None):
            x, ctx = inner.embed(params, batch, key)
            if key is not None:
                _check_rows(ctx)
            return x, ctx

        def layer(layer, x, ctx, cache, segment):
            decides = ctx.key is not None and (cache is None or _in_front(cache))
            count = -(-x.shape[1] // block)
            kept = -int(-keep * count // 1)
            if not decides or kept == count:
                return inner.block(layer, x, ctx, cache, segment)
            _check_window(model.config, x.shape[1])
            live = live_tokens(x, ctx)
            attend = inner.parts[0] if inner.parts else inner.block
            own, still = jax.lax.stop_gradient((layer, x))
            found = scores(attend, own, still, ctx, segment, live, block, score)
            index = checkpoint_name(jnp.sort(jax.lax.top_k(found, kept)[1]), "kept_blocks")
            few = Context(_rows(ctx.rows, index, live, block), ctx.shared, ctx.layer, ctx.key)
            y, past = inner.block(layer, constraints.rows(taken(x, index, block)), few, cache, segment)
            return put(x, y, index, block), past

        block_of = reads_stacks(layer, like=inner.block)
        return model._replace(stack=inner._replace(embed=embed, block=block_of, parts=()))

    return Method(
        prepare=weights.prepare,
        forward=forward,
        merge=weights.merge_own,
        specs=(Spec("lemo", config),),
        alone=lambda path: TRAINED if weights.trainable(path) else FROZEN,
    )


# What is refused.


def _check_rows(ctx: Context) -> None:
    for name, leaves in ctx.rows.items():
        if name not in _OF_TOKENS and any(leaf.ndim > 1 for leaf in jax.tree.leaves(leaves)):
            raise InputError(f"lemo: {name} is before it and tells layers where tokens are; put it behind: lemo+{name}")


def _check_window(config: Any, length: int) -> None:
    windows = getattr(config, "windows", None)
    if windows is not None and min(windows) < length:
        raise InputError(
            f"lemo: rows of {length} tokens, of which a layer sees {min(windows)} behind it, dropped ones not counted; "
            f"use rows of at most {min(windows)}"
        )


def _in_front(cache: Mapping[str, Any]) -> bool:
    """Whether a cache is keys and values in front of the row's, that all of it sees."""
    return cache.keys() == {"k", "v"}


# Blocks of a row. An array has them as (B, N, c, ...), the last filled up.

# Of different blocks, all of which are there: no masks of those that are not are kept.
_INDEXING: dict[str, Any] = {"mode": "promise_in_bounds", "unique_indices": True, "indices_are_sorted": True}


def blocks(x: jax.Array, size: int) -> jax.Array:
    """x (B, S, ...) as (B, N, c, ...), filled up with zeros."""
    count = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(x.shape[0], count, size, *x.shape[2:])


def taken(x: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """The tokens (B, k c, ...) of blocks `index` (B, k) of x (B, S, ...)."""
    by_block = blocks(x, size)
    found = jax.vmap(lambda own, i: own.at[i].get(**_INDEXING))(by_block, index)
    return found.reshape(len(x), -1, *x.shape[2:])


def put(x: jax.Array, part: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """x (B, S, d) with `part` (B, k c, d) in the place of blocks `index`."""
    by_block = blocks(x, size)
    parts = part.reshape(*index.shape, *by_block.shape[2:])
    whole = jax.vmap(lambda whole, part, i: whole.at[i].set(part, **_INDEXING))(by_block, parts, index)
    return whole.reshape(len(x), -1, *x.shape[2:])[:, : x.shape[1]]


def _rows(rows: Mapping[str, Any], index: jax.Array, live: jax.Array, size: int) -> dict[str, Any]:
    """What belongs to rows, of the blocks that are kept."""
    of_tokens = {name: rows[name] for name in _OF_TOKENS if name in rows}
    if "segment_ids" not in rows and live.shape[1] % size:  # what fills the last block up is seen by nothing
        of_tokens["segment_ids"] = live.astype(jnp.int32)
    return {**_of_rows(rows), **jax.tree.map(lambda leaf: taken(leaf, index, size), of_tokens)}


def _of_rows(rows: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to rows and has no axis of tokens; what members behind it tell of tokens, it does not read."""
    return {name: leaves for name, leaves in rows.items() if all(x.ndim == 1 for x in jax.tree.leaves(leaves))}


def live_tokens(x: jax.Array, ctx: Context) -> jax.Array:
    """(B, S) bool: what is no padding."""
    segments = ctx.rows.get("segment_ids")
    return jnp.ones(x.shape[:2], bool) if segments is None else segments > 0


# Scores.


class _Asked:
    """Queries and keys of the attention that runs: an interceptor of Flax modules.

    found: name of a module -> what it gave last.
    """

    def __init__(self):
        self.found: dict[str, jax.Array] = {}
        self.attention: Any = None

    def __call__(self, next_function, args, kwargs, context):
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            self.attention = context.module
        y = next_function(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name:
            self.found[context.module.name] = y
        return y

    def heads(self, which: str) -> jax.Array:
        """(B, N, H, D) of "q" or "k", before positions."""
        y = self.found.get(f"{which}_norm", self.found[f"{which}_proj"])
        return y.reshape(*y.shape[:2], -1, self.attention.head_dim)


def scores(
    attend: Callable[..., Any],
    layer: Any,
    x: jax.Array,
    ctx: Context,
    segment: str,
    live: jax.Array,
    size: int,
    score: str = "mean",
) -> jax.Array:
    """s (B, N) float32 of a row's blocks, -inf of those that are padding.

    Args:
      attend: (layer, x, ctx, cache, segment), with the layer's attention.
      layer: the layer's parameters.
      x: (B, S, d).
      ctx: as the layer's.
      segment: likewise.
      live: (B, S) bool.
      size: c.
      score: one of SCORES.
    """
    here = blocks(live, size)
    count = jnp.sum(here, axis=2)
    weights = here.astype(x.dtype)[..., None]
    means = jnp.sum(blocks(x, size) * weights, axis=2, dtype=jnp.float32) / jnp.maximum(count, 1)[..., None]
    rotary = {name: blocks(table, size)[:, :, 0] for name, table in ctx.rows.get("rotary", {}).items()}
    rows = {**_of_rows(ctx.rows), **({"rotary": rotary} if rotary else {})}
    asked = _Asked()
    with nn.intercept_methods(asked):
        attend(layer, means.astype(x.dtype), Context(rows, ctx.shared, ctx.layer, ctx.key), None, segment)
    q, k = (rotate(y, rotary) if rotary else y for y in map(asked.heads, "qk"))
    q = q.reshape(*k.shape[:3], -1, k.shape[-1])  # heads by the key-value head that they read
    products = jnp.einsum("banhd,bcnd->bnhac", q, k, preferred_element_type=jnp.float32)
    sees = seen(blocks(segments_of(ctx, live), size), here, asked.attention.causal)
    positive = jnp.where(sees[:, None, None], jnp.maximum(products, 0), 0)
    total = jnp.sum(positive, axis=(1, 2, 3)) * k.shape[-1] ** -0.5
    if score == "mean":
        total = total / jnp.maximum(jnp.sum(sees, axis=1), 1)
    return jnp.where(count > 0, total, -jnp.inf)


def segments_of(ctx: Context, live: jax.Array) -> jax.Array:
    """(B, S) int32, which document of the row."""
    return ctx.rows.get("segment_ids", live.astype(jnp.int32))


def seen(segments: jax.Array, here: jax.Array, causal: bool) -> jax.Array:
    """(B, N, N) bool: whether a token of block a may see one of block b, by the first and last document of each.

    Args:
      segments: (B, N, c) int32.
      here: (B, N, c) bool, what is no padding.
      causal: whether b has to be a or before it.
    """
    most = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(here, segments, most), axis=2)
    last = jnp.max(jnp.where(here, segments, 0), axis=2)
    share = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
    share &= (last[:, :, None] > 0) & (last[:, None, :] > 0)
    return share & jnp.tri(here.shape[1], dtype=bool) if causal else share


ABOUT = About(
    summary="in each layer only the tokens that carry information, the others pass it by",
    level="stack",
    trains="all parameters, or what is chained to it",
    saves="of what layers keep of each token that of all but `keep` of them; not the stream that a plan keeps",
    reference="Wang et al. 2025, arXiv:2501.09767",
    example={"keep": 0.5, "block": 4},
    promises=Promises(site_bytes=_full.saved_bytes),
    stored="base",
)
