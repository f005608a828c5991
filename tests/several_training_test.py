"""Several adapters in one training batch: each moves as in a step of its own, and leaves in PEFT's form."""

import jax
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import adapters as several
from jaxpeft import models, tree
from jaxpeft.errors import InputError
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.step import objective_of
from tests import tiny

ADAPTERS = {
    "small": jp.lora(rank=2, alpha=6, targets="attention"),
    "wide": jp.lora(rank=7, targets="qv", rslora=True, lr_ratio=4),
    "fa": jp.lora_fa(rank=3, targets="mlp", alpha=9),
}
NAMES = ["wide", None, "fa", "small", "wide", "small"]
BATCH = {**tiny.batch(rows=len(NAMES)), "adapter": several.rows(ADAPTERS, NAMES)}


@pytest.fixture(scope="module")
def made():
    """(method, model, trainable, rest) at the start, but for B's that are not zero."""
    method = jp.several(ADAPTERS)
    model, trainable, rest = jp.setup(method, *tiny.model(), jax.random.key(0))
    keys = dict(zip(trainable, jax.random.split(jax.random.key(1), len(trainable)), strict=True))
    noise = {path: 0.1 * jax.random.normal(keys[path], leaf.shape) for path, leaf in trainable.items()}
    return method, model, {path: leaf + noise[path] for path, leaf in trainable.items()}, rest


def alone(made, name):
    """(model, trainable, rest, batch of its rows) of an adapter in training of its own."""
    base, _ = tiny.model()
    _, _, trainable, rest = made
    parts = jp.setup(
        ADAPTERS[name], base, several.alone(tree.combine(trainable, rest), ADAPTERS, name), jax.random.key(0)
    )
    chosen = [i for i, own in enumerate(NAMES) if own == name]
    return *parts, {field: x[chosen] for field, x in BATCH.items() if field != "adapter"}


def own(leaves, name):
    """The leaves of one adapter, at the paths that it has alone."""
    scope = ADAPTERS[name].specs[0].name
    return {path.replace(f"/several/{name}/", f"/{scope}/"): x for path, x in leaves.items() if f"/{name}/" in path}


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_are_those_of_training_alone(made, accumulate):
    """Of each adapter on its rows; rows without one count for none; also in micro-batches."""
    method, model, trainable, rest = made
    objective = objective_of(model, method, {**trainable, **rest}, accumulate=accumulate)
    grad = jax.jit(lambda t: objective.value_and_grad(t, rest, BATCH, jax.random.key(0), None)[1])
    found, seen = grad(trainable), 0
    for name in ADAPTERS:
        single, leaves, frozen, rows = alone(made, name)
        loss = lambda t, m=single, f=frozen, rows=rows: completion_loss(m, tree.combine(t, f), rows)[0]
        expected = jax.jit(jax.grad(loss))(leaves)
        assert own(found, name).keys() == expected.keys()
        for path, gradient in expected.items():
            np.testing.assert_allclose(own(found, name)[path], gradient, rtol=1e-3, atol=1e-5, err_msg=path)
        seen += len(expected)
    assert seen == len(found)


def test_steps_are_those_of_training_alone(made, tmp_path):
    """Adam's state is each leaf's own, LoRA+'s rate each adapter's; what is exported is read as it was trained."""
    method, model, trainable, rest = made
    optimizer = optax.adam(1e-2)

    def trained(method, model, trainable, rest, batch):
        state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(0), model)
        step = jax.jit(jp.make_train_step(model, method, optimizer))
        for _ in range(2):
            state, _ = step(state, batch)
        return state

    state = trained(method, model, trainable, rest, BATCH)
    base, params = tiny.model()
    for name in ("wide", "fa"):
        expected = trained(ADAPTERS[name], *alone(made, name))
        for path, leaf in expected.trainable.items():
            np.testing.assert_allclose(own(state.trainable, name)[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)
        one = several.alone(state.params, ADAPTERS, name)
        jp.export_adapter(tmp_path / name, one, ADAPTERS[name], base.config, "base")
        read, leaves = jp.import_adapter(tmp_path / name, base.config, params)
        assert read.specs == ADAPTERS[name].specs
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, tree.flatten(one)[path])
    frozen = [path for path in rest if path in state.frozen]
    assert all(np.array_equal(state.frozen[path], rest[path]) for path in frozen) and len(frozen) == len(rest)


