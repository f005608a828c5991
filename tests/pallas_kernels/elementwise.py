"""What the tests of elementwise operations with derivatives of their own share."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval


def gradients(function, args, dy):
    """Cotangents of all arguments."""
    return jax.jit(lambda args, dy: jax.vjp(function, *args)[1](dy))(args, dy)


def wide(x):
    return np.asarray(x).astype(np.float64)


def close(found, expected, size=None):
    """Within 1e-5, some 80 float32 roundings, of `size`: of the terms of a sum that may cancel, else the result's."""
    found, expected = wide(found), wide(expected)
    assert found.shape == expected.shape
    size = np.abs(expected).max(initial=0) if size is None else size
    assert np.all(np.abs(found - expected) <= 1e-5 * size)


def assert_same_gradients(op, plain, args, dy, sizes=(None, None)):
    """In float32 both round differently, by a few units in the last place."""
    both = gradients(op, args, dy), gradients(plain, args, dy)
    for arg, found, expected, size in zip(args, *both, sizes, strict=True):
        assert found.dtype == arg.dtype
        close(found, expected, size)


def assert_no_worse_than_autodiff(op, plain, args, dy):
    """Errors against the formula in float32, on the same numbers, are at most autodiff's (to 1 %) and 2^-8."""
    widened = [x.astype(jnp.float32) for x in (*args, dy)]
    truth = gradients(plain, widened[:-1], widened[-1])
    for arg, found, auto, true in zip(args, gradients(op, args, dy), gradients(plain, args, dy), truth, strict=True):
        assert found.dtype == arg.dtype
        ours, theirs = (np.linalg.norm(wide(x) - wide(true)) / np.linalg.norm(wide(true)) for x in (found, auto))
        assert ours <= 1.01 * theirs and ours <= 2**-8, (ours, theirs)


def assert_finite_differences(op, exact, args, dy, step=1e-5):
    """Against central differences of `exact`, which computes in float64."""
    inputs, cotangent = [wide(x) for x in args], wide(dy)
    for i, found in enumerate(gradients(op, args, dy)):
        expected = np.zeros_like(inputs[i])
        for index in np.ndindex(expected.shape):
            ends = []
            for sign in (1, -1):
                moved = inputs[i].copy()
                moved[index] += sign * step
                ends.append(np.sum(cotangent * exact(*inputs[:i], moved, *inputs[i + 1 :])))
            expected[index] = (ends[0] - ends[1]) / (2 * step)
        close(found, expected)


def assert_transforms(op, plain, args, dy, in_axes):
    """jit, vmap, scan, remat and remat with a policy: gradients of a sum of products with dy."""

    def loss(function, *args):
        return jnp.sum(function(*args) * dy)

    def mapped(function):
        return lambda *a: jax.vmap(function, in_axes)(*a)

    def scanned(function):
        def run(*a):
            rows = [x for x, axis in zip(a, in_axes, strict=True) if axis == 0]

            def body(carry, row):
                row = iter(row)
                return carry, function(*[next(row) if axis == 0 else x for x, axis in zip(a, in_axes, strict=True)])

            return jax.lax.scan(body, 0, rows)[1]

        return run

    nothing, everything = jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.everything_saveable
    wraps = [jax.jit, mapped, scanned, jax.checkpoint]
    wraps += [functools.partial(jax.checkpoint, policy=policy) for policy in (nothing, everything)]
    positions = tuple(range(len(args)))
    for wrap in wraps:
        ours, theirs = (jax.jit(jax.grad(functools.partial(loss, wrap(f)), positions))(*args) for f in (op, plain))
        for found, expected in zip(ours, theirs, strict=True):
            close(found, expected)


def kept(function, *args):
    """(dtype, shape) of every array that the backward function holds, sorted."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *args))
    return sorted((str(leaf.dtype), leaf.shape) for leaf in leaves)


def live(function, *args):
    """The jaxpr of function, without what nothing reads."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def device(name):
    """Skips where a described device's compiler is not installed."""
    if name == "v5p":
        pytest.importorskip("libtpu")
    if name == "h200" and not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
