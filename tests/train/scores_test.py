"""Rows that are classified: their loss, and the scores of a model that does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.models import decoder, for_classification
from jaxpeft.train import evaluate, scores
from jaxpeft.train.loss import classification_loss
from tests import tiny


def model_of(labels):
    """(Model, params) of a small decoder with a classifier."""
    config = for_classification(tiny.CONFIG, [f"LABEL_{i}" for i in range(labels)])
    model = decoder.from_hf(config)
    return model, model.init(jax.random.key(7), {})


def batch_of(labels, rows=6, seed=0):
    batch = {name: x for name, x in tiny.batch(rows, 12, seed).items() if name not in ("targets", "loss_weights")}
    rng = np.random.default_rng(seed)
    values = rng.normal(size=rows).astype(np.float32) if labels == 1 else rng.integers(0, labels, rows).astype(np.int32)
    return {**batch, "labels": values, "weights": (np.arange(rows) != 2).astype(np.float32)}


# The loss.


@pytest.mark.parametrize("labels", [1, pytest.param(2, marks=pytest.mark.slow), 5])
def test_the_loss_is_the_mean_over_the_rows_that_count(labels):
    model, params = model_of(labels)
    batch = batch_of(labels)
    logits = np.asarray(model.classify(params, batch), np.float64)
    counted = np.flatnonzero(batch["weights"])
    if labels == 1:
        expected = np.mean((logits[counted, 0] - batch["labels"][counted]) ** 2)
    else:
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = -np.mean(np.log(shares[counted, batch["labels"][counted]]))
    loss, aux = classification_loss(model, params, batch)
    assert (loss.dtype, float(aux["weight"])) == (jnp.float32, 5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert ("accuracy" in aux) == (labels > 1)
    if labels > 1:
        right = logits.argmax(-1)[counted] == batch["labels"][counted]
        assert float(aux["accuracy"]) == pytest.approx(right.mean())
    nothing = {**batch, "weights": np.zeros(6, np.float32)}
    value, gradients = jax.value_and_grad(lambda p: classification_loss(model, p, nothing)[0])(params)
    assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(gradients))


def test_micro_batches_of_unequal_weight_average_right():
    model, params = model_of(3)
    method = jp.full()
    model, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    batch, results = batch_of(3), []
    for accumulate in (1, 3):
        state = jp.init_state(method, optax.sgd(0.1), trainable, frozen, jax.random.key(0))
        step = jax.jit(jp.make_train_step(model, method, optax.sgd(0.1), classification_loss, accumulate))
        results.append(step(state, batch))
    (one, whole), (other, parts) = results
    for name in ("loss", "accuracy", "weight", "grad_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, err_msg=name)
    for path, leaf in one.trainable.items():
        np.testing.assert_allclose(other.trainable[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


# The scores.


def test_f1_by_hand():
    """Three labels and a fourth that neither occurs nor is answered."""
    true, said = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    matrix = scores.confusion(true, said, 4)
    np.testing.assert_array_equal(matrix[:3, :3], [[2, 1, 0], [0, 1, 1], [0, 0, 1]])
    found = scores.accuracy_and_f1(matrix)
    assert found == {"accuracy": pytest.approx(4 / 6), "f1": pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)}


def test_scores_are_those_of_the_usual_packages():
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    true, said = rng.integers(0, 9, 200), rng.integers(2, 12, 200)
    found = scores.accuracy_and_f1(scores.confusion(true, said, 12))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))
    assert found["f1"] == pytest.approx(metrics.f1_score(true, said, average="macro"))
    x = rng.integers(0, 20, 100).astype(np.float32)
    y = x + rng.normal(size=100).astype(np.float32) * 9
    found = scores.correlations(x, y)
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-6)
    assert scores.correlations(x, np.ones(100)) == {"pearson": None, "spearman": None}


def test_an_evaluation_leaves_empty_rows_out():
    model, params = model_of(3)
    method = jp.full("^classifier/")
    model, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    state = jp.init_state(method, optax.sgd(0.1), trainable, frozen, jax.random.key(0))
    batches = [batch_of(3, seed=seed) for seed in range(2)]
    found = evaluate.classification_scores(evaluate.make_classification_eval_step(model), state, batches, 3)
    one_by_one = [classification_loss(model, params, batch) for batch in batches]
    assert found["loss"] == pytest.approx(np.mean([float(loss) for loss, _ in one_by_one]), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean([float(aux["accuracy"]) for _, aux in one_by_one]))
