"""SparseGrad: U, V and entries against NumPy's SVD of autodiff's gradients, choices in a run, bytes, refusals."""

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
from jaxpeft.methods import sparsegrad
from tests import tiny

KEY, SITE, NAME = jax.random.key(0), "layers/mlp/up_proj", "sparsegrad/layers.mlp.up_proj"
BATCHES = [tiny.batch(rows=2, seed=seed) for seed in (1, 2)]
K, RATE = int(0.03 * 32 * 56), 0.01


def start(dtype=jnp.float32, **options):
    method = jp.sparsegrad(0.03, targets=["up_proj"], **options)
    return method, *jp.setup(method, *tiny.model(dtype), KEY, batches=lambda: iter(BATCHES))


@functools.cache
def gradient():
    """(flat parameters, batch) -> dW (L, n, m) of the site's kernels by autodiff."""
    base = tiny.model()[0]
    of = lambda own, flat, batch: jp.completion_loss(base, tree.unflatten({**flat, f"{SITE}/kernel": own}), batch)[0]
    made = jax.jit(jax.grad(of))
    return lambda flat, batch: np.asarray(made(flat[f"{SITE}/kernel"], flat, batch), np.float64)


@functools.cache
def begun():
    return start()


def test_the_basis_is_that_of_the_higher_order_svd_and_the_entries_the_largest_in_it():
    rest, flat = begun()[3], tree.flatten(tiny.model()[1])
    each = [gradient()(flat, batch) for batch in BATCHES]
    stacked = np.concatenate(each)  # of layers and batches
    u, v = (np.asarray(rest[f"{NAME}/{name}"], np.float64) for name in "uv")
    for found, unfolded in ((u, np.concatenate(list(stacked), 1)), (v, np.concatenate([g.T for g in stacked], 1))):
        size = len(found)
        np.testing.assert_allclose(found.T @ found, np.eye(size), atol=1e-5)
        values = np.linalg.svd(unfolded, compute_uv=False)
        energy = np.linalg.norm(found.T @ unfolded, axis=1)  # of each direction: the singular values, descending
        np.testing.assert_allclose(energy[: len(values)], values, rtol=1e-3, atol=1e-3 * values[0])
    index = np.asarray(rest[f"{SITE}/sparsegrad/index"])
    assert index.shape == (3, K) and index.dtype == np.int32 and (np.diff(index) > 0).all()
    for own, g in zip(index, sum(each), strict=True):
        turned = abs(u.T @ g @ v).reshape(-1)
        assert turned[own].min() >= np.delete(turned, own).max() - 1e-4 * turned.max()
        share = (turned[own] ** 2).sum() / (turned**2).sum()
        plain = np.sort((g**2).reshape(-1))[-K:].sum() / (g**2).sum()
        assert share > plain  # what the basis is for: as many entries hold more of the gradient


def test_the_gradient_is_that_of_the_turned_kernel_at_the_entries():
    _, model, trainable, rest = begun()
    loss = lambda trainable: jp.completion_loss(model, jp.combine(trainable, rest), BATCHES[0])[0]
    found = jax.jit(jax.grad(loss))(trainable)[f"{SITE}/sparsegrad/values"]
    u, v = (np.asarray(rest[f"{NAME}/{name}"], np.float64) for name in "uv")
    turned = u.T @ gradient()(tree.flatten(tiny.model()[1]), BATCHES[0]) @ v
    at = np.take_along_axis(turned.reshape(3, -1), np.asarray(rest[f"{SITE}/sparsegrad/index"]), axis=1)
    np.testing.assert_allclose(found, at, rtol=1e-3, atol=1e-5 * abs(at).max())


