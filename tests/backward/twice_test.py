"""Loops under a plan differentiated twice, and mapped: what a scan of the same layers gives, in 16 bits too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxpeft as jp

LAYERS, ROWS, WIDTH = 3, 4, 8


def block(layer, x, ctx):
    return x + checkpoint_name(jnp.tanh(checkpoint_name(x @ layer["w"], "inner")), "outer")


def setup(dtype, save):
    """(loss under a plan, that of a scan, parameters, a direction)."""
    keys = jax.random.split(jax.random.key(0), 3)
    params, along = ({"w": (0.3 * jax.random.normal(k, (LAYERS, WIDTH, WIDTH))).astype(dtype)} for k in keys[:2])
    x = jax.random.normal(keys[2], (ROWS, WIDTH)).astype(dtype)
    scanned = lambda params: jax.lax.scan(lambda x, layer: (block(layer, x, None), None), x, params)[0]
    square = lambda y: jnp.sum(y.astype(jnp.float32) ** 2)
    planned = lambda params: jp.planned_scan(block, params, x, save=save)
    return lambda p: square(planned(p)), lambda p: square(scanned(p)), params, along


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("save", ["matmuls", "blocks", "blocks,inner=save,outer=save"])
def test_second_derivatives(dtype, save):
    """Along a direction, forwards over backwards and backwards over backwards."""
    planned, scanned, params, along = setup(dtype, save)

    def both(loss):
        dot = lambda params: jnp.vdot(jax.grad(loss)(params)["w"].astype(jnp.float32), along["w"].astype(jnp.float32))
        forwards = jax.jvp(jax.grad(loss), (params,), (along,))[1]
        return [np.asarray(found["w"], np.float32) for found in (jax.grad(dot)(params), forwards)]

    for found, wanted in zip(both(planned), both(scanned), strict=True):
        far = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert far < (1e-5 if dtype == jnp.float32 else 2**-6)  # bfloat16 rounds every sum to 2^-8 of it


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mapped_gradients(dtype):
    planned, scanned, params, along = setup(dtype, "matmuls")
    many = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, along)
    found, wanted = (jax.jit(jax.vmap(jax.grad(loss)))(many)["w"].astype(jnp.float32) for loss in (planned, scanned))
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=np.abs(wanted).max() * (1e-6 if dtype == jnp.float32 else 2**-6)
    )
