"""SPEFT: each metric against gradients of full fine-tuning, packed kernels, the state's bytes, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import speft
from jaxpeft.quant import is_packed
from tests import tiny

KEY, SITE = jax.random.key(0), "layers/mlp/up_proj"
BATCHES = [tiny.batch(rows=2, seed=seed) for seed in (1, 2)]


def start(metric, params=None, **options):
    base, own = tiny.model()
    method = jp.speft(0.03, metric, ["up_proj"], **options)
    return method, *jp.setup(method, base, params or own, KEY, batches=lambda: iter(BATCHES))


@functools.cache
def gradient_of():
    base, params = tiny.model()
    flat = tree.flatten(params)
    of = lambda kernel, batch: jp.completion_loss(base, tree.unflatten({**flat, f"{SITE}/kernel": kernel}), batch)[0]
    gradient = jax.jit(jax.grad(of))
    return lambda batch: np.asarray(gradient(flat[f"{SITE}/kernel"], batch), np.float64)


@functools.cache
def expected(metric):
    """(L, n m) salience by NumPy, of autodiff's gradients of the kernel."""
    w = np.asarray(tree.flatten(tiny.model()[1])[f"{SITE}/kernel"], np.float64)
    g = sum(map(gradient_of(), BATCHES)) / 2
    rows = [{name: x[i : i + 1] for name, x in batch.items()} for batch in BATCHES for i in range(2)]
    found = {
        "gradient": lambda: abs(g),
        "saliency": lambda: abs(w * g),
        "skeletonization": lambda: -w * g,
        "taylor": lambda: (w * g) ** 2,
        "fisher": lambda: sum(gradient_of()(row) ** 2 for row in rows) / 4,
        "magnitude": lambda: abs(w),
    }[metric]()
    return found.reshape(len(w), -1)


@pytest.mark.parametrize("metric", [*speft.OF_GRADIENTS, "magnitude"])
def test_the_most_salient_entries_train(metric):
    """All that are taken lie above all that are not, within the rounding of two ways to the same gradient."""
    _, _, _, rest = start(metric)
    index = np.asarray(rest[f"{SITE}/speft/index"])
    assert index.shape == (3, int(0.03 * 32 * 56)) and index.dtype == np.int32 and (np.diff(index) > 0).all()
    for own, salience in zip(index, expected(metric), strict=True):
        others = np.delete(salience, own)
        assert salience[own].min() >= others.max() - 1e-4 * abs(salience).max()
    assert (index[0] != index[1]).any()


def test_the_gradient_is_the_kernels_at_the_entries():
    _, model, trainable, rest = start("gradient")
    loss = lambda trainable: jp.completion_loss(model, jp.combine(trainable, rest), BATCHES[0])[0]
    found = jax.jit(jax.grad(loss))(trainable)[f"{SITE}/speft/values"]
    whole = gradient_of()(BATCHES[0]).reshape(3, -1)
    at = np.take_along_axis(whole, np.asarray(rest[f"{SITE}/speft/index"]), axis=1)
    np.testing.assert_allclose(found, at, rtol=1e-4, atol=1e-5 * np.abs(at).max())


def test_the_state_is_16_bytes_of_an_entry():
    method, model, trainable, rest = start("random")
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    own = {path: leaf for path, leaf in state.frozen.items() if "/speft/" in path}
    counter = 4
    assert tree.num_bytes((state.trainable, own, state.opt_state)) == 3 * int(0.03 * 32 * 56) * 16 + counter


