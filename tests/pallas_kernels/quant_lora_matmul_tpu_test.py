"""TPU kernels over packed kernels: their numbers, interpreted on the CPU, and what a TPU's compiler makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout
from pallas_kernels.lora_matmul.shapes import MODELS, RANKS, ROWS
from pallas_kernels.packed import NF4, Packed, dequantize, quantize
from pallas_kernels.quant_lora_matmul import tpu
from pallas_kernels.quant_lora_matmul.tpu import Config
from tests.pallas_kernels.mosaic_tpu import INTERPRETED, check_alone, compiled, relative

SCALE = 1.5
# As in lora_matmul_tpu_test: W is the same rounded tile on both sides.
BOUNDS = {jnp.bfloat16: 6e-3, jnp.float32: 2e-6}
# (format, group, (rows, n, m, r), tiles (rows, columns, inputs) of forward and input_gradient, dtype, rate)
ONE = (128, 128, 128)
NUMBERS = {
    "nf4, doubled": ("nf4", 64, (200, 256, 256, 16), (ONE, ONE), jnp.bfloat16, 0.3),
    "int4": ("int4", 128, (130, 256, 384, 8), ((128, 256, 128), ONE), jnp.float32, 0.0),
    "int8, few rows": ("int8", 128, (7, 384, 128, 24), None, jnp.bfloat16, 0.3),
    # Eight groups or more: blocks of scales, which for the gradient are ragged.
    "blocks of scales": ("nf4", 128, (128, 2048, 128, 4), ((128, 128, 1024), (128, 1024, 128)), jnp.float32, 0.0),
    "ragged blocks of scales": ("int8", 64, (128, 768, 128, 128), (ONE, (128, 512, 128)), jnp.bfloat16, 0.0),
    "int4, one group": ("int4", 384, (128, 384, 128, 8), None, jnp.bfloat16, 0.0),
}


@pytest.mark.parametrize(("format", "group", "shape", "tiles", "dtype", "rate"), NUMBERS.values(), ids=NUMBERS)
def test_the_numbers(format, group, shape, tiles, dtype, rate):
    """Against float64 NumPy with the same unpacked elements and the same mask."""
    t, n, m, r = shape
    rng = np.random.default_rng(n)
    shapes = {"x": (t, n), "dy": (t, m), "a": (n, r), "b": (r, m)}
    x, dy, a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes.values())
    w = quantize(jnp.asarray(rng.normal(size=(n, m)), jnp.float32), format, group)
    assert w.doubled == (format == "nf4")
    seed = jnp.int32(11)
    mask = np.asarray(dropout.mask(seed, (t, n), rate)) / (1 - rate)
    options = {"scale": SCALE, "rate": rate, "interpret": INTERPRETED}
    configs = [Config(*tile) for tile in tiles] if tiles else (None, None)
    y, z = tpu.forward(x, w, a, b, seed, config=configs[0], **options)
    dx, e = tpu.input_gradient(dy, w, a, b, seed, config=configs[1], **options)
    x, dy, a, b, kernel = (np.asarray(array, np.float64) for array in (x, dy, a, b, dequantize(w, dtype)))
    low, back = SCALE * (x * mask @ a).T, SCALE * b @ dy.T
    assert relative(z, low) < BOUNDS[dtype]
    assert relative(y, x @ kernel + low.T @ b) < BOUNDS[dtype]
    assert relative(e, back) < BOUNDS[dtype]
    assert relative(dx, dy @ kernel.T + mask * (back.T @ a.T)) < BOUNDS[dtype]


def test_every_code_is_unpacked_exactly():
    """All 256 bytes: x picks the rows of W, so that y is W."""
    codes = jnp.arange(256, dtype=jnp.uint8).repeat(32).reshape(64, 128)
    w = Packed(codes, jnp.full((2, 128), 0.7, jnp.float32), format="nf4", group=64)
    a, b = jnp.zeros((128, 8)), jnp.zeros((8, 128))
    y, _ = tpu.forward(jnp.eye(128), w, a, b, jnp.int32(0), scale=1.0, rate=0.0, interpret=INTERPRETED)
    table = np.array(NF4, np.float32) * np.float32(0.7)
    expected = np.concatenate([table[np.asarray(codes) >> 4], table[np.asarray(codes) & 15]])
    np.testing.assert_allclose(y, expected, rtol=1e-6)


# What the compilers of described TPUs make of them.


def arguments(t, n, m, r, dtype, format, group, double=False):
    """(forward's, input_gradient's) arguments as shapes."""
    x, dy, a, b = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((t, n), (t, m), (n, r), (r, m)))
    seed, kernel = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((n, m), dtype)
    w = jax.eval_shape(functools.partial(quantize, format=format, group=group, double=double), kernel)
    return (x, w, a, b, seed), (dy, w, a, b, seed)


# (device, (rows, n, m, rank, dtype, format, group), rate)
COMPILED = [
    ("v5e", (8192, 4096, 4096, 16, jnp.bfloat16, "nf4", 64), 0.0),
    ("v5p", (8191, 11008, 4096, 8, jnp.bfloat16, "int4", 128), 0.1),
    ("v6e", (8192, 8192, 28672, 64, jnp.bfloat16, "nf4", 64), 0.0),
    ("v5p", (8192, 4096, 14336, 256, jnp.bfloat16, "int8", 128), 0.0),
]


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("device", "shapes", "rate"), COMPILED)
def test_the_compiled_kernels(device, shapes, rate):
    for name, args in zip(("forward", "input_gradient"), arguments(*shapes), strict=True):
        assert getattr(tpu, f"supports_{name}")(*args, rate=rate, scale=SCALE)
        check_alone(device, getattr(tpu, name), *args, rate=rate, scale=SCALE)


@pytest.mark.usefixtures("optimised")
def test_of_a_doubly_quantized_kernel_only_the_scales_are_unpacked():
    """In device memory: n m / 64 floats, and the codes' places in the dynamic map."""
    n, m = 4096, 4096
    args, _ = arguments(2048, n, m, 16, jnp.bfloat16, "nf4", 64, double=True)
    made, _ = compiled("v5e", tpu.forward, *args, rate=0.0, scale=SCALE)
    assert made.memory.temporaries <= 3 * 4 * n * m / 64


