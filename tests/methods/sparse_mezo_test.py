"""Sparse MeZO: its threshold by sorting, its steps on whole leaves in numpy, its estimate, its memory, its refusals."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import noise, tree, zeroth_order
from jaxpeft.memory import planner, targets
from jaxpeft.methods.sparse_mezo import SCOPE, threshold
from jaxpeft.models import geometries
from jaxpeft.train.step import objective_of
from tests import tiny
from tests.methods.estimates import BATCH, EPS, RATE, SGD, by_hand, start, z_of_step

SPARSITY = 0.75


def masks(leaves, thresholds):
    """m of whole leaves."""
    shaped = lambda path: thresholds[path].reshape(-1, *[1] * (leaves[path].ndim - 1))
    of = lambda path: shaped(path) if tree.stacked(path) else thresholds[path]
    return {path: np.abs(np.asarray(leaf, np.float32)) <= of(path) for path, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_threshold_is_the_kth_smallest_magnitude(dtype):
    rng = np.random.default_rng(0)
    several = (rng.normal(size=(37, 5)), rng.integers(-3, 4, (8, 9)) * 0.1, np.zeros((2, 3)), np.ones(7))
    for w in (jnp.asarray(w, dtype) for w in several):
        for share in (0.25, 1.0, 1e-6):
            ordered = np.sort(np.abs(np.asarray(w, np.float32)), axis=None)
            assert threshold(w, share) == ordered[max(round(share * w.size), 1) - 1]


@pytest.fixture(scope="module")
def run():
    """(model, states before, between and after two steps, metrics of both)."""
    method = jp.sparse_mezo(sparsity=SPARSITY, eps=EPS)
    model, state = start(method, num_hidden_layers=2, tie_word_embeddings=True)
    step = jax.jit(jp.make_train_step(model, method, SGD, rate=RATE))
    states, said = [state], []
    for _ in range(2):
        state, metrics = step(state, BATCH)
        states.append(state)
        said.append(metrics)
    return model, states, said


def test_steps_are_those_of_whole_leaves_in_numpy(run):
    """Masks are those of the weights as they are, by thresholds of the start; what is masked keeps its bits."""
    model, states, said = run
    thresholds = {path.removeprefix(SCOPE): leaf for path, leaf in states[0].frozen.items()}
    for path, leaf in states[0].moved.items():
        for h, w in zip(np.atleast_1d(thresholds[path]), leaf if tree.stacked(path) else leaf[None], strict=True):
            assert h == np.sort(np.abs(w), axis=None)[round((1 - SPARSITY) * w.size) - 1]
    for number, metrics in enumerate(said):
        before, after = states[number].moved, states[number + 1].moved
        mask = masks(before, thresholds)
        z = {path: mask[path] * z for path, z in z_of_step(before, number).items()}
        mean, slope = by_hand(model, states[number], before, z)
        np.testing.assert_allclose([metrics["loss"], metrics["slope"]], [mean, slope], rtol=2e-3, atol=1e-3)
        for path, leaf in before.items():
            expected = leaf - RATE * float(metrics["slope"]) * z[path]
            np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)
            np.testing.assert_array_equal(after[path][~mask[path]], leaf[~mask[path]])
            if number == 0 and leaf.ndim - tree.stacked(path) > 1:  # a quarter, of sizes that 4 divides
                assert mask[path].mean() == pytest.approx(1 - SPARSITY, abs=1e-3)


def test_a_weight_that_grows_past_its_threshold_stays(run):
    """Norms' scales are all at their threshold at first; about half have grown beyond it."""
    _, states, _ = run
    first, last = states[1].moved["norm/scale"], states[2].moved["norm/scale"]
    grown = np.asarray(first > 1)
    assert 0.2 < grown.mean() < 0.8
    np.testing.assert_array_equal(first[grown], last[grown])
    assert np.all(first[~grown] != last[~grown])


