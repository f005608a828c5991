"""Hybrid: the last layers' gradients by autodiff, the estimate of the rest in numpy; what it keeps, what it refuses."""

import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries
from jaxpeft.train.optimizer import make_direction
from tests import beside, tiny
from tests.methods.estimates import RUN, SGD, z_of_step

BATCH, EPS, RATE, RATIO, DECAY = tiny.batch(), 1e-2, 1e-3, 0.25, 0.1
LAYERS = 2
DEEP = "layers_1_2"
ROUNDING = 5e-7  # of a loss near 5


def start(method, optimizer=SGD, dtype=jnp.float32, away=False):
    base, params = tiny.model(dtype, num_hidden_layers=LAYERS)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    trainable = beside.moved(trainable) if away else trainable
    return model, jp.init_state(method, optimizer, trainable, rest, RUN, model)


def by_hand(model, state, deep, others):
    """(loss, gradients of `deep`, slope along z of `others`, z) at the state's leaves."""
    z = z_of_step(others)

    @jax.jit
    @jax.value_and_grad
    def loss(deep, others):
        return jp.completion_loss(model, tree.unflatten({**state.leaves, **others, **deep}), BATCH)[0]

    at = lambda far: {path: jnp.float32(leaf + far * z[path]) for path, leaf in others.items()}
    (up, _), (down, _), (value, grads) = (loss(deep, at(far)) for far in (EPS, -EPS, 0))
    return value, grads, (float(up) - float(down)) / (2 * EPS), z


@pytest.fixture(scope="module")
def alone():
    """(model, state, compiled step) in which the weights themselves train and move."""
    method = jp.hybrid(eps=EPS, lr_ratio=RATIO)
    model, state = start(method)
    return model, state, jax.jit(jp.make_train_step(model, method, SGD, rate=RATE, weight_decay=DECAY))


