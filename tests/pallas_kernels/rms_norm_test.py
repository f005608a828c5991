"""RMSNorm against the plain formula, its autodiff and float64; and what its backward pass keeps and computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft.memory import aot, targets
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rms_norm.shapes import WIDTHS
from tests.pallas_kernels import elementwise
from tests.residuals import intermediates

EPSILON = 1e-5


def plain(x, scale):
    """The formula, for autodiff."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


def exact(x, scale):
    """The formula in float64."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale


op = functools.partial(rms_norm, epsilon=EPSILON)


def inputs(shape=(2, 6, 32), dtype=jnp.float32, scale_dtype=None, seed=0):
    """x, scale, and a cotangent."""
    rng = np.random.default_rng(seed)
    x, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    return (x, jnp.asarray(1 + 0.3 * rng.normal(size=shape[-1:]), scale_dtype or dtype)), dy


@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outputs_are_those_of_the_formula_bit_for_bit(dtype, scale_dtype):
    args, _ = inputs(dtype=dtype, scale_dtype=scale_dtype)
    for wrap in (lambda f: f, jax.jit, lambda f: lambda *a: jax.vjp(f, *a)[0]):
        y, expected = wrap(op)(*args), wrap(plain)(*args)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected)


def sizes(args, dy):
    """Of the terms of both gradients, whose sums may cancel: r g for each token, dy n for each element of scale."""
    (x, scale), dy = map(elementwise.wide, args), elementwise.wide(dy)
    normed, r = exact(x, 1), 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    most = np.abs(dy * scale).max(axis=-1, keepdims=True) * np.maximum(1, np.square(normed).max(axis=-1, keepdims=True))
    return r * most, np.abs(dy * normed).sum(axis=tuple(range(x.ndim - 1)))


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(), (1,), (5,), (2, 3), (1, 2, 3)]), st.integers(1, 40), st.integers(0, 2**31))
def test_gradients_are_autodiffs_for_any_shape(leading, width, seed):
    args, dy = inputs((*leading, width), seed=seed)
    elementwise.assert_same_gradients(op, plain, args, dy, sizes(args, dy))


@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_in_bfloat16_are_nearer_to_float64_than_autodiffs(scale_dtype):
    args, dy = inputs((8, 64, 128), jnp.bfloat16, scale_dtype)
    elementwise.assert_no_worse_than_autodiff(op, plain, args, dy)


def test_gradients_are_float64_differences():
    args, dy = inputs((3, 5, 7))
    elementwise.assert_finite_differences(op, exact, args, dy)


def test_large_and_small_inputs():
    """The norm of a row of zeros has a finite derivative; rows of any size come out alike."""
    (x, scale), dy = inputs((4, 16))
    x = x * jnp.array([0.0, 1e-12, 1.0, 1e12])[:, None]
    found = elementwise.gradients(op, (x, scale), dy)
    assert all(bool(jnp.isfinite(g).all()) for g in found)
    elementwise.assert_same_gradients(op, plain, (x, scale), dy, sizes((x, scale), dy))


def test_works_under_transformations():
    args, dy = inputs((3, 4, 16))
    elementwise.assert_transforms(op, plain, args, dy, in_axes=(0, None))


def test_each_of_many_scales():
    """vmap over scales of their own."""
    (x, scale), dy = inputs((3, 4, 16))
    scales = scale * jnp.arange(1.0, 4.0)[:, None]
    found = jax.vmap(lambda x, s, d: elementwise.gradients(op, (x, s), d))(x, scales, dy)
    expected = jax.vmap(lambda x, s, d: elementwise.gradients(plain, (x, s), d))(x, scales, dy)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_keeps_x_and_a_float32_per_token():
    (x, scale), _ = inputs((4, 8, 64), jnp.bfloat16)
    assert elementwise.kept(op, x, scale) == [("bfloat16", (4, 8, 64)), ("bfloat16", (64,)), ("float32", (4, 8))]
    wide = [shape for dtype, shape in elementwise.kept(plain, x, scale) if dtype == "float32" and shape == (4, 8, 64)]
    assert wide  # what autodiff keeps


def test_a_scale_that_is_not_differentiated_costs_nothing():
    (x, scale), dy = inputs((4, 8, 64))
    program = elementwise.live(lambda x, dy: jax.vjp(lambda x: op(x, scale), x)[1](dy), x, dy)
    assert (64,) not in list(intermediates(program))
    both = elementwise.live(lambda x, s, dy: jax.vjp(op, x, s)[1](dy), x, scale, dy)
    assert (64,) in list(intermediates(both))


def test_an_x_that_is_not_differentiated_costs_nothing():
    """The gradient of scale alone has no second mean over d."""
    (x, scale), dy = inputs((4, 8, 64))
    program = elementwise.live(lambda s, dy: jax.vjp(lambda s: op(x, s), s)[1](dy), scale, dy)
    assert sum(equation.primitive.name == "reduce_sum" for equation in program.eqns) == 2  # of x^2, and over tokens


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("model", WIDTHS)
def test_the_compiled_gradient_has_no_copies(model, trains):
    """On an H200: a few float32 for each token; with scale's gradient, the products that are summed for it."""
    elementwise.device("h200")
    tokens, width = 1024, WIDTHS[model]
    x, scale = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, width), (width,)))

    def gradient(x, scale, dy):
        return jax.vjp(op, x, scale)[1](dy) if trains else jax.vjp(lambda x: op(x, scale), x)[1](dy)

    memory = aot.compile(targets.target("h200"), gradient, x, scale, x).memory
    products = tokens * width * 4 if trains else 0
    assert memory.temporaries <= products + 4 * 4 * tokens


def test_a_wrong_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale of shape \(4,\) for x of shape \(2, 5\)"):
        op(jnp.zeros((2, 5)), jnp.zeros(4))
