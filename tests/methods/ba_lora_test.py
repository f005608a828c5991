"""BA-LoRA: its three terms in NumPy, on whole logits; the base without a second copy; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import ba_lora
from jaxpeft.models import decoder, for_classification
from jaxpeft.train.loss import classification_loss, completion_loss
from jaxpeft.train.step import objective_of
from tests import tiny

L1, L2, L3, K = 0.3, 0.2, 0.1, 2
BATCH = tiny.batch()
KEY = jax.random.key(0)
NAMES = ("consistency", "diversity", "svd")


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def share(z, k):
    s = np.linalg.svd(z, compute_uv=False)
    return s[:k].sum() / s.sum()


def of_texts(z, before, weights, k):
    """(consistency, diversity, svd) of logits (B, S, V), float64."""
    z, before, weights = (np.asarray(x, np.float64) for x in (z, before, weights))
    q, p = log_softmax(z), log_softmax(before)
    mean = lambda of_token: (weights * of_token).sum() / weights.sum()
    apart = mean((np.exp(p) * (p - q)).sum(-1))
    return apart, mean((np.exp(q) * q).sum(-1)), -share(z[weights > 0], k)


def of_labels(z, before, weights, k):
    z, before = (np.asarray(x, np.float64)[np.asarray(weights) > 0] for x in (z, before))
    unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
    covariance = np.cov(z.T)
    different = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    return np.mean((unit(z) - unit(before)) ** 2), different / z.shape[1], -share(z, k)


@functools.cache
def made(init):
    """(base, its parameters, method, model, trainable, rest): adapters that have learned something."""
    base, params = tiny.model()
    method = jp.chain(jp.lora(rank=4, init=init), jp.ba_lora(L1, L2, L3, K))
    model, trainable, rest = jp.setup(method, base, params, KEY)
    noise = lambda i, leaf: leaf + 0.1 * jax.random.normal(jax.random.fold_in(KEY, i), leaf.shape)
    return base, params, method, model, {path: noise(i, x) for i, (path, x) in enumerate(trainable.items())}, rest


@pytest.mark.parametrize("init", [pytest.param("kaiming", marks=pytest.mark.slow), "pissa"])
def test_loss_and_gradient_are_those_of_whole_logits(init):
    """The base is had of the same leaves, PiSSA's too; the task's loss is untouched."""
    base, params, method, model, trainable, rest = made(init)
    objective = objective_of(model, method, {**rest, **trainable})
    (value, aux), found = jax.jit(lambda own: objective.value_and_grad(own, rest, BATCH, KEY, ()))(trainable)
    before = base.apply(params, BATCH)
    terms = of_texts(model.apply(jp.combine(trainable, rest), BATCH), before, BATCH["loss_weights"], K)
    task = completion_loss(model, jp.combine(trainable, rest), BATCH)[0]
    for name, term in zip(NAMES, terms, strict=True):
        np.testing.assert_allclose(aux[name], term, rtol=1e-4, atol=1e-6)
    assert terms[0] > 1e-2
    np.testing.assert_allclose(value, task + np.dot((L1, L2, L3), terms), rtol=1e-5)

    def whole(trainable):
        leaves = jp.combine(trainable, rest)
        z, counts = model.apply(leaves, BATCH), BATCH["loss_weights"]
        q, p = jax.nn.log_softmax(z), jax.nn.log_softmax(before)
        mean = lambda of_token: jnp.sum(counts * of_token) / counts.sum()
        s = jnp.linalg.svd((counts[..., None] > 0).reshape(-1, 1) * z.reshape(-1, z.shape[-1]), compute_uv=False)
        apart, varied = mean(jnp.sum(jnp.exp(p) * (p - q), -1)), mean(jnp.sum(jnp.exp(q) * q, -1))
        return completion_loss(model, leaves, BATCH)[0] + L1 * apart + L2 * varied - L3 * s[:K].sum() / s.sum()

    for path, gradient in jax.jit(jax.grad(whole))(trainable).items():
        np.testing.assert_allclose(found[path], gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max(), err_msg=path)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_at_the_start_nothing_is_apart_from_the_base(init):
    base, params, method, *_ = made(init)
    model, trainable, rest = jp.setup(method, base, params, KEY)
    _, aux = objective_of(model, method, {**rest, **trainable}).value(trainable, rest, BATCH, KEY)
    assert abs(aux["consistency"]) < 1e-6


def test_classified_rows():
    rng = np.random.default_rng(0)
    z, before = rng.normal(size=(2, 12, 5)).astype(np.float32)
    weights = np.r_[np.ones(10), np.zeros(2)].astype(np.float32)
    np.testing.assert_allclose(ba_lora.of_rows(z, before, weights, 2), of_labels(z, before, weights, 2), rtol=1e-5)


def test_a_step_of_rows_that_are_classified():
    """The classifier trains, and is no part of the base that must not."""
    config = decoder.DecoderConfig.from_hf(for_classification(dict(tiny.CONFIG), list("abc")), jnp.float32)
    base = decoder.decoder(config)
    method = jp.chain(jp.lora(rank=4), jp.ba_lora(L1, L2, L3, K), jp.full("^classifier/"))
    model, trainable, rest = jp.setup(method, base, base.init(KEY, {}), KEY)
    names = ("tokens", "positions", "segment_ids")
    batch = {name: BATCH[name] for name in names if name in BATCH}
    batch |= {"labels": np.array([0, 1, 2, 1], np.int32), "weights": np.array([1, 1, 1, 0], np.float32)}
    leaves = {**rest, **{path: leaf + 0.1 for path, leaf in trainable.items()}}
    objective = objective_of(model, method, leaves, classification_loss)
    value, aux = objective.value({}, leaves, batch, None)
    plain = tree.unflatten({path: leaf for path, leaf in leaves.items() if "/lora/" not in path})
    z, before = model.classify(tree.unflatten(leaves), batch), base.classify(plain, batch)
    terms = of_labels(z, before, batch["weights"], K)
    np.testing.assert_allclose([aux[name] for name in NAMES], terms, rtol=1e-3, atol=1e-6)
    task = classification_loss(model, tree.unflatten(leaves), batch)[0]
    np.testing.assert_allclose(value, task + np.dot((L1, L2, L3), terms), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"consistency": -1.0}, "ba_lora: consistency -1.0 must be a finite number of at least 0"),
        ({"diversity": float("nan")}, "ba_lora: diversity nan must be a finite number of at least 0"),
        ({"svd": float("inf")}, "ba_lora: svd inf must be a finite number of at least 0"),
        ({"k": 0}, "ba_lora: k 0 must be at least 1"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.ba_lora(**options)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([jp.full("layers")], "ba_lora: layers/input_layernorm/scale trains, so that no pretrained model is left"),
        ([jp.int21(rank=4)], "ba_lora: int21 changes the kernels, and does not say how they were; use lora"),
    ],
)
def test_refused_company(others, message):
    method = jp.chain(*others, jp.ba_lora())
    base, params = tiny.model(hidden_size=64, intermediate_size=128)
    model, trainable, rest = jp.setup(method, base, params, KEY)
    with pytest.raises(jp.InputError, match=message):
        objective_of(model, method, {**rest, **trainable})


def test_alone_it_trains_nothing():
    with pytest.raises(jp.InputError, match="ba_lora: no parameter is trainable"):
        jp.setup(jp.ba_lora(), *tiny.model(), KEY)
