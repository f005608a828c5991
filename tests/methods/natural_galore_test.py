"""Natural GaLore: the turned gradient against the inverse of a whole matrix, its history, and what that costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.method import view_of
from jaxpeft.methods import natural_galore
from jaxpeft.train.optimizer import make_direction
from tests import tiny

KEY, R = jax.random.key(0), "layers/mlp/up_proj/galore/r"


def dense(gradient, history, damping):
    """lambda F^-1 g of the whole F, by NumPy."""
    g = np.asarray(gradient, np.float64).reshape(-1)
    rows = [np.asarray(one, np.float64).reshape(-1) for one in history]
    fisher = damping * np.eye(len(g)) + sum(np.outer(row, row) for row in rows)
    return (damping * np.linalg.solve(fisher, g)).reshape(gradient.shape)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_woodbury_is_the_dense_inverse(damping):
    """Of each layer, also with gradients of other sizes and places that are empty in the history."""
    history = np.array(jax.random.normal(KEY, (2, 5, 3, 8))) * np.array([1e-3, 1, 0.1, 10, 0]).reshape(1, 5, 1, 1)
    gradient = history[:, 1]
    found = jax.jit(natural_galore.natural)(jnp.asarray(history), 1, damping)
    for layer in range(2):
        expected = dense(gradient[layer], history[layer], damping)
        np.testing.assert_allclose(found[layer], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    alone = natural_galore.natural(jnp.asarray(history[0]), 1, damping)
    np.testing.assert_allclose(alone, found[0], rtol=1e-3, atol=1e-6)


def test_without_a_past_it_is_a_rescaled_gradient():
    g = jax.random.normal(KEY, (3, 8))
    found = natural_galore.natural(g[None], 0, 0.1)
    np.testing.assert_allclose(found, 0.1 / (0.1 + np.sum(np.square(g))) * g, rtol=1e-4)


@pytest.mark.parametrize("projection", ["sketch", "svd"])
def test_history_holds_the_last_gradients_in_these_directions(projection):
    """A ring of three; where P is another one since (a step later with a sketch) it begins anew."""
    every, size, damping = 5, 3, 1e-2
    optimizer = optax.with_extra_args_support(optax.identity())
    optimizer = natural_galore.preconditioned(optimizer, size, damping, every, projection)
    params = {R: jnp.zeros((2, 4, 8)), "norm/scale": jnp.zeros(8)}
    state, update, past = optimizer.init(params), jax.jit(optimizer.update), []
    for step in range(9):
        key = jax.random.fold_in(KEY, step)
        grads = {path: jax.random.normal(key, leaf.shape) for path, leaf in params.items()}
        if step % every == (1 if projection == "sketch" else 0):
            past = []
        past = [*past, grads[R]][-size:]
        directions, state = update(grads, state)
        for layer in range(2):
            expected = dense(grads[R][layer], [one[layer] for one in past], damping)
            np.testing.assert_allclose(directions[R][layer], expected, rtol=1e-2, atol=1e-4)
        np.testing.assert_array_equal(directions["norm/scale"], grads["norm/scale"])


def test_the_history_is_ten_times_the_moments():
    """Counted on the state of a run of the default history: 20 gradients of each R beside Adam's two."""
    method, optimizer = jp.natural_galore(4), make_direction()
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    state = jax.eval_shape(lambda: jp.init_state(method, optimizer, trainable, rest, KEY, model))
    of_r = tree.size({path: leaf for path, leaf in trainable.items() if path.endswith("/galore/r")})
    kernels = {path: leaf.shape for path, leaf in rest.items() if path.endswith("_proj/kernel")}
    assert of_r == sum(shape[0] * 4 * max(shape[1:]) for shape in kernels.values())
    assert tree.size(state.opt_state.history) == 20 * of_r
    promised = natural_galore.state_numbers(view_of(model, method, {**trainable, **rest}), rank=4)
    assert promised == 22 * of_r + 2 * (tree.size(trainable) - of_r)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": 0}, "natural_galore: history 0 must be at least 1"),
        ({"damping": 0.0}, "natural_galore: damping 0.0 must be a finite number above 0"),
        ({"every": 0}, "natural_galore: every 0 must be at least 1"),
        ({"rank": 17}, "natural_galore: rank 17 is above the smaller side of layers/self_attn/k_proj"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.natural_galore(**{"rank": 4, **arguments}), *tiny.model(), KEY)
