"""LoRA's kernels for rows of different adapters, for NVIDIA GPUs: interpreted, and compiled for an H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.multi_lora_matmul import gpu
from pallas_kernels.multi_lora_matmul.reference import TILE
from tests.pallas_kernels import mosaic

ROUNDED, SUMMED = 4e-3, 1e-5  # as in lora_matmul_gpu_test.py
ARGUMENTS = {
    "forward": ("x", "w", "a", "b", "scales", "owner"),
    "input_gradient": ("dy", "w", "a", "b", "scales", "owner"),
    "factor_gradient": ("z", "x", "owner"),
}


def structs(adapters, rows, n, m, r, dtype=jnp.bfloat16):
    """The arguments of every function, by name."""
    extents = {"x": (rows, n), "dy": (rows, m), "w": (n, m), "z": (r, rows)}
    extents |= {"a": (adapters, n, r), "b": (adapters, r, m)}
    found = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in extents.items()}
    found["scales"] = jax.ShapeDtypeStruct((adapters,), jnp.float32)
    return found | {"owner": jax.ShapeDtypeStruct((-(-rows // TILE),), jnp.int32)}


def arrays(owner, *shape):
    """The same with values."""
    rng = np.random.default_rng(0)
    found = {name: jnp.asarray(rng.normal(size=like.shape) * 2, like.dtype) for name, like in structs(*shape).items()}
    return found | {"owner": jnp.asarray(owner, jnp.int32)}


def options(function, given):
    return {"count": len(given["scales"])} if function == "factor_gradient" else {}


def expected(function, given):
    """The same in float64."""
    x, dy, w, a, b, z, s = (np.asarray(given[name], np.float64) for name in ("x", "dy", "w", "a", "b", "z", "scales"))
    of = np.repeat(np.asarray(given["owner"]), TILE)[: len(x)]
    if function == "factor_gradient":
        return np.stack([(z * (of == g)) @ x for g in range(len(s))])
    if function == "forward":
        low = s[of] * np.einsum("tn,tnr->rt", x, a[of])
        return x @ w + np.einsum("rt,trm->tm", low, b[of]), low
    e = s[of] * np.einsum("tm,trm->rt", dy, b[of])
    return dy @ w.T + np.einsum("rt,tnr->tn", e, a[of]), e


@pytest.mark.parametrize(
    ("function", "owner", "shape"),
    [
        ("forward", [2, 0], (3, 200, 128, 128, 16)),
        ("input_gradient", [1, 0, 1], (2, 300, 128, 192, 72)),
        ("factor_gradient", [0, 2, 0], (3, 329, 128, 128, 8)),
    ],
)
def test_a_kernel_is_right(function, owner, shape):
    given = arrays(owner, *shape)
    args = [given[argument] for argument in ARGUMENTS[function]]
    static = options(function, given)
    assert getattr(gpu, f"supports_{function}")(*args, **static)
    ours, theirs = mosaic.run(getattr(gpu, function), *args, **static), expected(function, given)
    for mine, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mosaic.distance(mine, right) < (SUMMED if function == "factor_gradient" else ROUNDED)
    if function == "factor_gradient":
        assert not np.asarray(ours[1]).any(), "an adapter that owns nothing"


def test_what_is_supported():
    for dtype, supported in ((jnp.bfloat16, True), (jnp.float32, False)):
        given = structs(2, 200, 128, 128, 16, dtype)
        for function, names in ARGUMENTS.items():
            found = getattr(gpu, f"supports_{function}")(*(given[name] for name in names), **options(function, given))
            assert found == supported


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        ("forward", (8, 8192, 4096, 4096, 16)),
        ("input_gradient", (8, 8192, 4096, 14336, 64)),
        ("factor_gradient", (8, 8192, 4096, 4096, 16)),
        ("factor_gradient", (4, 8192, 14336, 4096, 256)),
    ],
)
def test_a_kernel_compiles(optimised, capfd, function, shape):
    """Without spills, other operations or memory."""
    given = structs(*shape)
    args = [given[name] for name in ARGUMENTS[function]]
    found = mosaic.compiled(capfd, getattr(gpu, function), *args, **options(function, given))
    assert found.spills and not any(found.spills)
    assert set(found.opcodes) == {"custom-call"} and found.temporaries == 0
