"""TPU kernels for rows of different adapters: their numbers, interpreted, and what a TPU's compiler makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora_matmul.shapes import MODELS, RANKS, ROWS
from pallas_kernels.multi_lora_matmul import tpu
from pallas_kernels.multi_lora_matmul.tpu import Config
from tests.pallas_kernels.mosaic_tpu import INTERPRETED, check_alone, compiled, relative, traffic

# As in lora_matmul_tpu_test.
BOUNDS = {jnp.bfloat16: 6e-3, jnp.float32: 2e-6}
# (rows, owners, (n, m, r), tiles (rows, columns, inputs), dtype); there are four adapters.
NUMBERS = {
    "not neighbours, ragged": (400, (2, 0, 2, 1), (256, 384, 16), (256, 256, 128), jnp.bfloat16),
    "more tiles than owners": (300, (3, 1, 3), (128, 256, 4), (256, 128, 128), jnp.float32),
    "one, few rows": (7, (2,), (128, 128, 24), None, jnp.bfloat16),
    "rank 128": (256, (1, 0), (256, 128, 128), (128, 128, 128), jnp.bfloat16),
}


@pytest.mark.parametrize(("t", "owner", "sizes", "tiles", "dtype"), NUMBERS.values(), ids=NUMBERS)
def test_the_numbers(t, owner, sizes, tiles, dtype):
    """Against float64 NumPy, adapter by adapter; the second one has half the rank."""
    (n, m, r), count = sizes, 4
    rng = np.random.default_rng(t)
    shapes = {"x": (t, n), "dy": (t, m), "w": (n, m), "a": (count, n, r), "b": (count, r, m), "z": (r, t)}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    arrays["a"][1, :, r // 2 :] = arrays["b"][1, r // 2 :] = 0
    x, dy, w, a, b, z = (jnp.asarray(array, dtype) for array in arrays.values())
    scales = jnp.asarray(rng.uniform(0.5, 2, size=count), jnp.float32)
    table = jnp.array(owner, jnp.int32)
    options = {"config": tiles and Config(*tiles), "interpret": INTERPRETED}
    y, low = tpu.forward(x, w, a, b, scales, table, **options)
    dx, e = tpu.input_gradient(dy, w, a, b, scales, table, **options)
    factors = tpu.factor_gradient(z, x, table, count=count, **options)

    x, dy, w, a, b, z, scales = (np.asarray(array, np.float64) for array in (x, dy, w, a, b, z, scales))
    of = np.repeat(owner, 128)[:t]
    exact_low = np.einsum("t,tn,tnr->rt", scales[of], x, a[of])
    exact_e = np.einsum("t,tm,trm->rt", scales[of], dy, b[of])
    assert relative(low, exact_low) < BOUNDS[dtype]
    assert relative(y, x @ w + np.einsum("rt,trm->tm", exact_low, b[of])) < BOUNDS[dtype]
    assert relative(e, exact_e) < BOUNDS[dtype]
    assert relative(dx, dy @ w.T + np.einsum("rt,tnr->tn", exact_e, a[of])) < BOUNDS[dtype]
    exact = np.stack([z[:, of == g] @ x[of == g] for g in range(count)])
    assert relative(factors, exact) < 2e-6
    assert not np.asarray(factors)[[g for g in range(count) if g not in owner]].any()


def test_visits():
    adapters, tiles = tpu.visits(jnp.array([1, 0, 1], jnp.int32), 3)
    assert adapters.tolist() == [0, 0, 1, 1, 1, 2]
    assert tiles.tolist() == [1, 1, 0, 0, 2, 2]


# What the compilers of described TPUs make of them.


def arguments(t, n, m, r, dtype, count):
    """Operation -> its arguments as shapes."""
    shapes = {"x": (t, n), "dy": (t, m), "w": (n, m), "a": (count, n, r), "b": (count, r, m), "z": (r, t)}
    x, dy, w, a, b, z = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes.values())
    tables = jax.ShapeDtypeStruct((count,), jnp.float32), jax.ShapeDtypeStruct((-(-t // 128),), jnp.int32)
    return {
        "forward": (x, w, a, b, *tables),
        "input_gradient": (dy, w, a, b, *tables),
        "factor_gradient": (z, x, tables[1]),
    }


COMPILED = [
    ("v5e", (8192, 4096, 4096, 16, jnp.bfloat16, 8)),
    ("v5p", (8191, 8192, 1024, 64, jnp.bfloat16, 64)),
    ("v6e", (2048, 2048, 8192, 256, jnp.bfloat16, 3)),
]


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("device", "shapes"), COMPILED)
def test_the_compiled_kernels(device, shapes):
    args = arguments(*shapes)
    count = {"count": shapes[-1]}
    for name in args:
        assert getattr(tpu, f"supports_{name}")(*args[name], **(count if name == "factor_gradient" else {}))
    check_alone(device, tpu.forward, *args["forward"])
    check_alone(device, tpu.input_gradient, *args["input_gradient"])
    # The order of the visits is sorted outside.
    made, counted = compiled(device, tpu.factor_gradient, *args["factor_gradient"], **count)
    assert made.memory.temporaries < 2**17
    assert 0.9 * counted < made.executable.cost_analysis()["bytes accessed"] < 1.1 * counted


def test_the_pipeline_copies_only_factors_that_rows_need(monkeypatch):
    """One block of A per 128 rows, whatever the number of adapters; the gradient reads x once."""
    t, n, m, r, count = 512, 256, 256, 16, 50
    args = arguments(t, n, m, r, jnp.bfloat16, count)
    owner, scales = np.array([40, 7, 40, 3]), np.ones(count)
    static = {"config": Config(256, 128, 128), "tables": (owner, scales)}
    copied, grid = traffic(monkeypatch, tpu.forward, *args["forward"], **static)
    assert grid == (2, 2, 2)
    # x, W; A of the first and the second 128 rows of the row tiles, twice B of them (adapter 40's stays).
    assert [copied[i] for i in range(6)] == [2 * t * n, 2 * n * m, 2 * n * r, 2 * n * r, 2 * r * m, 2 * r * m]
    static |= {"tables": tuple(np.asarray(table) for table in tpu.visits(jnp.asarray(owner), count)), "count": count}
    copied, grid = traffic(monkeypatch, tpu.factor_gradient, *args["factor_gradient"], **static)
    assert grid == (2, count + 4)
    assert copied == {0: 2 * r * t, 1: t * n, "out 0": count * r * n}


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_for_every_shape(itemsize):
    for shape in {(shape.n, shape.m) for model in MODELS.values() for shape in model}:
        for (n, m), r, rows in ((sizes, r, rows) for sizes in (shape, shape[::-1]) for r in RANKS for rows in ROWS):
            assert n % tpu.default_config(rows, n, m, r, itemsize).inputs == 0
            assert tpu.factor_candidates(n, r, itemsize)


def test_candidates_of_a_call():
    args = arguments(2048, 8192, 128, 16, jnp.bfloat16, 3)
    assert tpu.configs("forward", *args["forward"])[0] == tpu.default_config(2048, 8192, 128, 16, 2)
    assert tpu.configs("input_gradient", *args["input_gradient"])[0] == tpu.default_config(2048, 128, 8192, 16, 2)
    assert tpu.configs("factor_gradient", *args["factor_gradient"])[0] == tpu.factor_candidates(8192, 16, 2)[0]


def test_what_is_not_supported():
    def supported(rows=5, n=128, r=4, dtype=jnp.bfloat16, tiles=None):
        args = arguments(rows, n, 256, r, dtype, 2)
        table = jax.ShapeDtypeStruct((tiles or -(-rows // 128),), jnp.int32)
        found = tpu.supports_forward(*args["forward"][:-1], table)
        assert found == tpu.supports_input_gradient(*args["input_gradient"][:-1], table)
        assert found == tpu.supports_factor_gradient(*args["factor_gradient"][:-1], table, count=2)
        return found

    assert supported() and supported(rows=129, dtype=jnp.float32)
    assert not supported(n=192)
    assert not supported(r=257)
    assert not supported(dtype=jnp.float16)
    assert not supported(rows=129, tiles=1)
