"""The chunked loss: equal to the plain one, and never all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.errors import InputError
from jaxpeft.memory import aot, targets
from jaxpeft.model import opaque
from jaxpeft.models.decoder import from_hf
from tests import residuals, tiny


def plain(model, params, batch):
    logits = model.apply(params, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (losses * batch["loss_weights"]).sum() / batch["loss_weights"].sum()


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 7, 64, 512])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_plain_loss_and_its_gradient(chunk, tied):
    """Any chunk, dividing the tokens or not; tied embeddings get both of their gradients."""
    model, params = tiny.model(tie_word_embeddings=tied)
    assert_plain(model, params, chunk)


def assert_plain(model, moved, chunk=None, rest=()):
    """Value and gradient with respect to the moved leaves are those of the plain loss."""
    batch = tiny.batch()
    whole = lambda moved: jp.combine(moved, rest) if rest else moved
    expected, gradients = jax.jit(jax.value_and_grad(lambda p: plain(model, whole(p), batch)))(moved)
    loss = lambda p: jp.completion_loss(model, whole(p), batch, chunk=chunk)[0]
    found, chunked = jax.jit(jax.value_and_grad(loss))(moved)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [jp.lora(2, targets=r"q_proj|lm_head"), jp.full("^lm_head"), jp.chain(jp.quantize("int8"), jp.lora(2))],
    ids=["an adapter on the head", "the head alone", "a packed base"],
)
def test_whatever_trains_in_the_head_gets_its_gradient(method):
    model, trainable, rest = jp.setup(method, *tiny.model(), jax.random.key(0))
    trainable = {path: leaf + 0.01 for path, leaf in trainable.items()}  # away from B = 0
    assert_plain(model, trainable, 16, rest)


@pytest.mark.parametrize(
    ("method", "tied", "products"),
    [
        (jp.lora(2), False, 2),  # logits and d h
        (jp.lora(2), True, 2),
        (jp.full(), False, 3),  # and d W
        (jp.full("^lm_head"), False, 2),  # no d h, which nothing would read
    ],
)
def test_the_heads_product_is_computed_once(method, tied, products):
    model, trainable, rest = jp.setup(method, *tiny.model(tie_word_embeddings=tied), jax.random.key(0))
    loss = lambda trainable: jp.completion_loss(model, jp.combine(trainable, rest), tiny.batch())[0]
    tokens, width, vocabulary = 64, model.config.hidden_size, model.config.vocab_size
    step = jax.make_jaxpr(jax.value_and_grad(loss))(trainable)
    made = [shapes for shapes in residuals.products(step.jaxpr) if any(vocabulary in shape for shape in shapes)]
    assert len(made) == products
    assert {size for shapes in made for shape in shapes for size in shape} == {tokens, width, vocabulary}


def test_weights_are_differentiated_forwards_and_backwards():
    model, params = tiny.model()
    batch = tiny.batch()
    weights = jnp.asarray(batch["loss_weights"]) + 0.5
    along = jax.random.normal(jax.random.key(0), weights.shape)
    loss = lambda weights: jp.completion_loss(model, params, {**batch, "loss_weights": weights}, chunk=16)[0]
    by_hand = jax.jit(jax.grad(lambda weights: plain(model, params, {**batch, "loss_weights": weights})))(weights)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(weights), by_hand, rtol=1e-4, atol=1e-7)
    _, forward = jax.jit(lambda w, d: jax.jvp(loss, (w,), (d,)))(weights, along)
    np.testing.assert_allclose(forward, jnp.vdot(by_hand, along), rtol=1e-4)


def test_logits_of_a_module_may_be_bfloat16():
    """A model without visible layers gives logits of its own type; their logarithms and sums are float32."""
    logits = jax.random.normal(jax.random.key(0), (4, 16, 97), jnp.bfloat16)
    model = jp.Model(lambda key, params: params, opaque(lambda params, batch, key: params["logits"]))
    batch = tiny.batch()
    expected, by_hand = jax.value_and_grad(lambda logits: plain(model, {"logits": logits}, batch))(
        logits.astype(jnp.float32)
    )
    found, gradient = jax.value_and_grad(lambda p: jp.completion_loss(model, p, batch)[0])({"logits": logits})
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert gradient["logits"].dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient["logits"], by_hand, rtol=2**-8, atol=1e-9)


def test_a_target_that_is_no_word_shows():
    """Where it counts the loss is NaN; where it does not, as the -100 of other libraries, it is nothing."""
    model, params = tiny.model()
    batch = tiny.batch()
    weights = np.ones_like(batch["loss_weights"])
    weights[0, 0] = 0
    expected = plain(model, params, {**batch, "loss_weights": weights})
    for target in (-100, 10**6):
        wrong = np.array(batch["targets"])
        wrong[0, 0] = target
        ignored = {**batch, "targets": wrong, "loss_weights": weights}
        np.testing.assert_allclose(jp.completion_loss(model, params, ignored)[0], expected, rtol=1e-6)
        counted = {**ignored, "loss_weights": np.ones_like(weights)}
        assert np.isnan(jp.completion_loss(model, params, counted)[0])


@pytest.mark.parametrize("target", ["h200", "v5p", "v5e"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_workspace_at_128k_words(target, tied):
    """Below 0.15 GiB beside the stream and its gradient, whatever the number of tokens; no copy of the head."""
    device = targets.target(target)
    try:
        targets.devices(device)
    except InputError as error:
        pytest.skip(str(error))
    sizes = {"vocab_size": 128_256, "hidden_size": 1024}  # of which a copy takes 0.25 GiB
    model = from_hf({**tiny.CONFIG, **sizes, "tie_word_embeddings": tied}, jnp.bfloat16)
    params = jax.eval_shape(lambda key: model.init(key, {}), jax.random.key(0))
    rows, length, width = 4, 1024, model.config.hidden_size
    x = jax.ShapeDtypeStruct((rows, length, width), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"targets": ids, "loss_weights": jax.ShapeDtypeStruct((rows, length), jnp.float32)}

    def loss(x, params, batch):
        given = model._replace(stack=model.stack._replace(run=lambda *args: (x, None)))
        return jp.completion_loss(given, params, batch)[0]

    compiled = aot.compile(device, jax.value_and_grad(loss), x, params, batch)
    assert compiled.memory.temporaries < 0.15 * 2**30


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
