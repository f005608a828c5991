"""What is minimised: next-token cross-entropy that never holds all logits, and the loss of rows that are classified.

    loss = sum_t w_t (logsumexp(head(h_t)) - head(h_t)[target_t]) / sum_t w_t

Float32 logits of all tokens are often the largest array of a fine-tuning step (16 x 1024 tokens x 128k words: 8 GiB).
Here the head runs over chunks of tokens. A chunk's gradient is taken while its logits exist, so that the head's product
is computed once: what is kept for the backward pass are d h of all tokens, in place of h, and the gradients of what
trains in the head (as in Liger Kernel, Hsu et al. 2024, arXiv:2410.10989). The head is the model's own function, so
adapters on it, tied embeddings and final norms need no special case.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from jaxpeft import constraints, tree
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Model

LOGIT_BYTES = 1 << 26  # of the logits that exist at once, in the type of the stream, at most
_KINDS = {"targets": (jnp.integer, "integers"), "loss_weights": (jnp.floating, "floating-point numbers")}
LEAST = 256  # tokens, at least: a product of fewer spends its time on reading the head


def completion_loss(
    model: Model, params: tree.Params, batch: Batch, key: jax.Array | None = None, chunk: int | None = None
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross-entropy over the tokens that count.

    Args:
      model: any model.
      params: nested parameters.
      batch: tokens, targets (B, S) int32; loss_weights (B, S) float32, 0 for prompts and padding.
      key: dropout key, or None.
      chunk: tokens whose logits exist at once; None: as many as have the size of the stream, within `LEAST` and
        `LOGIT_BYTES` (256 at 128k words and bfloat16).

    Returns:
      (loss, aux): nats per token; aux["weight"] is the sum of the weights, by which micro-batches are averaged. A
      batch of weight 0 has loss 0.

    Raises:
      InputError: when traced, for a batch without targets or weights, or with ones of another type, or of other shapes
        than the stream's.
    """
    _check_kinds(batch, model.stack.layered)
    x = model.hidden(params, batch, key)
    for name in _KINDS:
        if batch[name].shape != x.shape[:2]:
            raise InputError(
                f"batch[{name!r}]: has shape {batch[name].shape}; it should be that of tokens, {x.shape[:2]}"
            )
    weight = jnp.sum(batch["loss_weights"], dtype=jnp.float32)
    shares = batch["loss_weights"] / jnp.maximum(weight, 1e-9)

    vocabulary = jax.eval_shape(model.head, params, x[0]).shape[-1]
    x, targets, shares = in_chunks(vocabulary, x, batch["targets"], shares, chunk=chunk)
    head, leaves = _traced(model.head, for_head(params), x[0])
    return _total(head, leaves, [x, targets, shares]), {"weight": weight}


def _check_kinds(batch: Batch, layered: bool) -> None:
    """Refuses a batch without what `completion_loss` reads, or with something else in its place.

    layered: whether the model is one of tokens (B, S); another one's inputs may be called and shaped otherwise.
    """
    tokens = {"tokens": _KINDS["targets"]} if layered and "tokens" in batch else {}
    for name, (kind, words) in {**tokens, **_KINDS}.items():
        if name not in batch:
            raise InputError(
                f"batch: holds {', '.join(sorted(batch)) or 'nothing'}, and no {name}; completion_loss takes {name} "
                f"(B, S), {words}; give make_train_step another loss for other batches"
            )
        given = batch[name]
        if given.ndim != 2 or not jnp.issubdtype(given.dtype, kind):
            raise InputError(f"batch[{name!r}]: is {given.dtype} of shape {given.shape}; it should be {words} (B, S)")


