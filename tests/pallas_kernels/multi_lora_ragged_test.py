"""Adapters of ranks of their own in one product: values, gradients, and that nothing is as wide as the largest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.multi_lora_matmul import multi_lora_matmul
from pallas_kernels.platform import tracing_for

RANKS, SCALES, ADAPTER = (2, 9, 1), (0.5, 7.0, 2.0), np.array([2, -1, 0, 2, 1])


def arrays(length, n=24, m=16):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    a, b = [normal(n, r) for r in RANKS], [normal(r, m) for r in RANKS]
    return normal(len(ADAPTER), length, n), normal(n, m), a, b, normal(len(ADAPTER), length, m)


def by_rows(x, w, a, b):
    """Each row with its own factors."""
    rows = []
    for row, g in zip(x, ADAPTER.tolist(), strict=True):
        rows.append(row @ w + (SCALES[g] * (row @ a[g] @ b[g]) if g >= 0 else 0))
    return jnp.stack(rows)


def by_tiles(x, w, a, b):
    """What stands in for the kernels of an accelerator, where they don't run."""
    with tracing_for("cuda"):
        return multi_lora_matmul(x, w, a, b, jnp.asarray(ADAPTER), scales=SCALES)


def at_true_ranks(x, w, a, b):
    return multi_lora_matmul(x, w, a, b, jnp.asarray(ADAPTER), scales=SCALES)


@pytest.mark.parametrize("length", [3, 130])
@pytest.mark.parametrize("function", [at_true_ranks, by_tiles])
def test_rows_of_adapters_of_different_ranks(function, length):
    x, w, a, b, dy = arrays(length)
    found, expected = ([*jax.tree.leaves(jax.vjp(f, x, w, a, b)[1](dy)), f(x, w, a, b)] for f in (function, by_rows))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(at_true_ranks(x, w, a, b)[1], x[1] @ w)  # a row without an adapter: the base exactly


def test_plain_products_are_of_true_ranks():
    """No array has an axis of the largest rank times the adapters; one has the sum of ranks."""
    x, w, a, b, _ = arrays(3)
    text = str(jax.make_jaxpr(at_true_ranks)(x, w, a, b))
    assert "5,3,12]" in text and ",27]" not in text and "3,24,9]" not in text


@pytest.mark.parametrize(
    ("platform", "length", "kernels"), [("cuda", 128, True), ("cuda", 3, False), ("cpu", 128, False)]
)
def test_what_is_traced_for_an_accelerator_asks_for_its_kernels(platform, length, kernels):
    x, w, a, b, _ = arrays(length)
    with tracing_for(platform):
        text = str(jax.make_jaxpr(lambda *args: at_true_ranks(*args))(x, w, a, b))
    assert ("multi_lora_forward" in text) == kernels


def test_lists_that_do_not_belong_together():
    x, w, a, b, _ = arrays(3)
    for wrong in ((a[:2], b), (a[::-1], b), ([], [])):
        with pytest.raises(ValueError, match="do not belong together"):
            multi_lora_matmul(x, w, *wrong, jnp.asarray(ADAPTER), scales=SCALES)
