"""DePT: a short prompt, and an update of low rank of the tokens' embeddings by their positions.

    [P; E[tokens] + s (A B)[positions]]        P (p, d), A (n, r), B (r, d) float32 trained; s = alpha / sqrt(r)

A prompt is decomposed: what a long one has in parameters, a shorter one and the update share. Positions are those in a
token's own text, counted from 0; tokens from position n on have no update. P is prompt tuning's in all else (`prompt`):
every text sees it, it is computed once per batch, and lies in the first slots of the cache. A starts uniform in
(-1, 1) / sqrt(r), B at 0. It cannot be merged into the base.

A and B learn at `lr_ratio` times the rate of P: P moves far, and every token moves with A and B.

Kept for the backward pass: what `prompt` of its length keeps, and of each token its position, 4 bytes: the rows of A
(B, S, r) are taken again.

Paper: Shi & Lipani 2023, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", arXiv:2309.05173. With
p + r (n + d) / d = 100 it has the parameters of a prompt of 100 tokens, and costs less: for T5-base (d = 768) p = 40,
r = 45, n = 256. Rates: 0.3 to 0.4 for P, and of 5e-4, 5e-3 and 0.3 the best for A and B.

Deviations: rows need not be padded to n tokens. Padding gets the update as well, which nothing sees. P starts at drawn
words; the paper's, at a text or words close to the task's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft import features, prompts
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.in_front import row_bytes
from jaxpeft.method import Method, Spec, blind, trains
from jaxpeft.methods.lora import check_alpha
from jaxpeft.models.layers import lookup, with_inner

FACTORS = ("dept/a", "dept/b")


def block_bytes(config: Any, itemsize: int, **_) -> float:
    """Bytes per token that a layer keeps: its share of the token's position."""
    return 4 / config.num_hidden_layers


def dept(
    length: int = 40,
    rank: int = 45,
    alpha: float = 8.0,
    positions: int = 256,
    lr_ratio: float = 0.1,
    init: str = "vocabulary",
    text: str = "",
    tokenizer: str = "",
) -> Method:
    """Decomposed prompt tuning of a decoder.

    Args:
      length: p, tokens of the prompt.
      rank: r, at most n and d.
      alpha: s = alpha / sqrt(r).
      positions: n, tokens of a text that get the update.
      lr_ratio: the learning rate of A and B over that of P.
      init: where P starts: "vocabulary", "text" or "random", see `prompt`.
      text: for init="text".
      tokenizer: for init="text": folder or hub id of the tokenizer that reads it.

    Returns:
      The method. It trains `dept/embedding` (p, d), `dept/a` (n, r) and `dept/b` (r, d), and the adapted model has room
      for p tokens fewer.

    Raises:
      InputError: for a setting out of range, or a text without a tokenizer. Of the model, when set up: as `prompt`
        does, and for a rank above its width.
    """
    config = dict(locals())
    prompts.check("dept", length, init, text, tokenizer)
    if rank < 1 or rank > positions:
        raise InputError(f"dept: rank {rank} must be at least 1, and at most the {positions} positions")
    check_alpha("dept", alpha)
    if not 0 < lr_ratio < float("inf"):
        raise InputError(f"dept: lr_ratio {lr_ratio} must be a finite number above 0")
    begin, scale = prompts.start("dept", length, init, text, tokenizer), alpha / math.sqrt(rank)

    def forward(model, view):
        d = features.width("dept", model)
        if rank > d:
            raise InputError(f"dept: rank {rank} is above the model's width, {d}")

        def leaves(key, params):
            of_prompt, of_a = jax.random.split(key)
            a = jax.random.uniform(of_a, (positions, rank), minval=-1, maxval=1) / math.sqrt(rank)
            return {"embedding": begin(of_prompt, params), "a": a, "b": jnp.zeros((rank, d))}

        def words(table, own, batch):
            places = batch.get("positions")
            if places is None:
                places = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
            return _Updated(table, own["a"], own["b"], places, scale)

        return prompts.attach("dept", model, length, leaves, words)

    @blind
    def update(optimizer, view):
        factors = lambda leaves: {path: path in FACTORS for path in leaves}
        return optax.chain(optimizer, optax.masked(optax.scale(lr_ratio), factors))

    return Method(
        forward=forward,
        roles=trains(lambda path: "/dept/" in f"/{path}"),
        update=update,
        merge=features.no_merge("dept", "its prompt is served as the first entries of a cache"),
        specs=(Spec("dept", config),),
    )


@functools.partial(jax.tree_util.register_dataclass, data_fields=("table", "a", "b", "places"), meta_fields=("scale",))
@dataclasses.dataclass(frozen=True)
class _Updated:
    """A table of words (V, d) for tokens at places (B, S) int32; a (n, r), b (r, d)."""

    table: Any
    a: jax.Array
    b: jax.Array
    places: jax.Array
    scale: float


@lookup.register
def _(table: _Updated, ids: jax.Array) -> jax.Array:
    x = lookup(table.table, ids)
    count, rank = table.a.shape
    places = jnp.minimum(table.places, count)  # the last row is of all tokens further on

    @jax.checkpoint
    def of_places(a, b):
        rows = jnp.take(jnp.concatenate([a, jnp.zeros((1, rank), a.dtype)]), places, axis=0, mode="clip")
        return table.scale * (rows.astype(x.dtype) @ b.astype(x.dtype))

    return x + of_places(table.a, table.b)


@with_inner.register
def _(table: _Updated, change: Callable[[Any], Any]) -> _Updated:
    return dataclasses.replace(table, table=change(table.table))


ABOUT = About(
    summary="a short prompt, and an update of low rank of the tokens' embeddings by position",
    level="input",
    trains="p d + r (n + d) numbers: p embeddings, and factors of the update of n positions",
    saves="gradients and optimizer state of all but these; no activations, of p tokens once per batch a few more",
    reference="Shi & Lipani 2023, arXiv:2309.05173",
    example={"length": 2, "rank": 2, "positions": 12},
    promises=Promises(block_bytes=block_bytes, row_bytes=row_bytes, starts_at_base=False, merges=False),
    defaults=Defaults(lr=1e-2),
)