def test_the_state_is_16_bytes_of_an_entry_and_two_matrices_of_a_site():
    method, model, trainable, rest = begun()
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    own = {path: leaf for path, leaf in state.frozen.items() if "sparsegrad/" in path}
    counter = 4
    held = 3 * K * 16 + 4 * (32**2 + 56**2) + counter
    assert tree.num_bytes((state.trainable, own, state.opt_state)) == held


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_choice_has_no_entry_twice_and_changes_no_product(data):
    """Of any entries and values: what the kernel takes up is what has left; what stays keeps its place and value."""
    n, m, k = 4, 6, 5
    index = np.array(data.draw(st.lists(st.integers(0, n * m - 1), min_size=k, max_size=k, unique=True)), np.int32)
    values = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=k, max_size=k)), np.float32) / 4
    g = np.array(data.draw(st.permutations(range(1, n * m + 1))), np.float32).reshape(n, m)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(n, m)).astype(np.float32)
    u, v = (np.linalg.qr(rng.normal(size=(size, size)))[0].astype(np.float32) for size in (n, m))
    found = jax.jit(sparsegrad._chosen)(index, values, w, g)
    new, fresh = np.asarray(found["index"]), np.asarray(found["fresh"])
    assert len(set(new.tolist())) == k and set(new.tolist()) == set(np.argsort(-g.reshape(-1))[:k].tolist())
    np.testing.assert_array_equal(new[~fresh], index[~fresh])
    again = np.asarray(jax.jit(sparsegrad.folded)(w, index, np.where(fresh, values, 0), u, v, KEY))

    def whole(w, index, values):
        s = np.zeros(n * m)
        s[index] = values
        return w + u @ s.reshape(n, m) @ v.T

    np.testing.assert_allclose(whole(again, new, np.where(fresh, 0, values)), whole(w, index, values), atol=1e-5)
    np.testing.assert_array_equal(found["mean"], np.where(fresh, g.reshape(-1)[new], 0))
    np.testing.assert_array_equal(found["square"], np.where(fresh, g.reshape(-1)[new] ** 2, 0))


def test_a_kernel_in_bfloat16_takes_up_small_changes_on_average():
    """A change of a sixteenth of a last place, which rounding to the nearest would lose: the mean over 4096 numbers."""
    w = jnp.ones((64, 64), jnp.bfloat16)
    found = sparsegrad.folded(w, jnp.arange(64 * 64), jnp.full(64 * 64, 2.0**-11), jnp.eye(64), jnp.eye(64), KEY)
    mean = np.asarray(found, np.float64).mean() - 1
    deviation = 2**-7 * np.sqrt(1 / 16 * 15 / 16 / 64**2)  # of the mean of numbers that go up once in 16 times
    assert found.dtype == jnp.bfloat16 and abs(mean - 2.0**-11) < 5 * deviation


@pytest.mark.slow
def test_a_run_that_refreshes():
    """Each choice is of the step's own |dW'|, of both micro-batches; the merged model moves by the optimizer alone."""
    method, model, trainable, rest = start(refresh=4)
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    step = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=RATE, accumulate=2))
    u, v = (np.asarray(rest[f"{NAME}/{name}"], np.float64) for name in "uv")
    picks, exchanged = {4: 0, 5: 1, 6: 2, 8: 0}, 0
    for number in range(9):
        batch, merged = tiny.batch(seed=number), tree.flatten(method.merge(state.params))
        before = np.asarray(state.moved[f"{SITE}/sparsegrad/index"])
        state, _ = step(state, batch)
        index, after = np.asarray(state.moved[f"{SITE}/sparsegrad/index"]), tree.flatten(method.merge(state.params))
        turned = u.T @ gradient()(merged, batch) @ v
        moved = u.T @ np.asarray(after[f"{SITE}/kernel"] - merged[f"{SITE}/kernel"], np.float64) @ v
        for layer in range(3):
            own, flat = index[layer], abs(turned[layer]).reshape(-1)
            assert len(set(own.tolist())) == K
            others = np.delete(moved[layer].reshape(-1), before[layer])
            assert abs(others).max() < 2e-5 and abs(moved[layer]).max() <= 5 * RATE
            if picks.get(number) == layer:
                assert flat[own].min() >= np.delete(flat, own).max() - 1e-3 * flat.max()
                exchanged += len(set(own.tolist()) - set(before[layer].tolist()))
            else:
                np.testing.assert_array_equal(own, before[layer])
    assert exchanged > K  # of four choices; else nothing above is told


def test_a_dense_gradient_of_one_layer():
    method, model, trainable, rest = start(jnp.bfloat16, refresh=4)
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    assert state.moved[f"{SITE}/kernel"].dtype == jnp.bfloat16
    text = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=RATE)).lower(state, tiny.batch())
    assert "tensor<32x56xf32>" in text.as_text() and "x32x56xf32>" not in text.as_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.6}, "sparsegrad: density 0.6 must be above 0 and at most 0.5"),
        ({"density": 1e-5}, "sparsegrad: density 1e-05 leaves layers/mlp/down_proj empty, a kernel of 56 x 32"),
        ({"metric": "fisher"}, "sparsegrad: metric 'fisher' is not one of gradient, magnitude"),
        ({"metric": "gradient"}, "sparsegrad: metric 'gradient' starts from data: setup(..., batches=...)"),
        ({"refresh": -1}, "sparsegrad: refresh -1 must be at least 0"),
        ({"refresh": 2}, "sparsegrad: refresh 2 must be at least 3: that many layers take turns"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=re.escape(message)):
        jp.setup(jp.sparsegrad(**{"metric": "magnitude", **options}), *tiny.model(), KEY)
