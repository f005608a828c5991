"""LoRA's kernels for NVIDIA GPUs: interpreted against float64, and compiled for an H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout, mosaic_gpu
from pallas_kernels.lora_matmul import gpu, gpu_rows, shapes
from pallas_kernels.stacked import Stacked
from tests.pallas_kernels import mosaic

SCALE = 1.5
# A value of bfloat16 is off by at most 2^-9 = 0.2 %. y is rounded, and before it z; where nothing is rounded that the
# products do not round themselves, float32 sums remain.
ROUNDED, SUMMED = 4e-3, 1e-5


def structs(rows, n, m, r, dtype=jnp.bfloat16):
    """The arguments of every function, by name."""
    extents = {"x": (rows, n), "dy": (rows, m), "w": (n, m), "a": (n, r), "b": (r, m), "z": (r, rows)}
    found = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in extents.items()}
    return found | {"seed": jax.ShapeDtypeStruct((), jnp.int32)}


def arrays(rows, n, m, r):
    """The same with values."""
    rng = np.random.default_rng(0)
    found = structs(rows, n, m, r)
    return {name: jnp.asarray(rng.normal(size=like.shape) * 3, like.dtype) for name, like in found.items()}


ARGUMENTS = {
    "forward": ("x", "w", "a", "b", "seed"),
    "low": ("x", "a", "seed"),
    "input_gradient": ("dy", "w", "a", "b", "seed"),
    "factor_gradient": ("z", "x", "seed"),
}


def expected(function, given, rate):
    """The same in float64."""
    x, dy, w, a, b, z = (np.asarray(given[name], np.float64) for name in ("x", "dy", "w", "a", "b", "z"))
    keep = np.asarray(dropout.mask(given["seed"], x.shape, rate)) / (1 - rate) if rate else 1
    low = SCALE * a.T @ (x * keep).T
    e = SCALE * b @ dy.T
    return {
        "forward": (x @ w + low.T @ b, low),
        "low": low,
        "input_gradient": (dy @ w.T + (e.T @ a.T) * keep, e),
        "factor_gradient": z @ (x * keep),
    }[function]


def options(function, rate):
    return {"rate": rate} if function == "factor_gradient" else {"rate": rate, "scale": SCALE}


@pytest.mark.parametrize(
    ("name", "function", "rate"),
    [
        ("even", "forward", 0.25),
        ("even", "input_gradient", 0.25),
        ("rank 4", "forward", 0.0),
        pytest.param("rank 64", "input_gradient", 0.0, marks=pytest.mark.slow),
        pytest.param("rank 256", "forward", 0.1, marks=pytest.mark.slow),
        ("rank 256", "factor_gradient", 0.0),
        ("odd rows", "factor_gradient", 0.25),
        pytest.param("few rows", "forward", 0.0, marks=pytest.mark.slow),
        ("few rows", "factor_gradient", 0.0),
        pytest.param("rank 24", "input_gradient", 0.1, marks=pytest.mark.slow),
        ("rank 24", "low", 0.1),
    ],
)
def test_a_kernel_is_right(name, function, rate):
    given = arrays(**shapes.SMALL[name])
    args = [given[argument] for argument in ARGUMENTS[function]]
    assert getattr(gpu, f"supports_{function}")(*args, **options(function, rate))
    ours = mosaic.run(getattr(gpu, function), *args, **options(function, rate))
    theirs = expected(function, given, rate)
    for mine, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == (jnp.float32 if function == "factor_gradient" else jnp.bfloat16)
        assert mosaic.distance(mine, right) < (SUMMED if function == "factor_gradient" else ROUNDED)


@pytest.mark.parametrize("config", [gpu.Config(64, 3, 2, 1), gpu.Config(128, 4, 2, 3)])
def test_any_number_of_blocks_and_tiles(config):
    """Several tiles for one block, in a ring that does not divide their steps; blocks with unequal numbers of tiles."""
    given = arrays(rows=392, n=192, m=256, r=8)
    args = [given[argument] for argument in ARGUMENTS["forward"]]
    ours = mosaic.run(gpu.forward, *args, scale=SCALE, rate=0.0, config=config)
    for mine, right in zip(ours, expected("forward", given, 0.0), strict=True):
        assert mosaic.distance(mine, right) < ROUNDED


def stacked(w, layers=3, index=1):
    """w as a layer of a stack; the others are NaN, or all are shapes."""
    if isinstance(w, jax.ShapeDtypeStruct):
        return Stacked(jax.ShapeDtypeStruct((layers, *w.shape), w.dtype), jax.ShapeDtypeStruct((), jnp.int32))
    return Stacked(jnp.full((layers, *w.shape), jnp.nan, w.dtype).at[index].set(w), jnp.int32(index))


@pytest.mark.parametrize("function", ["forward", "input_gradient"])
def test_a_layer_is_read_in_its_stack(function):
    given = arrays(**shapes.SMALL["even"])
    given |= {"w": stacked(given["w"])}
    args = [given[argument] for argument in ARGUMENTS[function]]
    assert getattr(gpu, f"supports_{function}")(*args, **options(function, 0.0))
    ours = mosaic.run(getattr(gpu, function), *args, **options(function, 0.0))
    theirs = expected(function, given | {"w": given["w"].take()}, 0.0)
    for mine, right in zip(ours, theirs, strict=True):
        assert mosaic.distance(mine, right) < ROUNDED


@pytest.mark.parametrize("function", ["forward", "input_gradient"])
def test_a_stack_compiles(optimised, capfd, function):
    """Nothing but the kernels: no layer is copied."""
    given = structs(8192, 4096, 1024, 16)
    args = [stacked(given[name]) if name == "w" else given[name] for name in ARGUMENTS[function]]
    found = mosaic.compiled(capfd, getattr(gpu, function), *args, **options(function, 0.0))
    assert found.spills and not any(found.spills)
    assert found.opcodes == ["custom-call"] * 2 and found.temporaries == 0


@pytest.mark.parametrize(("name", "rate"), [("even", 0.25), pytest.param("even", 0.0, marks=pytest.mark.slow)])
def test_a_layer_is_written_in_its_stack(name, rate, monkeypatch):
    """To the bit what is written elsewhere, and nothing else.

    JAX 0.10's interpreter does not share an array that is input and output: there the kernel is given a result of the
    stack's shape, whose other layers nobody writes.
    """
    given = arrays(**shapes.SMALL[name])
    args = [given[argument] for argument in ARGUMENTS["forward"]]
    y, z = mosaic.run(gpu.forward, *args, **options("forward", rate))

    def launch(body, *operands, out, **settings):
        out = jax.ShapeDtypeStruct(out.shape, out.dtype) if isinstance(out, jax.Array) else out
        return original(body, *operands, out=out, **settings)

    original, shares = mosaic_gpu.launch, hasattr(mosaic_gpu.plgpu, "InterpretGPUParams")
    if not shares:
        monkeypatch.setattr(mosaic_gpu, "launch", launch)
    before = jnp.arange(3, dtype=y.dtype)[:, None, None] * jnp.ones_like(y)
    out = Stacked(before, jnp.int32(1))
    assert gpu.supports_forward_into(*args, out, **options("forward", rate))
    stack, again, low = mosaic.run(gpu.forward_into, *args, out, **options("forward", rate))
    np.testing.assert_array_equal(stack[1], y)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(low, z)
    others = np.asarray(stack[::2], np.float32)
    assert np.array_equal(others, before[::2]) if shares else not np.isfinite(others).any()


def test_a_stack_that_is_written_compiles(optimised, capfd):
    """Nothing but the kernels, and an array that is not filled: neither the layer nor the stack is copied."""
    given = structs(8192, 1024, 4096, 16)

    def run(*args, **static):
        out = Stacked(jax.lax.empty((3, 8192, 4096), jnp.bfloat16), jnp.int32(1))
        stack, _, low = gpu.forward_into(*args, out, **static)
        return stack, low

    found = mosaic.compiled(capfd, run, *(given[name] for name in ARGUMENTS["forward"]), **options("forward", 0.0))
    assert found.spills and not any(found.spills)
    assert set(found.opcodes) == {"constant", "custom-call"} and found.temporaries <= 1024
    assert found.in_place == 1


def test_what_is_supported():
    def supported(dtype=jnp.bfloat16, r=16, n=256, m=128):
        given = structs(200, n, m, r, dtype)
        found = [
            getattr(gpu, f"supports_{name}")(*(given[argument] for argument in arguments), **options(name, 0.1))
            for name, arguments in ARGUMENTS.items()
        ]
        assert len(set(found)) == 1
        return found[0]

    assert supported() and supported(jnp.float16) and supported(r=4) and supported(r=256)
    assert not supported(jnp.float32) and not supported(r=2) and not supported(r=257)
    given = structs(200, 250, 128, 16)
    assert not gpu.supports_factor_gradient(given["z"], given["x"], given["seed"], rate=0.0)
    for maps in shapes.MODELS.values():
        for _, n, m in maps:
            config = gpu.default_config(8192, n, m, 16)
            assert m % config.columns == 0 and config in gpu.candidates(8192, n, m, 16)


@pytest.mark.parametrize(
    ("function", "rows", "n", "m", "r", "rate"),
    [
        ("forward", 8192, 4096, 4096, 16, 0.0),
        pytest.param("forward", 8192, 4096, 14336, 64, 0.1, marks=pytest.mark.slow),
        pytest.param("forward", 8192, 8192, 1024, 8, 0.0, marks=pytest.mark.slow),
        ("forward", 8192, 8192, 128, 256, 0.1),
        pytest.param("input_gradient", 8192, 14336, 4096, 16, 0.1, marks=pytest.mark.slow),
        ("input_gradient", 8192, 4096, 4096, 256, 0.1),
        pytest.param("input_gradient", 8192, 8192, 128, 64, 0.0, marks=pytest.mark.slow),
        ("factor_gradient", 8192, 14336, 4096, 16, 0.1),
        ("factor_gradient", 8192, 4096, 4096, 256, 0.0),
    ],
)
def test_a_kernel_compiles(optimised, capfd, function, rows, n, m, r, rate):
    """Without spills, other operations or memory; but a factor's gradient adds up sums over parts of the rows."""
    given = structs(rows, n, m, r)
    args = [given[argument] for argument in ARGUMENTS[function]]
    found = mosaic.compiled(capfd, getattr(gpu, function), *args, **options(function, rate))
    assert found.spills and not any(found.spills)
    if function == "factor_gradient":
        parts = gpu_rows.parts_of_rows(rows, n, gpu.Config())
        assert found.opcodes == (["custom-call"] if parts == 1 else ["custom-call", "fusion"])
        assert found.temporaries <= (0 if parts == 1 else parts * r * n * 4)
    else:
        assert found.opcodes == ["custom-call"] * 2 and found.temporaries == 0


@pytest.mark.slow
def test_an_odd_number_of_rows_and_ranks_compiles(optimised, capfd):
    """Whose arrays are copied, so that TMA takes them."""
    given = structs(1001, 512, 1024, 100)
    for function in ("forward", "input_gradient", "factor_gradient"):
        args = [given[argument] for argument in ARGUMENTS[function]]
        found = mosaic.compiled(capfd, getattr(gpu, function), *args, **options(function, 0.1))
        assert found.spills and not any(found.spills)
