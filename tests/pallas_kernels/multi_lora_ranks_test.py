"""Kernels for rows of adapters of different ranks: their numbers, and that they take what the true ranks need."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.multi_lora_matmul import gpu, tpu
from pallas_kernels.multi_lora_matmul.reference import TILE
from tests.pallas_kernels import mosaic, mosaic_tpu

RANKS = (4, 16, 40, 72)
NOBODY = len(RANKS)
OWNER = (2, NOBODY, 3, 0)  # whose each tile of rows is; nothing is adapter 1's
BOUNDS = {jnp.bfloat16: 6e-3, jnp.float32: 2e-6}


def structs(t, n, m, ranks, dtype):
    """(x, dy, w, a, b, z)."""
    own = [((n, r), (r, m)) for r in ranks]
    shapes = (t, n), (t, m), (n, m), tuple(a for a, _ in own), tuple(b for _, b in own), (-(-max(ranks) // 8) * 8, t)
    is_shape = lambda x: isinstance(x[0], int)
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=is_shape)


def arguments(t, n, m, ranks, dtype):
    """{operation: (arguments, static ones)} as shapes."""
    x, dy, w, a, b, z = structs(t, n, m, ranks, dtype)
    tables = jax.ShapeDtypeStruct((len(ranks),), jnp.float32), jax.ShapeDtypeStruct((-(-t // TILE),), jnp.int32)
    return {
        "forward": ((x, w, a, b, *tables), {}),
        "input_gradient": ((dy, w, a, b, *tables), {}),
        "factor_gradient": ((z, x, tables[1]), {"count": len(ranks), "ranks": ranks}),
    }


def given(function, t, dtype, n=128, m=256):
    """The same with values; z has them in rows beyond its adapter's rank, too, which no gradient may see."""
    rng = np.random.default_rng(0)
    args, static = arguments(t, n, m, RANKS, dtype)[function]
    args = jax.tree.map(lambda like: jnp.asarray(rng.normal(size=like.shape), like.dtype), args)
    return (*args[:-1], jnp.asarray(OWNER[: -(-t // TILE)], jnp.int32)), static


def expected(function, args, ranks=(), **static):
    """In float64, row by row."""
    *args, owner = args
    args = jax.tree.map(lambda x: np.asarray(x, np.float64), args)
    of = np.repeat(np.asarray(owner), TILE)[: len(args[1] if function == "factor_gradient" else args[0])]
    if function == "factor_gradient":
        z, x = args
        return tuple((z[:r] * (of == g)) @ x for g, r in enumerate(ranks))
    x, w, a, b, scales = args
    down, up = (a, b) if function == "forward" else ([f.T for f in b], [f.T for f in a])
    y, low = x @ (w if function == "forward" else w.T), np.zeros((72, len(x)))
    for g, (first, second) in enumerate(zip(down, up, strict=True)):
        own = scales[g] * (x * (of == g)[:, None]) @ first
        low[: own.shape[1]] += own.T
        y += own @ second
    return y, low


def check(function, ours, theirs, dtype):
    bound = 2e-6 if function == "factor_gradient" else BOUNDS[dtype]
    for mine, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.shape == right.shape
        # Zeros exactly, where rows have no adapter, or a lower rank, or an adapter has no rows.
        np.testing.assert_array_equal(np.asarray(mine)[right == 0], 0)
        assert np.linalg.norm(np.asarray(mine, np.float64) - right) <= bound * np.linalg.norm(right)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["forward", "input_gradient", "factor_gradient"])
def test_the_numbers_on_a_gpu(function):
    args, static = given(function, 512, jnp.bfloat16)
    assert getattr(gpu, f"supports_{function}")(*args, **static)
    check(
        function, mosaic.run(getattr(gpu, function), *args, **static), expected(function, args, **static), jnp.bfloat16
    )


@pytest.mark.parametrize(
    ("function", "t", "dtype"),
    [("forward", 512, jnp.bfloat16), ("input_gradient", 400, jnp.float32), ("factor_gradient", 400, jnp.bfloat16)],
)
def test_the_numbers_on_a_tpu(function, t, dtype):
    args, static = given(function, t, dtype)
    assert getattr(tpu, f"supports_{function}")(*args, **static)
    ours = getattr(tpu, function)(*args, **static, interpret=mosaic_tpu.INTERPRETED)
    check(function, ours, expected(function, args, **static), dtype)


def test_an_adapter_that_diverged_spoils_no_other():
    """What its factor left on the chip is not multiplied by the next tile, whose adapter has a lower rank."""
    (x, w, a, b, scales, _), _ = given("forward", 256, jnp.bfloat16)
    a, b = ((*factors[:-1], jnp.full_like(factors[-1], jnp.nan)) for factors in (a, b))
    owner, config = jnp.array([3, 0], jnp.int32), tpu.Config(128, 256, 128)
    y, low = tpu.forward(x, w, a, b, scales, owner, config=config, interpret=mosaic_tpu.INTERPRETED)
    assert np.isnan(np.asarray(y, np.float32)[:128]).all()
    assert (
        np.isfinite(np.asarray(y, np.float32)[128:]).all() and np.isfinite(np.asarray(low, np.float32)[:, 128:]).all()
    )


@pytest.mark.parametrize("file", [gpu, tpu])
@pytest.mark.parametrize("function", ["forward", "input_gradient", "factor_gradient"])
def test_nothing_is_as_wide_as_the_largest_for_all(file, function):
    """Around the kernels, besides their results of T rows, no array has more than the sum of ranks times an axis."""
    t, n, m, ranks = 1024, 512, 768, (128, *(16,) * 7)
    args, static = arguments(t, n, m, ranks, jnp.bfloat16)[function]
    jaxpr = jax.make_jaxpr(lambda *args: getattr(file, function)(*args, **static))(*args)
    made = [out.aval.shape for equation in jaxpr.eqns for out in equation.outvars]
    factors = [shape for shape in made if t not in shape]
    assert factors and max(map(math.prod, factors)) <= max(n, m) * sum(ranks)
    assert 768 * sum(ranks) < 8 * 512 * 128  # as what is padded would be


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("function", ["forward", "input_gradient", "factor_gradient"])
@pytest.mark.parametrize(("device", "file"), [("h200", gpu), ("v5p", tpu)])
def test_compiled_temporaries_follow_the_sum_of_the_ranks(capfd, device, file, function):
    """Of a described device's program, which is real code without spills; those of the largest rank would not fit."""
    n, m, ranks = 4096, 8192, (256, *(16,) * 7)
    args, static = arguments(2048, n, m, ranks, jnp.bfloat16)[function]
    assert getattr(file, f"supports_{function}")(*args, **static)
    if device == "h200":
        found = mosaic.compiled(capfd, getattr(file, function), *args, **static)
        assert found.spills and not any(found.spills)
        temporaries = found.temporaries
    else:
        made, _ = mosaic_tpu.compiled(device, getattr(file, function), *args, **static)
        temporaries = made.memory.temporaries
    wide, itemsize = (n, 4) if function == "factor_gradient" else (n + m, 2)
    assert temporaries < 1.05 * sum(ranks) * wide * itemsize < 0.2 * len(ranks) * max(ranks) * wide * itemsize
