"""Small maths gives the same numbers however it is run: with and without jit, with arrays placed or not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.backward.compressed import compress, decompress
from jaxpeft.features import layer_norm
from jaxpeft.methods.lora_fa import project
from jaxpeft.models.layers import rotary_tables, rotate
from jaxpeft.train.loss import completion_loss, row_losses
from tests import tiny

RNG = np.random.default_rng(0)


class Maths(chex.TestCase):
    """Each against NumPy."""

    @chex.all_variants(with_pmap=False)
    def test_rotary(self):
        x = RNG.normal(size=(2, 5, 3, 8)).astype(np.float32)
        positions = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]], np.int32)
        frequencies = np.array([1.0, 0.5, 0.25, 0.125], np.float32)

        @self.variant
        def turned(x, positions):
            return rotate(x, rotary_tables(positions, jnp.asarray(frequencies)))

        angle = positions[..., None, None] * frequencies
        pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
        expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
        np.testing.assert_allclose(turned(x, positions), expected, rtol=1e-5, atol=1e-5)

    @chex.all_variants(with_pmap=False)
    def test_losses_of_rows(self):
        logits, labels = RNG.normal(size=(4, 3)).astype(np.float32), np.array([0, 2, 1, 1], np.int32)
        found = self.variant(row_losses)(logits, labels)
        expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(4), labels]
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    @chex.all_variants(with_pmap=False)
    def test_layer_norm(self):
        x = RNG.normal(size=(3, 7)).astype(np.float32)
        found = self.variant(layer_norm)(x)
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)

    @chex.all_variants(with_pmap=False)
    def test_projected_gradient(self):
        """g minimises || s A g - G ||, where dB = s A^T G."""
        a, whole = RNG.normal(size=(9, 3)).astype(np.float32), RNG.normal(size=(9, 4)).astype(np.float32)
        found = self.variant(lambda a, d_b: project(a, d_b, 0.5))(a, 0.5 * a.T @ whole)
        expected = np.linalg.lstsq(0.5 * a, whole, rcond=None)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)

    @chex.all_variants(with_pmap=False)
    def test_eight_bits(self):
        x = RNG.normal(size=(4, 64)).astype(np.float32)
        found = self.variant(lambda x, seed: decompress(compress(x, seed), x.dtype))(x, np.uint32(3))
        step = (x.max(-1) - x.min(-1))[:, None] / 127
        assert (np.abs(np.asarray(found) - x) <= 2.1 * step).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": np.zeros((4, 15), np.int32)}, r"\['targets'\]: has shape \(4, 15\); it should be .*\(4, 16\)"),
        ({"loss_weights": np.ones(16, np.float32)}, r"float32 of shape \(16,\); it should be floating-point numbers"),
        ({"loss_weights": np.ones((4, 16), bool)}, r"\['loss_weights'\]: is bool of shape \(4, 16\)"),
        ({"targets": np.zeros((4, 16), np.float32)}, "is float32 .*; it should be integers"),
    ],
)
def test_a_wrong_batch_is_an_error_not_a_broadcast(changes, said):
    base, params = tiny.model()
    with pytest.raises(jp.InputError, match=said):
        jax.eval_shape(lambda batch: completion_loss(base, params, batch), {**tiny.batch(), **changes})


def test_a_batch_without_what_the_loss_reads_is_refused():
    base, params = tiny.model()
    with pytest.raises(jp.InputError, match="holds tokens, and no targets; completion_loss takes targets"):
        jax.eval_shape(lambda batch: completion_loss(base, params, batch), {"tokens": tiny.batch()["tokens"]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda batch: {**batch, "targets": tiny.batch(rows=3)["targets"]},
            r"\['targets'\]: has shape \(3, 16\) beside",
        ),
        (lambda batch: {**batch, "beta": np.float32(1)}, r"\['beta'\]: is a scalar; the first axis of all should be"),
        (lambda batch: {name: x[:0] for name, x in batch.items()}, "has shape .0, 16.; a step needs at least one row"),
        (lambda batch: {name: x[0] for name, x in batch.items()}, r"\['tokens'\]: is int32 of shape \(16,\)"),
        (lambda batch: {**batch, "tokens": np.ones((4, 16), np.float32)}, "is float32 .*; it should be integers"),
        (lambda batch: {}, "should be a dict of arrays"),
    ],
)
def test_what_is_no_batch_is_refused_by_the_step(change, said):
    base, params = tiny.model()
    method = jp.lora(2)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optax.adam(1e-3), trainable, rest, jax.random.key(1))
    with pytest.raises(jp.InputError, match=said):
        jax.eval_shape(jp.make_train_step(model, method, optax.adam(1e-3)), state, change(tiny.batch()))