def in_chunks(vocabulary: int, x: jax.Array, *others: jax.Array, chunk: int | None = None) -> list[jax.Array]:
    """x (B, S, d) and others (B, S, ...) as chunks of tokens (C, n, ...), the last filled up with zeros.

    vocabulary: of the logits that are made of a chunk.  chunk: tokens of one; None: as `completion_loss` has it.
    """
    shards = constraints.shards(*x.shape[:2])
    count = math.prod(shards)
    chunks = _chunks(math.prod(x.shape[:2]) // count, chunk or _chunk(x, vocabulary, count))
    return [constraints.chunks(_cut(part, chunks, shards)) for part in (x, *others)]


def for_head(params: tree.Params) -> tree.Params:
    """Nested parameters whose leaves beside the layers are gathered once, for the heads of all chunks."""
    beside = {name: leaf for name, leaf in params.items() if not tree.stacked(f"{name}/")}
    return {**params, **constraints.gathered(beside)}


def _chunk(x: jax.Array, vocabulary: int, shards: int) -> int:
    """Tokens of a device whose logits exist at once."""
    like_stream = x.size // shards // vocabulary
    return min(max(like_stream, LEAST), max(LOGIT_BYTES // (vocabulary * x.dtype.itemsize), 1))


def _chunks(tokens: int, most: int) -> int:
    """The number of chunks of at most `most` tokens: one that divides them if that makes no more than twice as many.

    >>> _chunks(4096, 130), _chunks(1000, 512), _chunks(1009, 512)
    (32, 2, 2)
    """
    fewest = -(-tokens // most)
    return next((chunks for chunks in range(fewest, 2 * fewest) if tokens % chunks == 0), fewest)


def _cut(rows: jax.Array, chunks: int, shards: tuple[int, int] = (1, 1)) -> jax.Array:
    """(B, S, ...) -> (chunks, tokens of each, ...), the last filled up with zeros; each has tokens of every shard.

    shards: parts into which rows and tokens are divided, of which each is a device's.
    """
    across, along = shards
    b, s, *rest = rows.shape
    rows = rows.reshape(across, b // across, along, s // along, *rest).swapaxes(1, 2)
    rows = rows.reshape(across * along, -1, *rest)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % chunks), *[(0, 0)] * (rows.ndim - 2)))
    rows = rows.reshape(across * along, chunks, -1, *rest).swapaxes(0, 1)
    return rows.reshape(chunks, -1, *rest)


def _traced(head: Callable[..., jax.Array], params: tree.Params, x: jax.Array) -> tuple[ClosedJaxpr, list[Any]]:
    """(the head as a jaxpr of (*leaves, x (n, d)), the leaves: what it reads of `params` and what it closes over)."""
    leaves, treedef = jax.tree.flatten(params)
    closed = jax.make_jaxpr(lambda leaves, x: head(treedef.unflatten(leaves), x))(leaves, x)
    leaves = [*closed.consts, *leaves]
    opened = closed.jaxpr.replace(
        constvars=[],
        invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars],
        debug_info=closed.jaxpr.debug_info.with_unknown_names(),
    )
    pruned, used = partial_eval.dce_jaxpr(opened, [True], instantiate=[*[False] * len(leaves), True])
    return ClosedJaxpr(pruned, ()), [leaf for leaf, use in zip(leaves, used, strict=False) if use]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(head: ClosedJaxpr, leaves: list[Any], rows: list[jax.Array]) -> jax.Array:
    """sum_t w_t (logsumexp(head(h_t)) - head(h_t)[target_t]), () float32.

    Args:
      head: of `_traced`.
      leaves: that it reads.
      rows: x (C, n, d), targets (C, n) and weights (C, n) of the C chunks.
    """

    def add(total, chunk):
        x, target, weight = chunk
        (logits,) = jaxpr_as_fun(head)(*leaves, x)
        losses, _ = _losses(logits, target, weight)
        return total + jnp.sum(weight * losses), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), rows)[0]


def _losses(logits, target, weight):
    """Float32 cross-entropies (n,), NaN for a token that counts with a target that is no word; d losses / d logits."""
    logits, words = logits.astype(jnp.float32), logits.shape[-1]
    zero = target[0] - target[0]  # of the chunk: JAX would take (n, V) numbers of none out of the loop, and keep them
    hit = jnp.arange(words) + zero == target[:, None]
    known = ((target >= 0) & (target < words)) | (weight == 0)
    at_target = jnp.sum(jnp.where(hit, logits, zero.astype(jnp.float32)), axis=-1)
    scale = jax.nn.logsumexp(logits, axis=-1)
    return scale - jnp.where(known, at_target, jnp.nan), jnp.exp(logits - scale[:, None]) - hit


