"""SNELL: values and gradients by torch's distances, exact zeros, a rank above r, the state's bytes, what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.methods import snell
from jaxpeft.model import Context
from tests import tiny

KEY = jax.random.key(0)


def leaves(n, m, r):
    rng = np.random.default_rng(0)
    return {"p": rng.normal(size=(2, n, r // 2)), "q": rng.normal(size=(2, m, r // 2))}, rng


def float32(x):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), x)


def published(p, q, sparsity):
    """The code's update, which is zero at and below an entry of this rank."""
    k = (0.1 * torch.tensor([1.0, -1.0], dtype=p.dtype)[:, None, None] * torch.cdist(p, q)).sum(0)
    size = k.detach().abs()
    least = torch.sort(size.flatten())[0][int(sparsity * size.numel()) - 1]
    return k * torch.nn.functional.threshold(size, float(least), 0)


def test_values_and_gradients_are_those_of_the_published_layer():
    own, rng = leaves(12, 10, 6)
    x, w, dy = rng.normal(size=(7, 12)), rng.normal(size=(12, 10)), rng.normal(size=(7, 10))
    p, q, inputs = (torch.tensor(leaf, requires_grad=True) for leaf in (own["p"], own["q"], x))
    y = inputs @ (torch.tensor(w) + published(p, q, 0.4))
    (y * torch.tensor(dy)).sum().backward()
    site = sites.Site("layers/v_proj", float32(w), None, True)

    def called(own, x):
        return snell.SNELL(6, 0.4).apply({"params": own}, lambda x: x @ site.kernel, x, site, Context())

    found, back = jax.vjp(called, float32(own), float32(x))
    np.testing.assert_allclose(found, y.detach().numpy(), rtol=1e-4, atol=1e-4)
    d_own, d_x = back(float32(dy))
    np.testing.assert_allclose(d_x, inputs.grad.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_own["p"], p.grad.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(d_own["q"], q.grad.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_zeros_are_exact_and_the_rank_is_above_r(sparsity):
    own, _ = leaves(32, 56, 4)
    d = np.asarray(snell.update(*float32(own).values(), sparsity), np.float64)
    assert np.sum(d == 0) == int(sparsity * 32 * 56)
    assert np.linalg.matrix_rank(d) > 2 * 4


def test_rows_that_are_alike_have_no_gradient_that_is_not_a_number():
    p = jnp.ones((2, 3, 2))
    found = jax.grad(lambda p: jnp.sum(snell.update(p, p, 0.0)))(p)
    assert np.all(np.isfinite(found))


def test_it_starts_close_to_the_base_and_has_loras_state():
    """D is of the second order: c^2 of squared distances of vectors that are no longer than sqrt(1/n) and sqrt(1/m)."""
    method = jp.snell(8, 0.5, targets=["up_proj"])
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    site, n, m = "layers/mlp/up_proj", 32, 56
    change = tree.flatten(method.merge(jp.combine(trainable, rest)))[f"{site}/kernel"] - rest[f"{site}/kernel"]
    bound = (snell.SCALE * (n**-0.5 + m**-0.5)) ** 2
    rounding = np.abs(rest[f"{site}/kernel"]).max() * 2**-23
    assert 0 < np.abs(change).max() <= bound + rounding
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    counter = 4
    assert tree.num_bytes((state.trainable, state.opt_state)) == 3 * 12 * 8 * (n + m) + counter
    assert not state.moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, "rank 5 must be an even number of at least 2"),
        ({"rank": 0}, "rank 0 must be an even number of at least 2"),
        ({"rank": 18}, "rank 18 is above the smaller side of layers/self_attn/k_proj"),
        ({"sparsity": 1.0}, "sparsity 1.0 must be at least 0 and below 1"),
        ({"sparsity": 0.9999}, "sparsity 0.9999 leaves layers/mlp/down_proj empty, a kernel of 56 x 32"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=f"snell: {re.escape(message)}"):
        jp.setup(jp.snell(**{"rank": 4, **options}), *tiny.model(), KEY)
