"""4-bit codes: those of the specification, unbiased, one number of a block apart; and what layers keep of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.backward import residuals
from jaxpeft.backward.compressed import uniform
from jaxpeft.backward.four_bits import Quarter, quarter, whole
from jaxpeft.backward.plan import INPUT
from tests import tiny
from tests.backward.compressed_test import numbers
from tests.backward.gradients import LAYERS, METHODS, MHA, D, F, gradients, segments, start

TOKENS = 64  # of `segments`


def to_and_fro(x, seed=0):
    return whole(quarter(x, jnp.uint32(seed)), x.dtype)


def by_hand(x, seed):
    """(values again, half a step of each number, 0 where it is apart) in float64, for x (B, S, n)."""
    u = np.asarray(uniform(x.shape, jnp.uint32(seed)), np.float64)
    back, half = np.zeros(x.shape), np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        for first in range(0, x.shape[2], 64):
            own = (*place, slice(first, first + 64))
            apart = np.arange(x[own].size) == np.abs(x[own]).argmax()
            step = np.abs(x[own][~apart]).max() / 7
            back[own] = np.where(apart, x[own], step * (np.floor(x[own] / step + u[own]) - u[own] + 0.5))
            half[own] = np.where(apart, 0, step / 2)
    return back, half


@pytest.mark.parametrize("shape", [(2, 7, 130), (1, 8, 24)])
def test_the_specification(shape):
    """Each number lies within half a step of x, the largest of a block within bfloat16's rounding of x; errors are as
    large as those of a transcription whose constants are not rounded, which makes a step up to 2^-6 larger."""
    x = np.array(numbers(shape=shape), np.float64)
    x[0, 2, 5] = 1e6
    wanted, half = by_hand(x, 3)
    found = np.asarray(jax.jit(to_and_fro)(jnp.asarray(x, jnp.float32), 3), np.float64)
    bound = np.where(half > 0, (1 + 2**-6) * half + 2**-20 * np.abs(x), 2**-8 * np.abs(x))
    assert (np.abs(found - x) <= bound).all()
    ours, theirs = (np.linalg.norm(((a - x) / np.where(half > 0, half, 1))[half > 0]) for a in (found, wanted))
    np.testing.assert_allclose(ours, theirs, rtol=5 / np.sqrt(x.size))  # two draws, of most of the same numbers u


def test_the_mean_over_seeds_is_exact():
    """Errors are uniform in half a step either way: of N draws the mean has a deviation of step / sqrt(12 N)."""
    x, draws = numbers(), 2048
    found = np.asarray(jax.jit(jax.vmap(functools.partial(to_and_fro, x)))(jnp.arange(draws, dtype=jnp.uint32)))
    apart = (found == found[:1]).all(0)
    assert apart.sum() == 14  # one of each token
    step = np.broadcast_to(np.asarray(quarter(x, jnp.uint32(0)).step, np.float64), x.shape)[~apart]
    errors = (found - np.asarray(x, np.float64))[:, ~apart] / step
    assert np.abs(errors).max() < 0.5 + 1e-3
    deviations = errors.mean(0) * np.sqrt(12 * draws)
    assert np.abs(deviations).max() < 5  # of 322 of unit normals: one in 5000 times such a table
    assert 0.8 < deviations.std() < 1.2


def test_shapes_and_bits():
    stored = quarter(jnp.zeros((2, 7, 3, 130)), jnp.uint32(0))
    wanted = Quarter((2, 4, 3, 130), (2, 7, 3, 3), (2, 7, 3, 3), ())
    assert jax.tree.map(jnp.shape, stored, is_leaf=lambda x: isinstance(x, jax.Array)) == wanted
    large = jax.eval_shape(quarter, jax.ShapeDtypeStruct((4, 1024, 4096), jnp.bfloat16), jnp.uint32(0))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in large) * 8 == 4.5 * 4 * 1024 * 4096 + 32  # and a seed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_alike_or_nothing(dtype):
    """Zeros stay zeros; a block whose numbers are all alike, or of which one alone is any, comes back but for
    bfloat16's rounding; of two of opposite signs both do, in steps; what is large stays finite."""
    x = np.zeros((2, 2, 128), np.float32)
    x[0, :, 70] = 5, -5.01
    x[0, :, :64] = [[2.01], [-2]]
    np.testing.assert_allclose(np.asarray(to_and_fro(jnp.asarray(x, dtype)), np.float32), x, rtol=2**-7)
    pair = np.zeros((1, 1, 64), np.float32)
    pair[..., [3, 9]] = 7, -7
    np.testing.assert_allclose(np.asarray(to_and_fro(jnp.asarray(pair, dtype)), np.float32), pair, atol=0.51)
    assert np.isfinite(np.asarray(to_and_fro(jnp.asarray(1e29 * pair, dtype)), np.float32)).all()


def test_a_loud_number_leaves_the_others_alone():
    """Of one token, a thousand times its others: what is apart costs its block nothing but its own place."""
    x = np.asarray(numbers(2, (1, 64, 64)))
    loud = x.copy()
    loud[0, 3, 11] = 1000 * np.abs(x).max()
    before, after = (np.abs(np.asarray(to_and_fro(jnp.asarray(a))) - a)[0] for a in (x, loud))
    np.testing.assert_array_equal(np.delete(after, 3, 0), np.delete(before, 3, 0))
    second = np.sort(np.abs(np.delete(x[0, 3], 11)))[-1]
    assert np.delete(after[3], 11).max() <= 0.51 * second / 7
    assert after[3, 11] <= 2**-8 * loud[0, 3, 11]


# In the layers.


@functools.cache
def kept(plan):
    [segment] = segments("lora", plan, dtype=jnp.bfloat16, **MHA)
    return segment


def test_bytes_of_each_name():
    """Half a byte a number, four bytes a token and block; queries and keys in 8 bits, x A as
    it is; attention is computed again."""
    found = kept("compressed4").kept_bytes()["device"]
    assert found.pop("lora_low") == kept("matmuls").kept_bytes()["device"]["lora_low"]
    for name in ("q_proj", "k_proj"):
        assert found.pop(name) == kept("compressed").kept_bytes()["device"][name]
    assert found.keys() == {INPUT, "v_proj", "o_proj", "gate_proj", "up_proj"}
    for name, size in found.items():
        width = F if name in ("gate_proj", "up_proj") else D
        assert size == LAYERS * (TOKENS * (width / 2 + 4) + 4), name  # and a seed
    assert kept("compressed4").recompute_flops() == kept("compressed").recompute_flops() > 0


def test_the_forward_pass_and_a_key_say_all():
    """The loss is that of what is not rounded, a key gives the same gradients again, and another others."""
    model, trainable, frozen = start(METHODS["lora"])
    planned = residuals.remat(model, "compressed4,tokens=32")
    run = jax.jit(lambda key: gradients(planned, trainable, frozen, tiny.batch(), key))
    value, exact = gradients(residuals.remat(model, "matmuls"), trainable, frozen, tiny.batch())
    (one, first), (_, again), (_, other) = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_allclose(one, value, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    far = lambda found: sum(np.linalg.norm(found[p] - exact[p]) ** 2 for p in exact) ** 0.5
    norm = sum(np.linalg.norm(x) ** 2 for x in exact.values()) ** 0.5
    # A step is a seventh of a block's second number, which of 32 normal ones is about 1.7 deviations, and an error's
    # deviation is a step / sqrt(12): 7 % of each number's, or 15 % of the sum of two of them.
    assert 0 < far(first) < 0.15 * norm
    assert far(first) != far(other)
