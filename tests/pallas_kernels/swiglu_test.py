"""SwiGLU's elementwise part against the plain formula, its autodiff and float64; and what its backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft.memory import aot, targets
from pallas_kernels.swiglu import swiglu
from pallas_kernels.swiglu.shapes import WIDTHS
from tests.pallas_kernels import elementwise


def plain(gate, up):
    """The formula, for autodiff."""
    return jax.nn.silu(gate) * up


def exact(gate, up):
    """The formula in float64."""
    return gate / (1 + np.exp(-gate)) * up


def inputs(shape=(2, 6, 32), dtype=jnp.float32, seed=0):
    """Gate, up, and a cotangent."""
    rng = np.random.default_rng(seed)
    gate, up, dy = (jnp.asarray(2 * rng.normal(size=shape), dtype) for _ in range(3))
    return (gate, up), dy


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outputs_are_those_of_the_formula_bit_for_bit(dtype):
    args, _ = inputs(dtype=dtype)
    for wrap in (lambda f: f, jax.jit, lambda f: lambda *a: jax.vjp(f, *a)[0]):
        y, expected = wrap(swiglu)(*args), wrap(plain)(*args)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=4).map(tuple), st.integers(0, 2**31))
def test_gradients_are_autodiffs_for_any_shape(shape, seed):
    args, dy = inputs(shape, seed=seed)
    elementwise.assert_same_gradients(swiglu, plain, args, dy)


def test_gradients_in_bfloat16_are_nearer_to_float64_than_autodiffs():
    args, dy = inputs((8, 64, 128), jnp.bfloat16)
    elementwise.assert_no_worse_than_autodiff(swiglu, plain, args, dy)


def test_gradients_are_float64_differences():
    args, dy = inputs((3, 5, 7))
    elementwise.assert_finite_differences(swiglu, exact, args, dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saturated_gates(dtype):
    """silu'(x) is 0 far below 0 and 1 far above."""
    gate = jnp.array([-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38], dtype)
    d_gate, d_up = elementwise.gradients(swiglu, (gate, jnp.full_like(gate, 2)), jnp.ones_like(gate))
    np.testing.assert_array_equal(d_gate.astype(jnp.float32), [0, 0, 0, 1, 2, 2, 2])
    np.testing.assert_array_equal(d_up, swiglu(gate, jnp.ones_like(gate)))


def test_works_under_transformations():
    args, dy = inputs((3, 4, 16))
    elementwise.assert_transforms(swiglu, plain, args, dy, in_axes=(0, 0))


def test_keeps_gate_and_up():
    args, _ = inputs((4, 8, 64), jnp.bfloat16)
    assert elementwise.kept(swiglu, *args) == [("bfloat16", (4, 8, 64))] * 2
    assert len(elementwise.kept(plain, *args)) > 2  # what autodiff keeps


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("model", WIDTHS)
@pytest.mark.parametrize("target", ["h200", "v5p"])
def test_the_compiled_gradient_has_no_temporaries(target, model):
    """One loop that reads three arrays and writes two."""
    elementwise.device(target)
    x = jax.ShapeDtypeStruct((1024, WIDTHS[model]), jnp.bfloat16)
    memory = aot.compile(targets.target(target), lambda g, u, d: jax.vjp(swiglu, g, u)[1](d), x, x, x).memory
    assert memory.temporaries < x.size * x.dtype.itemsize / 100


def test_arrays_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"gate is float32\[2, 5\], up is float32\[5\]: they must be alike"):
        swiglu(jnp.zeros((2, 5)), jnp.zeros(5))
    with pytest.raises(ValueError, match="gate is float32"):
        swiglu(jnp.zeros(5), jnp.zeros(5, jnp.bfloat16))
