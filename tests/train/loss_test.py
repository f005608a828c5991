"""The chunked loss: equal to the plain one, and never all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from tests import residuals, tiny


def plain(model, params, batch):
    logits = model.apply(params, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (losses * batch["loss_weights"]).sum() / batch["loss_weights"].sum()


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_plain_loss_and_its_gradient(chunk, tied):
    """Any chunk, dividing the tokens or not; tied embeddings get both of their gradients."""
    model, params = tiny.model(tie_word_embeddings=tied)
    batch = tiny.batch()
    expected, gradients = jax.jit(jax.value_and_grad(lambda p: plain(model, p, batch)))(params)
    found, chunked = jax.jit(jax.value_and_grad(lambda p: jp.completion_loss(model, p, batch, chunk=chunk)[0]))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_no_tokens_count():
    """A batch of weight 0 has loss 0 and zero gradients, not NaN."""
    model, params = tiny.model()
    batch = {**tiny.batch(), "loss_weights": np.zeros((4, 16), np.float32)}
    value, gradients = jax.jit(jax.value_and_grad(lambda p: jp.completion_loss(model, p, batch)[0]))(params)
    assert value == 0
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))


def test_all_logits_never_exist():
    """No array of (tokens x vocabulary) elements in the gradient's program, nor among what it keeps."""
    model, trainable, frozen = jp.setup(jp.lora(2), *tiny.model(), jax.random.key(0))
    batch = tiny.batch(rows=64)
    logits = 64 * 16 * 97

    def function(trainable):
        return jp.completion_loss(model, jp.combine(trainable, frozen), batch, chunk=128)[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(function))(trainable)
    sizes = [int(np.prod(shape)) for shape in residuals.intermediates(jaxpr.jaxpr) if 97 in shape]
    assert sizes and max(sizes) < logits / 4
    kept = residuals.saved(model, trainable, frozen, batch, of="loss")
    assert not [leaf for leaf in kept if 97 in leaf.shape and leaf.size > 32 * 97]


def test_bf16_stream_has_float32_logits():
    model, params = tiny.model(dtype=jnp.bfloat16)
    loss, _ = jp.completion_loss(model, params, tiny.batch())
    assert loss.dtype == jnp.float32
    assert model.apply(params, tiny.batch()).dtype == jnp.float32