def test_a_plan_divides_the_rows_with_their_adapters(made):
    """Layers that run over a few rows at a time, and read kernels where they lie, have the same gradients."""
    method, model, trainable, rest = made
    gradients = []
    for own in (model, jp.remat(model, "matmuls,tokens=32")):
        objective = objective_of(own, method, {**trainable, **rest})
        run = lambda t, o=objective: o.value_and_grad(t, rest, BATCH, jax.random.key(0), None)[1]
        gradients.append(jax.jit(run)(trainable))
    expected, found = gradients
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[path], gradient, rtol=1e-3, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_an_encoder_that_classifies_rows():
    """Rows' weights are those of the labels; each adapter's gradients are those of its rows alone."""
    sizes = {"model_type": "bert", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 40, "type_vocab_size": 2}
    config = models.for_classification({**sizes, "architectures": ["BertModel"]}, ["a", "b", "c"])
    base = models.bert.from_hf(config)
    adapters = {"x": jp.lora(rank=2, targets="attention"), "y": jp.lora(rank=4)}
    method = jp.several(adapters)
    model, trainable, rest = jp.setup(method, base, base.init(jax.random.key(0), {}), jax.random.key(1))
    trainable = {path: leaf + 0.1 for path, leaf in trainable.items()}
    names, rng = ["y", "x", None, "y"], np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 61, (4, 8)).astype(np.int32),
        "labels": np.array([0, 2, 1, 1], np.int32),
        "weights": np.array([1, 1, 1, 0], np.float32),
        "adapter": several.rows(adapters, names),
    }
    objective = objective_of(model, method, {**trainable, **rest}, jp.classification_loss)
    found = jax.jit(lambda t: objective.value_and_grad(t, rest, batch, jax.random.key(0), None)[1])(trainable)
    whole = several.alone(tree.combine(trainable, rest), adapters, "y")
    single, leaves, frozen = jp.setup(adapters["y"], base, whole, jax.random.key(0))
    rows = {field: x[np.array([0, 3])] for field, x in batch.items() if field != "adapter"}
    alone = lambda t: jp.classification_loss(single, tree.combine(t, frozen), rows)[0]
    for path, gradient in jax.jit(jax.grad(alone))(leaves).items():
        np.testing.assert_allclose(found[path.replace("/lora/", "/several/y/")], gradient, rtol=1e-3, atol=1e-6)


def test_dropout_is_each_adapters_own(made):
    """Rows of an adapter without dropout are those of a pass without a key."""
    dropping = {**ADAPTERS, "wide": jp.lora(rank=7, targets="qv", rslora=True, dropout=0.5)}
    model, *_ = jp.setup(jp.several(dropping), *tiny.model(), jax.random.key(0))
    _, _, trainable, rest = made
    apply = jax.jit(model.apply)
    plain, dropped, other = (
        apply(tree.combine(trainable, rest), BATCH, key) for key in (None, jax.random.key(1), jax.random.key(2))
    )
    wide = np.array([name == "wide" for name in NAMES])
    np.testing.assert_allclose(dropped[~wide], plain[~wide], rtol=1e-4, atol=1e-5)
    assert np.abs(dropped - plain)[wide].max() > 0.01 and np.abs(dropped - other)[wide].max() > 0.01


def test_batches_of_several_data_are_one(made):
    """Of different lengths, too: what is padded counts for nothing."""
    _, model, trainable, rest = made
    batches = {"fa": tiny.batch(rows=2, length=9), None: tiny.batch(rows=1, length=16), "small": tiny.batch(rows=3)}
    whole = several.together(ADAPTERS, batches)
    assert whole["adapter"].tolist() == [2, 2, -1, 0, 0, 0] and whole["tokens"].shape == (6, 16)
    found = np.asarray(model.apply(tree.combine(trainable, rest), whole))
    expected = model.apply(tree.combine(trainable, rest), {**batches["fa"], "adapter": whole["adapter"][:2]})
    np.testing.assert_allclose(found[:2, :9], expected, rtol=1e-4, atol=1e-4)
    assert not whole["loss_weights"][:2, 9:].any() and not whole["segment_ids"][:2, 9:].any()
    with pytest.raises(InputError, match="the batch of 'small' has fields tokens; 'fa': loss_weights"):
        several.together(ADAPTERS, {"fa": tiny.batch(), "small": {"tokens": tiny.batch()["tokens"]}})
    with pytest.raises(InputError, match="no adapter is called 'large'"):
        several.together(ADAPTERS, {"large": tiny.batch()})


def test_a_batch_says_whose_its_rows_are(made):
    method, model, trainable, rest = made
    state = jp.init_state(method, optax.sgd(1.0), trainable, rest, jax.random.key(0), model)
    step = jp.make_train_step(model, method, optax.sgd(1.0))
    with pytest.raises(InputError, match="it has no field 'adapter'"):
        step(state, tiny.batch(rows=len(NAMES)))
