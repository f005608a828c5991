"""The learning rate step by step, and what weight decay leaves alone."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpeft.train.optimizer import decays, make_direction, make_schedule


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_schedule(kind, expected):
    schedule = make_schedule(kind, lr=1.0, steps=6, warmup=2)
    np.testing.assert_allclose([float(schedule(step)) for step in range(6)], expected, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 6, 9])
def test_every_step_moves(warmup):
    schedule = make_schedule("linear", lr=1.0, steps=6, warmup=warmup)
    assert all(0 < float(schedule(step)) <= 1 for step in range(6))


def test_weight_decay_spares_vectors_of_each_layer():
    shapes = {
        "layers/mlp/up_proj/kernel": (2, 3, 4),
        "layers/mlp/up_proj/lora/a": (2, 3, 1),
        "layers/mlp/up_proj/bias": (2, 4),
        "layers_1_2/input_layernorm/scale": (1, 3),
        "lm_head/kernel": (3, 5),
        "norm/scale": (3,),
        "lisa/layers/norm/scale": (2, 3),
        "lisa/layers/mlp/up_proj/kernel": (2, 3, 4),
    }
    leaves = {path: jnp.ones(shape) for path, shape in shapes.items()}
    assert [path for path in leaves if decays(path, leaves[path])] == [
        "layers/mlp/up_proj/kernel",
        "layers/mlp/up_proj/lora/a",
        "lm_head/kernel",
        "lisa/layers/mlp/up_proj/kernel",
    ]


def test_clip_holds_the_global_norm():
    leaves = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    states = []
    for clip in (None, 1.0):
        optimizer = make_direction(clip=clip)
        _, state = optimizer.update(leaves, optimizer.init(leaves), leaves)
        states.append(optax.tree_utils.tree_get(state, "mu"))
    np.testing.assert_allclose(states[0]["a"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(states[1]["a"], 0.06, rtol=1e-6)