def test_the_estimate_is_the_gradient_where_weights_are_small():
    """Of n estimates of k numbers, as in mezo_test; elsewhere it is zero."""
    n, path = 500, "layers/self_attn/v_proj/kernel"
    method = jp.sparse_mezo(f"^{path}$", SPARSITY, seeds=n)
    model, state = start(method, num_hidden_layers=1)
    key, leaf = jax.random.key(3), state.moved[path]
    objective = objective_of(model, method, state.leaves)
    (_, aux), _ = jax.jit(objective.value_and_grad)({}, {**state.frozen, **state.moved}, BATCH, key, None)
    settings = zeroth_order.Settings("sparse_mezo", 1e-3, scope=SCOPE)
    along = lambda words: zeroth_order.direction(words, path, leaf, state.frozen, settings)
    of = jax.vmap(lambda words: along(words)[0](leaf, along(words)[1]))(noise.draw(key, n))
    estimate = np.tensordot(aux["slopes"], of, 1)[0] / n
    exact = jax.grad(lambda w: jp.completion_loss(model, tree.unflatten({**state.leaves, path: w}), BATCH)[0])(leaf)[0]
    small = masks({path: leaf}, {path: state.frozen[SCOPE + path]})[path][0]
    assert not estimate[~small].any()
    g, found = np.asarray(exact, np.float64)[small], estimate[small]
    np.testing.assert_allclose(found @ g / (g @ g), 1, atol=4 * np.sqrt(2 / n))
    cosine = found @ g / np.linalg.norm(g) / np.linalg.norm(found)
    np.testing.assert_allclose(cosine, 1 / np.sqrt(1 + (g.size + 1) / n), atol=0.05)


def test_refusals():
    for bad in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"eps": 0.0}, {"rounding": "up"}, {"seeds": 0}):
        with pytest.raises(jp.InputError, match="sparse_mezo: "):
            jp.sparse_mezo(**bad)
    method = jp.chain(jp.sparse_mezo(), jp.lora(1))
    model, state = start(method, num_hidden_layers=1)
    with pytest.raises(jp.InputError, match=r"sparse_mezo: does not estimate for .*/lora/a; put mezo in its place"):
        objective_of(model, method, state.leaves)
    both = jp.chain(jp.mezo("norms"), jp.sparse_mezo("norms"))
    model, state = start(both, num_hidden_layers=1)
    with pytest.raises(jp.InputError, match="sparse_mezo: stands behind a method that estimates"):
        objective_of(model, both, state.leaves)
    with pytest.raises(jp.InputError, match=r"sparse_mezo: layers/.*/kernel is quantized and cannot move"):
        start(jp.chain(jp.quantize("int8"), jp.sparse_mezo()), num_hidden_layers=1)


def test_state_is_one_number_per_tensor_and_layer():
    config = {**tiny.CONFIG, "num_hidden_layers": 2}
    step = planner.make_step(config, jp.sparse_mezo(), 4, 16)
    assert not step.backward and not step.state.trainable
    tensors = sum(leaf.shape[0] if tree.stacked(path) else 1 for path, leaf in step.state.moved.items())
    assert tree.num_bytes(step.state.frozen) == 4 * tensors
    cost = planner.cost(step)
    assert (cost.recompute_flops, cost.activations) == (0, 0)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="no compiler for GPUs is installed")
def test_figures():
    """Compiled for an H200: a model of 1.2B in MeZO's memory, where a mask of bits would be 147 MiB."""
    target, config = targets.target("h200"), geometries.load("llama3.2-1b")
    make = functools.partial(planner.make_step, config, batch_size=4, seq_len=1024)
    sparse, plain = (planner.row(make(method=method), target)["bytes"] for method in (jp.sparse_mezo(), jp.mezo()))
    assert sparse["total"] <= plain["total"] + 8 * 2**20
    assert sparse["gradients"] == sparse["activations"] == sparse["optimizer"] == 0
