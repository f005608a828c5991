"""What the tests of foreign modules share: an input, other values for what trains, a loss, a run of a few steps."""

import jax
import jax.numpy as jnp
import optax

import jaxpeft as jp

X = jax.random.normal(jax.random.key(0), (3, 6, 8))


def moved(trainable):
    """Other values for every leaf."""
    keys = dict(zip(trainable, jax.random.split(jax.random.key(7), len(trainable)), strict=True))
    return {path: leaf + 0.3 * jax.random.normal(keys[path], leaf.shape) for path, leaf in trainable.items()}


def mean_square(model, params, batch, key):
    """A loss."""
    return jnp.mean(model.apply(params, {"x": batch["x"]}, key) ** 2), {"weight": jnp.ones(())}


def losses(model, method, trainable, frozen, steps=8):
    """Those of the first steps with Adam, on X."""
    optimizer = optax.adam(1e-2)
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    step = jax.jit(jp.make_train_step(model, method, optimizer, mean_square))
    found = []
    for _ in range(steps):
        state, metrics = step(state, {"x": X})
        found.append(float(metrics["loss"]))
    return found
