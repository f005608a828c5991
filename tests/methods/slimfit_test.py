"""SlimFit: the layers of each weight that train, step by step, against Adam on each tensor in NumPy, and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import slimfit
from tests import tiny

KEY = jax.random.key(0)
RATE, LAYERS = 1e-2, 3
EPSILON = 1e-4  # so that the rounding of gradients near 0 is not magnified


def started(method):
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    optimizer = optax.scale_by_adam(eps=EPSILON)
    state = jp.init_state(method, optimizer, trainable, rest, KEY, model)
    return model, state, jax.jit(jp.make_train_step(model, method, optimizer, rate=RATE))


def test_steps_equal_adam_on_the_tensors_that_train():
    """Which they are by the rule, each with moments of its own, that are gone where a layer has stood still."""
    method, batch = jp.slimfit(0.5), tiny.batch()
    model, state, step = started(method)
    base, params = tiny.model()
    weights = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}
    gradient = jax.jit(jax.grad(lambda flat: jp.completion_loss(base, tree.unflatten(flat), batch)[0]))
    d = {path[17:]: np.asarray(leaf) for path, leaf in state.moved.items() if path.startswith("slimfit/distance/")}
    assert d.keys() == {path for path in weights if path.startswith("layers/")}
    moments, stood = {}, set()
    for number in range(4):
        grads = {path: np.asarray(g, np.float64) for path, g in gradient(jax.tree.map(jnp.float32, weights)).items()}
        now = set()
        for path, w in weights.items():
            places = np.sort(np.argsort(-d[path])[:2]) if path in d else [slice(None)]
            if path in d:
                np.testing.assert_array_equal(state.moved[f"slimfit/active/{path}"], places)
            for i in places:
                key = (path, i if path in d else None)
                now.add(key)
                m, v, t = moments.get(key, (0, 0, 0))
                m, v, t = 0.9 * m + 0.1 * grads[path][i], 0.999 * v + 0.001 * grads[path][i] ** 2, t + 1
                moments[key] = m, v, t
                change = RATE * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + EPSILON)
                if path in d:
                    d[path] = d[path].copy()
                    d[path][i] = np.mean(np.abs(change) / np.abs(w[i]))
                w[i] -= change
        stood |= moments.keys() - now
        moments = {key: moments[key] for key in now}
        state, _ = step(state, batch)
        merged = tree.flatten(method.merge(state.params))
        for path, w in weights.items():
            # A gradient near 0 may be rounded to another one; a tensor that moved for itself would be off by RATE.
            assert np.linalg.norm(merged[path] - w) < 1e-3 * RATE * np.sqrt(w.size), (number, path)
    assert len(stood) > 10
    assert model.config.num_hidden_layers == LAYERS


def test_what_trains_exists_for_a_share_of_the_layers():
    _, state, _ = started(jp.slimfit(0.5))
    assert state.trainable["slimfit/layers/mlp/up_proj/kernel"].shape == (2, 32, 56)
    assert [slimfit.trains_of(12, share) for share in (0.9, 0.95, 0.5, 0.0)] == [2, 1, 6, 12]


def test_moments_follow_a_layer_that_goes_on():
    state = {"m": jnp.array([[1.0], [2.0], [3.0]])}
    fresh = jax.tree.map(jnp.zeros_like, state)
    found = slimfit._followed(state, jnp.array([4, 7, 9]), jnp.array([7, 8, 4]), fresh)
    np.testing.assert_array_equal(found["m"], [[2], [0], [1]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.slimfit(1.0), "freeze 1.0 must be at least 0 and below 1"),
        (lambda: jp.slimfit(-0.1), "freeze -0.1 must be at least 0"),
        (lambda: jp.slimfit(every=0), "every 0 must be at least 1"),
        (lambda: jp.slimfit(which="("), "which.*not a regular expression"),
        (lambda: jp.slimfit(which="embed"), "nothing in the layers trains but biases"),
        (lambda: jp.chain(jp.quantize(), jp.full(), jp.slimfit()), "is quantized and cannot train"),
        (lambda: jp.chain(jp.lisa(2), jp.slimfit()), "another member of the chain samples layers already"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(jp.InputError, match=message):
        started(make())