@pytest.mark.parametrize(("format", "group"), [("nf4", 64), ("int8", 128)])
def test_tiles_fit_for_every_shape(format, group):
    for n, m in {(shape.n, shape.m) for model in MODELS.values() for shape in model}:
        for r in RANKS:
            for rows in ROWS:
                for itemsize in (2, 4):
                    assert n % tpu.default_config(rows, n, m, r, itemsize, format, group).inputs == 0
                    assert m % tpu.default_config(rows, m, n, r, itemsize, format, group, True).inputs == 0


def test_candidates_of_a_call():
    forward, gradient = arguments(2048, 8192, 128, 16, jnp.bfloat16, "nf4", 64)
    assert tpu.configs("forward", *forward)[0] == tpu.default_config(2048, 8192, 128, 16, 2, "nf4", 64)
    assert tpu.configs("input_gradient", *gradient)[0] == tpu.default_config(2048, 128, 8192, 16, 2, "nf4", 64, True)


def test_what_is_not_supported():
    def supported(n=256, group=64, dtype=jnp.bfloat16, format="nf4"):
        forward, gradient = arguments(5, n, 256, 4, dtype, format, group)
        found = tpu.supports_forward(*forward, scale=1.0, rate=0.1)
        assert found == tpu.supports_input_gradient(*gradient, scale=1.0, rate=0.1)
        return found

    assert supported() and supported(group=256) and supported(format="int8", dtype=jnp.float32)
    assert not supported(group=32)
    assert not supported(n=192)
    assert not supported(dtype=jnp.float16)
