"""Forward mode through functions with backward rules of their own: products of their gradients with a direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import noise, tree
from jaxpeft.errors import InputError
from jaxpeft.forward_mode import jvp
from jaxpeft.train.step import objective_of
from tests import tiny
from tests.methods.estimates import BATCH, RUN, z_of

METHODS = {
    "full": jp.full(),
    "qlora": jp.chain(jp.quantize("int8"), jp.lora(2)),  # factors that start at zero, beside packed kernels
    "prefix": jp.prefix(2),  # leaves that feed attention
    "meft": jp.meft(1, 4, exact=False),  # layers that run in a loop with a rule of its own
}
SLOW = ("prefix", "meft")


@jax.custom_vjp
def doubled(x):
    return 2 * jnp.sin(x)


doubled.defvjp(lambda x: (doubled(x), x), lambda x, d: (d * 2 * jnp.cos(x),))


def test_in_loops_and_branches():
    def function(x):
        scanned, _ = jax.lax.scan(lambda c, t: (doubled(c) * t, None), x, jnp.arange(1.0, 4.0))
        looped = jax.lax.while_loop(lambda c: c[1] < 2, lambda c: (doubled(c[0]), c[1] + 1), (x, 0))[0]
        branch = jax.lax.cond(x > 0, doubled, jnp.cos, x)
        return scanned + 3 * looped + 5 * jax.jit(doubled)(branch), {"x": x}

    def by_hand(x):
        scanned, looped = x, x
        for t in (1.0, 2.0, 3.0):
            scanned = 2 * jnp.sin(scanned) * t
        for _ in range(2):
            looped = 2 * jnp.sin(looped)
        return scanned + 3 * looped + 5 * 2 * jnp.sin(2 * jnp.sin(x))

    value, slope, aux = jax.jit(lambda x: jvp(function, x, jnp.float32(2.0)))(0.3)
    expected = jax.jvp(by_hand, (0.3,), (2.0,))
    np.testing.assert_allclose([value, slope, aux["x"]], [*expected, 0.3], rtol=1e-6)


def estimate(method):
    """(objective of mezo's forward variant, trainable, rest) of the tiny model; two directions."""
    method = jp.chain(jp.mezo(variant="forward", seeds=2), method)
    model, trainable, rest = jp.setup(method, *tiny.model(jnp.float32, num_hidden_layers=2), jax.random.key(0))
    return objective_of(model, method, {**trainable, **rest}), model, trainable, rest


@pytest.mark.parametrize("name", ["full", "qlora", *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])
def test_a_slope_is_the_gradient_along_z(name):
    """Exactly, where two evaluations give it up to eps; the estimate is the mean of slope z."""
    objective, model, trainable, rest = estimate(METHODS[name])

    @jax.jit
    def both():
        (loss, aux), grads = objective.value_and_grad(trainable, rest, BATCH, RUN, None)
        whole = jax.value_and_grad(lambda leaves: jp.completion_loss(model, tree.combine(leaves, rest), BATCH)[0])
        return loss, aux["slopes"], grads, whole(trainable)

    loss, slopes, grads, (value, gradient) = jax.device_get(both())
    draws = np.asarray(noise.draw(RUN, 2)).view(np.uint32)
    along = [{path: z_of(words, path, leaf.shape) for path, leaf in trainable.items()} for words in draws]
    parts = [[np.sum(gradient[path].astype(float) * z[path]) for path in z] for z in along]
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    scale = max(np.abs(parts).max(), 1e-3)  # of what is summed, in which it cancels
    np.testing.assert_allclose(slopes, np.sum(parts, axis=1), rtol=1e-4, atol=1e-4 * scale)
    for path, found in grads.items():
        mean = np.mean([slope * z[path] for slope, z in zip(slopes, along, strict=True)], axis=0)
        np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-5 * scale, err_msg=path)


def test_streams_of_integers_are_refused():
    objective, _, trainable, rest = estimate(jp.meft(1, 4))
    with pytest.raises(InputError, match="fixed point have no derivative in forward mode: give meft exact=False"):
        jax.eval_shape(objective.value_and_grad, trainable, rest, BATCH, RUN, None)
