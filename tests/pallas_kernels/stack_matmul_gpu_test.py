"""The product of few rows with a layer of a stack, on a GPU: interpreted, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.stack_matmul import gpu
from pallas_kernels.stacked import Stacked
from tests.pallas_kernels import mosaic

LAYERS, LAYER = 3, 1


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize(
    ("rows", "n", "m", "config"),
    [
        (1, 256, 128, None),
        (16, 320, 256, gpu.Config(parts=5, slots=3, blocks=3)),
        (100, 128, 384, gpu.Config(parts=1, slots=2, blocks=2)),
        (72, 512, 128, gpu.Config(parts=2, blocks=132)),
    ],
)
def test_the_product_is_that_of_the_slice(rows, n, m, config):
    x, w = normal(rows, n, seed=0), normal(n, m, seed=1)
    stack = jnp.full((LAYERS, n, m), jnp.nan, w.dtype).at[LAYER].set(w)  # nothing of other layers is read
    args = (x, Stacked(stack, jnp.int32(LAYER)))
    assert gpu.supports_forward(*args)
    (ours,) = mosaic.run(gpu.forward, *args, config=config)
    assert ours.dtype == x.dtype
    assert mosaic.distance(ours, np.asarray(x, np.float64) @ np.asarray(w, np.float64)) < 3e-3  # one rounding


@pytest.mark.parametrize(("rows", "n", "m"), [(16, 4096, 14336), (1, 14336, 4096), (128, 4096, 14336)])
def test_it_compiles_without_a_copy_of_the_layer(optimised, capfd, rows, n, m):
    """The kernel and the sum of its parts."""
    struct = jax.ShapeDtypeStruct
    w = Stacked(struct((LAYERS, n, m), jnp.bfloat16), struct((), jnp.int32))
    found = mosaic.compiled(capfd, gpu.forward, struct((rows, n), jnp.bfloat16), w)
    assert found.spills and not any(found.spills)
    parts = gpu.default_config(rows, n, m).parts
    assert found.temporaries <= 4 * parts * max(rows, 8) * m + 2 * max(rows, 8) * n < 2 * n * m / 4


def test_which_shapes_it_takes_and_how_many_blocks_work():
    def takes(n, m, dtype=jnp.bfloat16):
        struct = jax.ShapeDtypeStruct
        return gpu.supports_forward(struct((16, n), dtype), Stacked(struct((LAYERS, n, m), dtype), struct((), "int32")))

    assert takes(4096, 1024) and takes(64, 128)
    assert not takes(96, 128) and not takes(128, 64) and not takes(128, 128, jnp.float32)
    for n, m in ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)):
        tiles = m // gpu.COLUMNS * gpu.default_config(16, n, m).parts
        waves = -(-tiles // 132)
        assert n // 64 % gpu.default_config(16, n, m).parts == 0 and tiles >= 0.8 * 132 * waves