def test_a_step_is_a_gradient_and_an_estimate(alone):
    """Each with its rate, and the decay; the loss is that of the weights as they are."""
    model, state, step = alone
    assert {path.split("/")[0] for path in state.trainable} == {DEEP} and not state.frozen
    assert {path.split("/")[0] for path in state.moved} == {"layers_0_1", "embed_tokens", "norm", "lm_head"}
    loss, grads, slope, z = by_hand(model, state, state.trainable, state.moved)
    after, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["slope"], slope, atol=ROUNDING / EPS)
    decay = lambda path: 0 if path.endswith(("scale", "bias")) else DECAY
    for path, leaf in state.trainable.items():
        expected = leaf - RATE * (grads[path] + decay(path) * leaf)
        np.testing.assert_allclose(after.trainable[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)
    for path, leaf in state.moved.items():
        expected = leaf - RATIO * RATE * (float(metrics["slope"]) * z[path] + decay(path) * np.asarray(leaf))
        np.testing.assert_allclose(after.moved[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_restored_state_goes_on_exactly(alone):
    _, state, step = alone
    second, _ = step(step(state, BATCH)[0], BATCH)
    first = step(state, BATCH)[0]._replace(key=None)
    again, _ = step(jax.tree.map(jnp.array, jax.device_get(first))._replace(key=RUN), BATCH)
    chex.assert_trees_all_equal(again._replace(key=None), second._replace(key=None))


def test_merging_joins_the_layers(alone):
    _, state, _ = alone
    chex.assert_trees_all_equal(jp.hybrid().merge(state.params), tiny.model(num_hidden_layers=LAYERS)[1])


@pytest.mark.slow
def test_in_a_chain_the_last_layers_alone_have_moments():
    """LoRA's factors there step by Adam, the others by ratio slope z, which Adam does not see."""
    adam = make_direction("adam", clip=None)
    method = jp.chain(jp.hybrid(eps=EPS, lr_ratio=RATIO), jp.lora(2, targets="q_proj,up_proj"))
    model, state = start(method, adam, away=True)
    deep, others = tree.split(state.trainable, lambda path: path.startswith(DEEP))
    assert others and {path.split("/")[0] for path in others} == {"layers_0_1"} and not state.moved
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * tree.size(deep)
    _, grads, slope, z = by_hand(model, state, deep, others)
    after, metrics = jax.jit(jp.make_train_step(model, method, adam, rate=RATE))(state, BATCH)
    np.testing.assert_allclose(metrics["slope"], slope, atol=ROUNDING / EPS)
    own = optax.adam(RATE)
    steps, _ = own.update(grads, own.init(deep))
    for path, leaf in deep.items():
        np.testing.assert_allclose(after.trainable[path] - leaf, steps[path], rtol=1e-2, atol=1e-5, err_msg=path)
    for path, leaf in others.items():
        expected = leaf - RATIO * RATE * float(metrics["slope"]) * z[path]
        np.testing.assert_allclose(after.trainable[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_costs_two_evaluations_beside_the_last_layers():
    """The products of `full(which="last:K")` and of two forward passes; what is kept does not grow with the depth."""

    def cost(method, layers=2):
        return planner.cost(planner.make_step({**tiny.CONFIG, "num_hidden_layers": layers}, method, 4, 16))

    own, last, mezo = map(cost, (jp.hybrid(), jp.full("last:1"), jp.mezo()))
    assert own.flops == last.flops + mezo.flops
    assert own.activations == last.activations == cost(jp.hybrid(), 4).activations


def test_refusals():
    for bad, said in (
        ({"which": "norms"}, "hybrid: which 'norms': write last:K"),
        ({"which": "last:0"}, "which 'last:0': write last:K with a whole number"),
        ({"eps": 0.0}, "hybrid: eps 0.0 must be a finite number above 0"),
        ({"lr_ratio": 0.0}, "hybrid: lr_ratio 0.0 must be a finite number above 0"),
        ({"lr_ratio": float("nan")}, "hybrid: lr_ratio nan must be a finite number above 0"),
        ({"rounding": "up"}, "hybrid: rounding 'up' is not one of"),
        ({"seeds": 0}, "hybrid: seeds 0 must be from 1 to 1024"),
        ({"seeds": 1025}, "hybrid: seeds 1025 must be from 1 to 1024"),
    ):
        with pytest.raises(jp.InputError, match=f"^{said}"):
            jp.hybrid(**bad)
    with pytest.raises(jp.InputError, match="which 'last:9': the model has 2 layers"):
        start(jp.hybrid("last:9"))

    def trace(method, rate: float | None = RATE):
        model, state = start(method)
        jax.eval_shape(jp.make_train_step(model, method, SGD, rate=rate), state, BATCH)

    for method, said in (
        (jp.chain(jp.hybrid(), jp.full("^layers_0")), "nothing trains in the layers of which=last:1; put mezo in its"),
        (jp.chain(jp.hybrid(), jp.full("^layers_1")), "nothing trains beside the layers of which=last:1; leave"),
        (jp.chain(jp.hybrid(), jp.mezo()), "stands in front of what replaces the gradient; put hybrid last"),
        (jp.chain(jp.mezo(), jp.hybrid(), jp.lora(1)), "stands behind a method that estimates the gradient, too"),
        (jp.chain(jp.quantize("int8", group=8, targets="up_proj"), jp.hybrid(), jp.full("mlp")), None),
    ):
        with pytest.raises(jp.InputError, match=f"^hybrid: {said}" if said else "is packed and trains"):
            trace(method)
    with pytest.raises(jp.InputError, match="^hybrid: .* give make_train_step a rate"):
        trace(jp.hybrid(), rate=None)


@pytest.mark.slow
def test_micro_batches_give_the_same_step(alone):
    """Of equal weights."""
    model, state, step = alone
    method = jp.hybrid(eps=EPS, lr_ratio=RATIO)
    parts = jax.jit(jp.make_train_step(model, method, SGD, accumulate=2, rate=RATE, weight_decay=DECAY))
    (one, said), (two, expected) = parts(state, BATCH), step(state, BATCH)
    np.testing.assert_allclose(said["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(said["slope"], expected["slope"], atol=2 * ROUNDING / EPS)
    for path, leaf in two.trainable.items():
        np.testing.assert_allclose(one.trainable[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="no compiler for GPUs is installed")
def test_compiled_for_an_h200():
    """A model of 1.2B: of all but one layer neither activations nor gradients, masters and moments; beside MeZO's step
    that layer's own, and the workspace of its backward pass.
    """
    target, config = targets.target("h200"), geometries.load("llama3.2-1b")
    row = lambda method: planner.row(planner.make_step(config, method, 4, 1024), target)["bytes"]
    own, last, mezo = map(row, (jp.hybrid(), jp.full("last:1"), jp.mezo()))
    for name in ("activations", "gradients", "optimizer", "weights"):
        assert own[name] == last[name], name
    more = sum(own[name] - mezo[name] for name in ("activations", "gradients", "optimizer", "weights"))
    assert own["total"] <= max(mezo["total"] + more, last["total"]) + mezo["workspace"]
