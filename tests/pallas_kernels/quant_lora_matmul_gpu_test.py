"""LoRA's kernels over packed kernels, for NVIDIA GPUs: interpreted against float64, and compiled for an H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout, packed
from pallas_kernels.lora_matmul import shapes
from pallas_kernels.quant_lora_matmul import gpu
from pallas_kernels.stacked import Stacked
from tests.pallas_kernels import mosaic

SCALE = 1.5
ROUNDED = 4e-3  # as in lora_matmul_gpu_test.py
ARGUMENTS = {"forward": ("x", "w", "a", "b", "seed"), "input_gradient": ("dy", "w", "a", "b", "seed")}


def structs(rows, n, m, r, format, group, dtype=jnp.bfloat16):
    """The arguments of both functions, by name."""
    extents = {"x": (rows, n), "dy": (rows, m), "a": (n, r), "b": (r, m)}
    found = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in extents.items()}
    w = jax.ShapeDtypeStruct((n, m), jnp.float32)
    found["w"] = jax.eval_shape(lambda w: packed.quantize(w, format, group), w)
    return found | {"seed": jax.ShapeDtypeStruct((), jnp.int32)}


def arrays(rows, n, m, r, format, group):
    """The same with values."""
    rng = np.random.default_rng(0)
    found = {
        name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for name, shape in {"x": (rows, n), "dy": (rows, m), "a": (n, r), "b": (r, m)}.items()
    }
    w = packed.quantize(jnp.asarray(rng.normal(size=(n, m)), jnp.float32), format, group)
    return found | {"w": w, "seed": jnp.int32(7)}


def expected(function, given, rate):
    """The same in float64, of the W that is rounded to bfloat16."""
    x, dy, a, b = (np.asarray(given[name], np.float64) for name in ("x", "dy", "a", "b"))
    w = np.asarray(packed.dequantize(given["w"], jnp.bfloat16), np.float64)
    keep = np.asarray(dropout.mask(given["seed"], x.shape, rate)) / (1 - rate) if rate else 1
    if function == "forward":
        low = SCALE * a.T @ (x * keep).T
        return x @ w + low.T @ b, low
    e = SCALE * b @ dy.T
    return dy @ w.T + (e.T @ a.T) * keep, e


@pytest.mark.parametrize(
    ("function", "format", "group", "shape", "rate", "config"),
    [
        ("forward", "nf4", 64, (200, 256, 192, 16), 0.0, None),
        pytest.param("forward", "int4", 128, (136, 128, 128, 72), 0.25, None, marks=pytest.mark.slow),
        ("forward", "int8", 128, (392, 128, 192, 8), 0.0, gpu.Config(256, 6, 2, 4, 1)),
        ("input_gradient", "nf4", 128, (130, 256, 128, 16), 0.25, None),
        ("input_gradient", "int4", 64, (264, 256, 128, 8), 0.0, gpu.Config(256, 3, 2, 4, 1)),
        pytest.param("input_gradient", "int8", 64, (7, 256, 192, 16), 0.25, None, marks=pytest.mark.slow),
    ],
)
def test_a_kernel_is_right(function, format, group, shape, rate, config):
    given = arrays(*shape, format, group)
    args, static = [given[argument] for argument in ARGUMENTS[function]], {"scale": SCALE, "rate": rate}
    assert getattr(gpu, f"supports_{function}")(*args, **static)
    ours = mosaic.run(getattr(gpu, function), *args, **static, config=config)
    for mine, right in zip(ours, expected(function, given, rate), strict=True):
        assert mine.dtype == jnp.bfloat16 and mosaic.distance(mine, right) < ROUNDED


def stacked(w, index=1):
    """w as a layer of a stack of three."""
    whole = jax.tree.map(lambda x: jnp.zeros((3, *x.shape), x.dtype).at[index].set(x), w)
    return Stacked(whole, jnp.int32(index))


@pytest.mark.parametrize(("function", "format"), [("forward", "nf4"), ("input_gradient", "int8")])
def test_a_layer_is_read_in_its_stack(function, format):
    given, static = arrays(136, 128, 128, 16, format, 64), {"scale": SCALE, "rate": 0.0}
    args = [stacked(given[name]) if name == "w" else given[name] for name in ARGUMENTS[function]]
    assert getattr(gpu, f"supports_{function}")(*args, **static)
    ours = mosaic.run(getattr(gpu, function), *args, **static)
    for mine, right in zip(ours, expected(function, given, 0.0), strict=True):
        assert mosaic.distance(mine, right) < ROUNDED


def test_the_codes_of_a_stack_are_not_copied(optimised, capfd):
    """Of memory there is that for the scales of the layer."""
    n, m = 4096, 4096
    given = structs(2048, n, m, 16, "int4", 128)
    args = [jax.eval_shape(stacked, given[name]) if name == "w" else given[name] for name in ARGUMENTS["forward"]]
    found = mosaic.compiled(capfd, gpu.forward, *args, scale=SCALE, rate=0.0, config=gpu.Config())
    assert found.spills and not any(found.spills)
    assert found.opcodes.count("custom-call") == 2 and found.temporaries <= 4 * n * m // 128 * 1.01


def test_what_is_supported():
    def supported(n=256, m=192, r=16, format="nf4", group=64, dtype=jnp.bfloat16):
        given, static = structs(200, n, m, r, format, group, dtype), {"scale": SCALE, "rate": 0.1}
        found = [
            getattr(gpu, f"supports_{name}")(*(given[arg] for arg in ARGUMENTS[name]), **static) for name in ARGUMENTS
        ]
        assert found[0] == found[1]
        return found[0]

    assert all(supported(format=format, group=group) for format in packed.FUSED for group in (64, 128, 256))
    assert not any(supported(format=format) for format in set(packed.FORMATS) - set(packed.FUSED))
    assert not supported(n=192) and not supported(m=100) and not supported(group=32) and not supported(r=2)
    assert not supported(dtype=jnp.float32)
    for maps in shapes.MODELS.values():
        assert all(gpu.candidates(8192, n, m, r) for _, n, m in maps for r in shapes.RANKS)


@pytest.mark.parametrize(
    ("function", "format", "shape", "rate"),
    [
        ("forward", "nf4", (8192, 4096, 14336, 16), 0.0),
        ("forward", "int8", (8192, 8192, 128, 256), 0.1),
        ("input_gradient", "nf4", (8192, 4096, 4096, 64), 0.1),
        ("input_gradient", "int4", (8192, 14336, 4096, 16), 0.0),
    ],
)
def test_a_kernel_compiles(optimised, capfd, function, format, shape, rate):
    """Without spills; the only memory is for the scales, where they are coded."""
    given = structs(*shape, format, 64 if format == "nf4" else 128)
    args = [given[name] for name in ARGUMENTS[function]]
    found = mosaic.compiled(capfd, getattr(gpu, function), *args, scale=SCALE, rate=rate, config=gpu.Config())
    assert found.spills and not any(found.spills)
    assert found.opcodes.count("custom-call") == 2
    decoded = 4 * shape[1] * shape[2] // 64 if format == "nf4" else 0
    assert len(found.opcodes) > 2 if decoded else len(found.opcodes) == 2
    assert found.temporaries <= decoded * 1.01


@pytest.mark.parametrize("function", ["forward", "input_gradient"])
def test_many_rows_take_an_unpacked_kernel(optimised, capfd, function):
    """The dense products, without spills; of memory there is one unpacked kernel, and its scales."""
    n, m = 4096, 1024
    given = structs(gpu.UNPACKED, n, m, 16, "nf4", 64)
    args, static = [given[name] for name in ARGUMENTS[function]], {"scale": SCALE, "rate": 0.0}
    assert gpu.configs(function, *args) == []
    found = mosaic.compiled(capfd, getattr(gpu, function), *args, **static)
    assert found.spills and not any(found.spills) and found.opcodes.count("custom-call") == 2
    assert 2 * n * m <= found.temporaries <= 2 * n * m + 4 * n * m // 64 * 1.1
    fewer = structs(gpu.UNPACKED - 8, n, m, 16, "nf4", 64)
    found = mosaic.compiled(capfd, getattr(gpu, function), *[fewer[name] for name in ARGUMENTS[function]], **static)
    assert found.temporaries < n * m // 8