@pytest.mark.slow
def test_packed_kernels_are_scored_and_stay_packed():
    base, params = tiny.model(hidden_size=64, intermediate_size=128)
    method = jp.chain(jp.quantize("int8"), jp.speft(0.01, "saliency", ["up_proj"]))
    _, _, rest = jp.setup(method, base, params, KEY, batches=lambda: iter(BATCHES))
    assert is_packed(rest[f"{SITE}/kernel"])
    plain = jp.speft(0.01, "saliency", ["up_proj"])
    _, _, dense = jp.setup(plain, base, params, KEY, batches=lambda: iter(BATCHES))
    ours, theirs = (np.asarray(leaves[f"{SITE}/speft/index"]) for leaves in (rest, dense))
    same = [len(set(a) & set(b)) / len(a) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    assert min(same) > 0.5  # int8 changes the weights by less than a hundredth, and few of the choices


def test_entries_that_are_there_stay():
    """As of an adapter's file; without batches, where a run is planned, shapes are those of a choice."""
    base, params = tiny.model()
    own = jnp.arange(3 * 53, dtype=jnp.int32).reshape(3, 53)
    adapted = tree.unflatten({**tree.flatten(params), f"{SITE}/speft/index": own})
    np.testing.assert_array_equal(start("gradient", adapted)[3][f"{SITE}/speft/index"], own)
    method = jp.speft(0.03, targets=["up_proj"])
    planned = jax.eval_shape(lambda p: jp.setup(method, base, p, KEY, batches=lambda: ())[2], params)
    assert planned[f"{SITE}/speft/index"].shape == own.shape


RATE, REFRESHED = 0.01, {"metric": "saliency", "refresh": 4}


def refreshed(dtype=jnp.float32):
    base, params = tiny.model(dtype)
    method = jp.speft(0.03, targets=["up_proj"], **REFRESHED)
    model, trainable, rest = jp.setup(method, base, params, KEY, batches=lambda: iter(BATCHES))
    return method, model, jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_choice_has_no_entry_twice_and_changes_no_product(data):
    """Of any entries and values; numbers are quarters, so that sums are exact. What stays keeps its place and value."""
    n, m, k = 4, 6, 5
    index = np.array(data.draw(st.lists(st.integers(0, n * m - 1), min_size=k, max_size=k, unique=True)), np.int32)
    values = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=k, max_size=k)), np.float32) / 4
    w, g = (np.array(data.draw(st.permutations(range(1, n * m + 1))), np.float32).reshape(n, m) for _ in range(2))
    found = jax.jit(speft._chosen, static_argnums=4)(index, values, w, g, "saliency")
    new, fresh = np.asarray(found["index"]), np.asarray(found["fresh"])
    merged = w.reshape(-1).copy()
    merged[index] += values
    salience = abs(merged * g.reshape(-1))
    others = np.delete(salience, new)
    assert len(set(new.tolist())) == k and salience[new].min() >= others.max()
    np.testing.assert_array_equal(new[~fresh], index[~fresh])
    assert not set(new[fresh].tolist()) & set(index.tolist())
    again = np.array(jax.jit(speft.folded)(w, index, np.where(fresh, values, 0))).reshape(-1)
    again[new[~fresh]] += values[~fresh]
    np.testing.assert_array_equal(again, merged)
    np.testing.assert_array_equal(found["mean"], np.where(fresh, g.reshape(-1)[new], 0))