def _total_jvp(head, primals, tangents):
    """The loop takes each chunk's gradient too; the tangent of the total is its inner product with the tangents."""
    leaves, rows = primals
    along = [*tangents[0], *tangents[1]]
    moved = [i for i, d in enumerate(along) if not isinstance(d, SymbolicZero)]
    of_leaves, of_head = ([i for i in moved if i < end] for end in (len(leaves), len(leaves) + 1))

    def add(carry, chunk):
        (total, sums), (x, target, weight) = carry, chunk
        inputs = [*leaves, x]

        def logits(*values):
            own = dict(zip(of_head, values, strict=True))
            return jaxpr_as_fun(head)(*[own.get(i, given) for i, given in enumerate(inputs)])[0]

        found, pull = jax.vjp(logits, *[inputs[i] for i in of_head])
        losses, derivative = _losses(found, target, weight)
        of_weight = [losses for i in moved if i not in of_head]
        gradient = [*pull((weight[:, None] * derivative).astype(found.dtype)), *of_weight]
        sums = [a + b for a, b in zip(sums, gradient, strict=False)]
        return (total + jnp.sum(weight * losses), sums), gradient[len(of_leaves) :]

    start = jnp.zeros((), jnp.float32), [jnp.zeros_like(leaves[i]) for i in of_leaves]
    (total, sums), of_rows = jax.lax.scan(add, start, rows)
    inner = map(_inner, [*sums, *of_rows], [along[i] for i in moved])
    return total, sum(inner, jnp.zeros((), jnp.float32))


def _inner(gradient, tangent):
    return jnp.sum(gradient.astype(jnp.float32) * tangent.astype(jnp.float32))


_total.defjvp(_total_jvp, symbolic_zeros=True)


def by_row(value: Callable[[Batch], tuple[jax.Array, dict[str, Any]]], batch: Batch) -> jax.Array:
    """What each row of a batch adds to the sum of which a loss is the mean, (B,) float32.

    Each weight's derivative of that sum is the loss of what it weighs. Nothing but the weights is differentiated.

    Args:
      value: batch -> (loss, aux), with aux["weight"].
      batch: with loss_weights (B, S), or weights (B,) of rows that are classified.
    """
    name = weights_of(batch)

    def total(weights):
        loss, aux = value({**batch, name: weights})
        return loss * aux["weight"]

    weights = batch[name]
    losses = jax.grad(total)(weights) * weights
    return losses.reshape(len(losses), -1).sum(-1)


def weights_of(batch: Batch) -> str:
    """The name of a batch's weights."""
    return "loss_weights" if "loss_weights" in batch else "weights"


def classification_loss(
    model: Model, params: tree.Params, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross-entropy over rows, or mean squared error for a model with a single label.

    Args:
      model: one whose head is a classifier.
      params: nested parameters.
      batch: what the model reads, and labels (B,) int32, or float32 for a single label; weights (B,) float32, 0 for
        rows that do not count.
      key: dropout key, or None.

    Returns:
      (loss, aux): nats per row, or the error squared; aux["weight"] is the sum of the weights, aux["accuracy"] the
      share of rows whose likeliest label is theirs (absent for a single label). A batch of weight 0 has loss 0.
    """
    logits = model.classify(params, batch, key)
    weights = batch["weights"]
    chex.assert_rank(logits, 2)
    chex.assert_shape([batch["labels"], weights], logits.shape[:1])
    weight = jnp.sum(weights, dtype=jnp.float32)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(weights * values) / jnp.maximum(weight, 1e-9)

    losses = row_losses(logits, batch["labels"])
    if logits.shape[-1] == 1:
        return mean(losses), {"weight": weight}
    right = jnp.argmax(logits, axis=-1) == batch["labels"]
    return mean(losses), {"weight": weight, "accuracy": mean(right.astype(jnp.float32))}


def row_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropies (B,) float32 of logits (B, n) and labels (B,) int32; for n = 1 squared errors, labels float32."""
    chex.assert_shape(labels, logits.shape[:1])
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] == 1:
        return jnp.square(logits[:, 0] - labels.astype(jnp.float32))
    at_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - at_label


LossFn = Any  # (model, params, batch, key) -> (loss, aux dict with "weight"); `completion_loss` is one
Metrics = Mapping[str, jax.Array]
