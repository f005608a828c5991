"""SaRA: which entries train, the published gradient, what is settled to the bit, the nuclear norm, what is refused."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.quant import dense
from tests import tiny

KEY, SITE, K = jax.random.key(0), "layers/mlp/up_proj", int(0.05 * 32 * 56)
OWN = f"{SITE}/sara/"


def start(base=None, **options):
    method = jp.sara(0.05, targets=["up_proj"], **options)
    return method, *jp.setup(method, *(base or tiny.model()), KEY)


def kernels():
    return np.asarray(tree.flatten(tiny.model()[1])[f"{SITE}/kernel"])


def test_the_smallest_weights_train():
    _, _, trainable, rest = start()
    index, w = np.asarray(rest[f"{OWN}index"]), np.abs(kernels()).reshape(3, -1)
    assert index.dtype == np.int32 and trainable[f"{OWN}values"].shape == index.shape == (3, K)
    for own, size in zip(index, w, strict=True):
        assert sorted(own.tolist()) == sorted(np.argsort(size, kind="stable")[:K].tolist())


def test_a_threshold_is_a_bound_beside_the_density():
    """Entries above it have no gradient and stay zero, through decay of moments as well."""
    w = np.sort(np.abs(kernels()).reshape(3, -1))
    tau = float(w[:, K // 2].mean())
    method, model, trainable, rest = start(threshold=tau)
    trains = np.asarray(rest[f"{OWN}trains"])
    np.testing.assert_array_equal(trains.sum(axis=1), np.minimum((w <= np.float32(tau)).sum(axis=1), K))
    assert 0 < trains.mean() < 1
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    step = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=1e-3))
    state, _ = step(state, tiny.batch())
    np.testing.assert_array_equal(np.asarray(state.trainable[f"{OWN}values"]) != 0, trains)


def test_weights_that_have_grown_are_settled():
    """At the end of the third step, by |w + v| of NumPy; from then on they keep their bits, and the others go on."""
    method, model, trainable, rest = start(progressive=3)
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    step = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=2e-3))
    states = [state]
    for _ in range(5):
        state, _ = step(state, tiny.batch())
        states.append(state)
    index = np.asarray(rest[f"{OWN}index"])
    before = np.take_along_axis(kernels().reshape(3, -1), index, axis=1)
    small = np.abs(before + states[3].trainable[f"{OWN}values"]) <= np.abs(before).max(axis=1, keepdims=True)
    assert 0 < small.mean() < 1
    for done, state in enumerate(states):
        expected = small if done >= 3 else np.ones_like(small)
        np.testing.assert_array_equal(state.moved[f"{OWN}trains"], expected)
    for earlier, later in itertools.pairwise(states[3:]):
        changed = np.asarray(later.trainable[f"{OWN}values"] != earlier.trainable[f"{OWN}values"])
        np.testing.assert_array_equal(changed, small)
    counters = 4
    leaves = (state.trainable, state.moved, state.opt_state, state.frozen[f"{OWN}index"])
    assert tree.num_bytes(leaves) == 3 * K * 17 + counters


def test_the_penalty_is_the_nuclear_norm_of_what_trains():
    """By torch's decomposition, and its gradient; of one of the kernels, which the key draws."""
    method, model, _, rest = start(penalty=0.5)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, K)).astype(np.float32)
    trains = rng.random((3, K)) < 0.7
    rest = {**rest, f"{OWN}trains": jnp.asarray(trains)}
    index, norms, slopes = np.asarray(rest[f"{OWN}index"]), [], []
    for w, own, v, on in zip(kernels().reshape(3, -1), index, values, trains, strict=True):
        v = torch.tensor(v.astype(np.float64), requires_grad=True)
        there = torch.zeros(32 * 56, dtype=torch.float64)
        there = there.index_put((torch.tensor(own, dtype=torch.long),), (torch.tensor(w[own]) + v) * torch.tensor(on))
        norm = torch.linalg.svdvals(there.reshape(32, 56)).sum()
        norm.backward()
        norms.append(norm.item())
        slopes.append(v.grad.numpy())
    plain = lambda model, params, batch, key=None: (jnp.zeros(()), {"weight": jnp.ones(())})
    loss = method.loss(plain, None)
    of = lambda values, key: loss(model, jp.combine({f"{OWN}values": values}, rest), {}, key)
    function = jax.jit(jax.value_and_grad(of, has_aux=True))
    drawn = set()
    for seed in range(8):
        (value, _), slope = function(jnp.asarray(values), jax.random.key(seed))
        layer = int(np.argmin(np.abs(np.asarray(norms) - value / 0.5)))
        np.testing.assert_allclose(value, 0.5 * norms[layer], rtol=1e-4)
        expected = np.zeros_like(values)
        expected[layer] = 0.5 * slopes[layer]
        np.testing.assert_allclose(slope, expected, atol=1e-4)
        drawn.add(layer)
    assert drawn == {0, 1, 2}
    assert float(of(jnp.asarray(values), None)[0]) == 0


def test_packed_kernels_are_read_as_what_they_stand_for():
    base, params = tiny.model()
    method = jp.chain(jp.quantize("int8"), jp.sara(0.3, progressive=1, targets=["up_proj"]))
    model, trainable, rest = jp.setup(method, base, params, KEY)
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    step = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=1e-3))
    state, _ = step(state, tiny.batch())
    w = np.asarray(dense(rest[f"{SITE}/kernel"])).reshape(3, -1)
    before = np.take_along_axis(w, np.asarray(rest[f"{OWN}index"]), axis=1)
    small = np.abs(before + state.trainable[f"{OWN}values"]) <= np.abs(before).max(axis=1, keepdims=True)
    assert 0 < small.mean() < 1
    np.testing.assert_array_equal(state.moved[f"{OWN}trains"], small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.6}, "density 0.6 must be above 0 and at most 0.5"),
        ({"density": 1e-4}, "density 0.0001 leaves layers/mlp/down_proj empty, a kernel of 56 x 32"),
        ({"threshold": -1.0}, "threshold -1.0 must be a finite number of at least 0"),
        ({"threshold": 1e-12}, "threshold 1e-12 leaves layer 0 of layers/mlp/down_proj empty"),
        ({"progressive": -1}, "progressive -1 must be a finite number of at least 0"),
        ({"penalty": float("nan")}, "penalty nan must be a finite number"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=f"sara: {re.escape(message)}"):
        jp.setup(jp.sara(**options), *tiny.model(), KEY)