@pytest.mark.slow
def test_refreshed_masks_by_numpy():
    """Entries, values, moments and kernels after each of 9 steps, of the gradients of the merged models."""
    method, model, state = refreshed()
    step = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=RATE, accumulate=2))
    base, k, own = tiny.model()[0], int(0.03 * 32 * 56), f"{SITE}/speft/"
    loss = lambda flat, batch: jp.completion_loss(base, tree.unflatten(flat), batch)[0]
    gradient = jax.jit(jax.grad(loss))
    index = np.asarray(state.moved[f"{own}index"])
    active = [dict.fromkeys(of_layer.tolist(), (0.0, 0.0, 0.0)) for of_layer in index]
    kernels = np.asarray(state.moved[f"{SITE}/kernel"], np.float64).reshape(3, -1).copy()
    picks, exchanged = {4: 0, 5: 1, 6: 2, 8: 0}, 0
    for number in range(9):
        merged = tree.flatten(method.merge(state.params))
        g = np.asarray(gradient(merged, tiny.batch(seed=number))[f"{SITE}/kernel"], np.float64).reshape(3, -1)
        state, _ = step(state, tiny.batch(seed=number))
        bias = 1 - 0.9 ** (number + 1), 1 - 0.999 ** (number + 1)
        for layer in range(3):
            now = kernels[layer].copy()
            now[list(active[layer])] += [v for v, _, _ in active[layer].values()]
            new = {}
            for e, (value, mean, square) in active[layer].items():
                mean, square = 0.9 * mean + 0.1 * g[layer, e], 0.999 * square + 0.001 * g[layer, e] ** 2
                new[e] = value - RATE * mean / bias[0] / (np.sqrt(square / bias[1]) + 1e-8), mean, square
            if picks.get(number) == layer:
                best = set(np.argsort(-abs(now * g[layer]))[:k].tolist())
                for e in set(new) - best:
                    kernels[layer, e] += new.pop(e)[0]
                    exchanged += 1
                new |= {e: (0.0, g[layer, e] * bias[0], g[layer, e] ** 2 * bias[1]) for e in best - set(new)}
            active[layer] = new
        index = np.asarray(state.moved[f"{own}index"])
        adam = state.opt_state
        for layer in range(3):
            assert len(set(index[layer].tolist())) == k and set(index[layer].tolist()) == set(active[layer])
            wanted = np.array([active[layer][e] for e in index[layer].tolist()]).T
            found = [leaf[f"{own}values"][layer] for leaf in (state.trainable, adam.mu, adam.nu)]
            for ours, theirs in zip(found, wanted, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3 * abs(theirs).max() + 1e-12)
        np.testing.assert_allclose(state.moved[f"{SITE}/kernel"].reshape(3, -1), kernels, rtol=1e-5, atol=1e-4)
    assert exchanged > k  # of four choices; else nothing above is told


def test_refreshed_state_and_a_dense_gradient_of_one_layer():
    """Kernels in bf16 are in the state once and in their dtype; float32 arrays of a kernel's shape are one layer's."""
    method, model, state = refreshed(jnp.bfloat16)
    own = {path: leaf for path, leaf in state.moved.items() if "speft/" in path}
    counters = 4 + 4
    assert tree.num_bytes((state.trainable, own, state.opt_state)) == 3 * int(0.03 * 32 * 56) * 16 + counters
    assert set(state.moved) - set(own) == {f"{SITE}/kernel"} and state.moved[f"{SITE}/kernel"].dtype == jnp.bfloat16
    text = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=RATE)).lower(state, tiny.batch())
    assert "tensor<32x56xf32>" in text.as_text() and "x32x56xf32>" not in text.as_text()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(
            lambda: jp.quantize("int8"),
            "speft: layers/mlp/up_proj is quantized, and cannot take up what refresh folds",
            marks=pytest.mark.slow,
        ),
        (jp.mezo, "speft's refresh chooses by gradients, and mezo has no backward pass"),
        (lambda: jp.lisa(1), "speft's values are differentiated whole, and layers/mlp/up_proj/speft/values would be"),
        (lambda: jp.full("all"), "speft's refresh folds into layers/mlp/up_proj/kernel, which would be trained"),
    ],
)
def test_chains_that_refresh_refuses(other, message):
    base, params = tiny.model(hidden_size=64, intermediate_size=128)
    made, own = other(), jp.speft(0.03, "saliency", ["up_proj"], refresh=4)
    chained = jp.chain(made, own) if "quantized" in message else jp.chain(own, made)
    with pytest.raises(jp.InputError, match=re.escape(message)):
        jp.setup(chained, base, params, KEY, batches=lambda: iter(BATCHES[:1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": -1}, "speft: refresh -1 must be at least 0"),
        ({"refresh": 9, "metric": "fisher"}, "speft: refresh chooses by a step's gradient, and metric 'fisher' is of"),
        ({"refresh": 9, "metric": "random"}, "speft: refresh chooses by a step's gradient, and metric 'random' is of"),
        ({"density": 0.0}, "speft: density 0.0 must be above 0 and at most 0.5"),
        ({"metric": "synflow"}, "speft: metric 'synflow' is not one of gradient, saliency"),
        ({}, "speft: metric 'gradient' starts from data: setup(..., batches=...)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=re.escape(message)):
        jp.setup(jp.speft(**options), *tiny.model(), KEY)
