"""What is minimised: next-token cross-entropy that never holds all logits, and the loss of rows that are classified.

    loss = sum_t w_t (logsumexp(head(h_t)) - head(h_t)[target_t]) / sum_t w_t

Float32 logits of all tokens are often the largest array of a fine-tuning step (16 x 1024 tokens x 128k words: 8 GiB).
Here the head runs over chunks of tokens, and each chunk's logits are computed again in the backward pass. The head is
the model's own function, so adapters on it, tied embeddings and final norms need no special case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.model import Batch, Model


def completion_loss(
    model: Model, params: tree.Params, batch: Batch, key: jax.Array | None = None, chunk: int = 512
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross-entropy over the tokens that count.

    Args:
      model: any model.
      params: nested parameters.
      batch: tokens, targets (B, S) int32; loss_weights (B, S) float32, 0 for prompts and padding.
      key: dropout key, or None.
      chunk: tokens whose logits exist at once.

    Returns:
      (loss, aux): nats per token; aux["weight"] is the sum of the weights, by which micro-batches are averaged. A
      batch of weight 0 has loss 0.

    Raises:
      AssertionError: when traced, for targets or weights of other shapes than the stream's, or of other types.
    """
    chex.assert_rank([batch["targets"], batch["loss_weights"]], 2)
    chex.assert_type([batch["targets"], batch["loss_weights"]], [int, float])
    x = model.hidden(params, batch, key)
    chex.assert_shape([x[..., 0], batch["targets"], batch["loss_weights"]], x.shape[:2])
    tokens = x.shape[0] * x.shape[1]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    x = jnp.pad(x.reshape(tokens, -1), ((0, pad), (0, 0))).reshape(-1, chunk, x.shape[-1])
    targets = jnp.pad(batch["targets"].reshape(-1), (0, pad)).reshape(-1, chunk)
    weights = jnp.pad(batch["loss_weights"].reshape(-1), (0, pad)).reshape(-1, chunk)

    @jax.checkpoint
    def part(total, inputs: tuple[jax.Array, jax.Array, jax.Array]):
        h, target, weight = inputs
        logits = model.head(params, h)
        at_target = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return total + jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - at_target)), None

    total, _ = jax.lax.scan(part, jnp.zeros((), jnp.float32), (x, targets, weights))
    weight = jnp.sum(batch["loss_weights"], dtype=jnp.float32)
    return total / jnp.maximum(weight, 1e-9), {"weight": weight}


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
