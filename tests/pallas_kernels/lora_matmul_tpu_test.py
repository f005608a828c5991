"""LoRA's TPU kernels: their numbers, interpreted on the CPU, and what a TPU's compiler makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout
from pallas_kernels.lora_matmul import tpu
from pallas_kernels.lora_matmul.shapes import MODELS, RANKS, ROWS, SMALL
from pallas_kernels.lora_matmul.tpu import Config
from tests.pallas_kernels.mosaic_tpu import INTERPRETED, check_alone, relative, traffic

SCALE = 1.5
# Relative errors by norm. bfloat16: results are rounded once (2^-9 at most, 1.7e-3 of the norm) and y and dx hold a
# rounded z or e besides. float32: sums of at most 400 products.
BOUNDS = {jnp.bfloat16: 6e-3, jnp.float32: 2e-6}
# (case, tiles (rows, columns, inputs), dtype, rate): several tiles along each axis, ragged ones, and one alone.
NUMBERS = {
    "even, ragged columns": ("even", (128, 256, 128), jnp.bfloat16, 0.3),
    "odd rows": ("odd rows", (128, 128, 128), jnp.float32, 0.3),
    "few rows": ("few rows", None, jnp.bfloat16, 0.3),
    "rank 4": ("rank 4", None, jnp.float32, 0.0),
    "rank 24, two rows more than a tile": ("rank 24", (128, 128, 128), jnp.bfloat16, 0.0),
    "rank 64": ("rank 64", None, jnp.bfloat16, 0.0),
    "rank 256": ("rank 256", (128, 128, 128), jnp.bfloat16, 0.3),
}


def exact_numbers(x, dy, w, a, b, z, mask):
    """The four operations of reference.py in float64 NumPy, with the same mask and nothing rounded."""
    low = SCALE * (x * mask @ a).T
    e = SCALE * b @ dy.T
    return {
        "forward": (x @ w + low.T @ b, low),
        "input_gradient": (dy @ w.T + mask * (e.T @ a.T), e),
        "low": (low,),
        "factor_gradient": (z @ (x * mask),),
    }


@pytest.mark.parametrize(("case", "tiles", "dtype", "rate"), NUMBERS.values(), ids=NUMBERS)
def test_the_numbers(case, tiles, dtype, rate):
    t, n, m, r = SMALL[case].values()
    rng = np.random.default_rng(len(case))
    shapes = {"x": (t, n), "dy": (t, m), "w": (n, m), "a": (n, r), "b": (r, m), "z": (r, t)}
    arrays = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    x, dy, w, a, b, z = arrays.values()
    seed = jnp.int32(-(2**31) + 3)
    mask = np.asarray(dropout.mask(seed, (t, n), rate)) / (1 - rate)
    options = {"config": tiles and Config(*tiles), "interpret": INTERPRETED}
    ours = {
        "forward": tpu.forward(x, w, a, b, seed, scale=SCALE, rate=rate, **options),
        "input_gradient": tpu.input_gradient(dy, w, a, b, seed, scale=SCALE, rate=rate, **options),
        "low": (tpu.low(x, a, seed, scale=SCALE, rate=rate, **options),),
        "factor_gradient": (tpu.factor_gradient(z, x, seed, rate=rate, **options),),
    }
    exact = exact_numbers(*(np.asarray(array, np.float64) for array in arrays.values()), mask)
    for name, results in ours.items():
        for result, value in zip(results, exact[name], strict=True):
            assert relative(result, value) < BOUNDS[dtype], name
            assert result.dtype == (jnp.float32 if name == "factor_gradient" else dtype)


def test_tiles_that_do_not_divide_the_inputs_are_refused():
    args = arguments(128, 384, 128, 8, jnp.float32)["forward"]
    forward = functools.partial(tpu.forward, scale=1.0, rate=0.0, config=Config(128, 128, 256))
    with pytest.raises(ValueError, match="256 do not divide 384"):
        jax.eval_shape(forward, *args)


def test_the_pipeline_copies_no_more_than_it_must(monkeypatch):
    """Three row tiles, two column tiles, four input tiles: x twice, W thrice, A once per row tile, y and z once."""
    t, n, m, r = 384, 512, 256, 16
    args = arguments(t, n, m, r, jnp.bfloat16)
    static = {"rate": 0.1, "scale": SCALE, "config": Config(128, 128, 128), "tables": (0,)}
    copied, grid = traffic(monkeypatch, tpu.forward, *args["forward"], **static)
    assert grid == (3, 2, 4)
    assert copied == {0: 2 * t * n, 1: 3 * n * m, 2: 3 * n * r, 3: 3 * r * m, "out 0": t * m, "out 1": r * t}
    # A whole row of x at a time: x once.
    whole = static | {"config": Config(128, 128, n)}
    copied, _ = traffic(monkeypatch, tpu.forward, *args["forward"], **whole)
    assert copied == {0: t * n, 1: 3 * n * m, 2: n * r, 3: 3 * r * m, "out 0": t * m, "out 1": r * t}
    copied, _ = traffic(monkeypatch, tpu.input_gradient, *args["input_gradient"], **static)
    assert copied == {0: 4 * t * m, 1: 3 * n * m, 2: 3 * m * r, 3: 3 * r * n, "out 0": t * n, "out 1": r * t}
    copied, _ = traffic(monkeypatch, tpu.low, *args["low"], **static)
    assert copied == {0: t * n, 1: 3 * n * r, "out 0": r * t}
    del static["scale"]
    copied, _ = traffic(monkeypatch, tpu.factor_gradient, *args["factor_gradient"], **static)
    assert copied == {0: 4 * r * t, 1: t * n, "out 0": r * n}


# What the compilers of described TPUs make of them.

# (device, rows, n, m, rank, dtype, rate)
COMPILED = [
    ("v5e", 8192, 4096, 4096, 16, jnp.bfloat16, 0.0),
    pytest.param("v5p", 8191, 4096, 11008, 8, jnp.bfloat16, 0.1, marks=pytest.mark.slow),
    ("v6e", 8192, 8192, 128, 64, jnp.bfloat16, 0.1),
    ("v5p", 8192, 8192, 28672, 256, jnp.bfloat16, 0.0),
    pytest.param("v5p", 2047, 3584, 8192, 4, jnp.float32, 0.1, marks=pytest.mark.slow),
    ("v5e", 192, 256, 512, 4, jnp.bfloat16, 0.0),  # of a mask of few rows, in two tiles of lanes
]


def arguments(t, n, m, r, dtype):
    """Operation -> its arguments as shapes."""
    shapes = {"x": (t, n), "dy": (t, m), "w": (n, m), "a": (n, r), "b": (r, m), "z": (r, t)}
    x, dy, w, a, b, z = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes.values())
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    return {
        "forward": (x, w, a, b, seed),
        "input_gradient": (dy, w, a, b, seed),
        "low": (x, a, seed),
        "factor_gradient": (z, x, seed),
    }


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("device", "t", "n", "m", "r", "dtype", "rate"), COMPILED)
def test_the_compiled_kernels(device, t, n, m, r, dtype, rate):
    for name, args in arguments(t, n, m, r, dtype).items():
        static = {"rate": rate} if name == "factor_gradient" else {"rate": rate, "scale": SCALE}
        assert getattr(tpu, f"supports_{name}")(*args, **static)
        check_alone(device, getattr(tpu, name), *args, **static)


# Tiles.


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_for_every_shape(itemsize):
    """Tiles divide what is summed over, and blocks leave the compiler a part of the limit."""
    for shape in {(shape.n, shape.m) for model in MODELS.values() for shape in model}:
        for (n, m), r, rows in ((sizes, r, rows) for sizes in (shape, shape[::-1]) for r in RANKS for rows in ROWS):
            config = tpu.default_config(rows, n, m, r, itemsize)
            assert n % config.inputs == 0
            assert config.vmem_limit_bytes < 64 * 2**20


def test_candidates_of_a_call():
    """Of y (T, m) the columns are m's, of dx (T, n) they are n's; the default comes first."""
    t, n, m, r = 2048, 8192, 128, 16
    args = arguments(t, n, m, r, jnp.bfloat16)
    assert tpu.configs("forward", *args["forward"])[0] == tpu.default_config(t, n, m, r, 2)
    assert tpu.configs("input_gradient", *args["input_gradient"])[0] == tpu.default_config(t, m, n, r, 2)
    assert tpu.configs("low", *args["low"])[0] == tpu.low_candidates(t, n, r, 2)[0]
    assert tpu.configs("factor_gradient", *args["factor_gradient"])[0] == tpu.factor_candidates(t, n, r, 2)[0]
    assert all(1 < len(tpu.configs(name, *args[name])) < 30 for name in args)


SUPPORTED = {"rows": 5, "n": 128, "m": 256, "r": 4, "dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    "change", [{"n": 64}, {"m": 200}, {"r": 3}, {"r": 257}, {"dtype": jnp.float16}], ids=lambda change: str(*change)
)
def test_what_is_not_supported(change):
    def supported(rows, n, m, r, dtype):
        args = arguments(rows, n, m, r, dtype)
        both = tpu.supports_forward(*args["forward"], scale=1.0, rate=0.1)
        assert both == tpu.supports_input_gradient(*args["input_gradient"], scale=1.0, rate=0.1)
        factor = tpu.supports_factor_gradient(*args["factor_gradient"], rate=0.1)
        assert factor == tpu.supports_low(*args["low"], scale=1.0, rate=0.1)
        return both, factor

    assert supported(**SUPPORTED) == (True, True)
    assert supported(**SUPPORTED | change) == (False, "m" in change)
