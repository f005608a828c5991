"""The counter-based mask: its statistics, and that any tile of it is the tile of the whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dropout import drop, keep, mask


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_as_many_are_kept_as_should_be(rate):
    """Overall, per row and per column: means within five standard deviations, spreads as of independent draws."""
    n = 1024
    found = np.asarray(mask(jnp.int32(3), (n, n), rate))
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(found.mean() - (1 - rate)) < 5 * sigma / n
    for axis in (0, 1):
        assert abs(found.mean(axis).std() / (sigma / n**0.5) - 1) < 0.1


def test_neighbours_and_seeds_are_independent():
    """Correlations of the mask with itself shifted, and with that of the next seed."""
    n = 512
    a, b = (np.asarray(mask(jnp.int32(seed), (n, n), 0.5), np.float64) - 0.5 for seed in (0, 1))
    others = {"row": np.roll(a, 1, 0), "column": np.roll(a, 1, 1), "diagonal": np.roll(a, (1, 1), (0, 1)), "seed": b}
    others["transposed"] = np.where(np.eye(n, dtype=bool), 0, a.T)
    for name, other in others.items():
        assert abs((a * other).mean() * 4) < 5 / n, name


def test_a_tile_is_the_whole_ones():
    whole = mask(jnp.int32(-7), (64, 96), 0.3)
    rows, columns = jnp.arange(16, 48, dtype=jnp.int32), jnp.arange(32, 80, dtype=jnp.int32)
    np.testing.assert_array_equal(keep(jnp.int32(-7), rows[:, None], columns[None], 0.3), whole[16:48, 32:80])


def test_dropout_keeps_the_mean():
    x = jnp.ones((512, 512))
    dropped = drop(x, jnp.int32(1), 0.2)
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.8)}
    assert drop(x, jnp.int32(1), 0.0) is x
