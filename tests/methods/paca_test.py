"""PaCA: the gradient is a part of the kernel's, merging writes rows, which rows, the rate, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import paca
from tests import residuals, tiny

RANK, LAYERS, SITES = 4, 3, 7
BATCH = tiny.batch()


def start(method):
    return jp.setup(method, *tiny.model(), jax.random.key(0))


def test_gradient_is_that_of_the_kernels_rows():
    """dP = dW[i], with the other sites' rows away from their start, against full fine-tuning of the merged model."""
    method = jp.paca(RANK)
    model, trainable, rest = start(method)
    keys = jax.random.split(jax.random.key(2), len(trainable))
    trainable = {
        path: leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, trainable.items(), strict=True)
    }

    def gradients(model, trainable, rest):
        loss = lambda trainable: jp.completion_loss(model, jp.combine(trainable, rest), BATCH)[0]
        return jax.jit(jax.grad(loss))(trainable)

    found = gradients(model, trainable, rest)
    merged = tree.flatten(method.merge(jp.combine(trainable, rest)))
    whole = gradients(tiny.model()[0], merged, {})
    for path, gradient in found.items():
        site = path.removesuffix("/paca/rows")
        index = rest[f"{site}/paca/index"]
        rows = jnp.take_along_axis(whole[f"{site}/kernel"], index[:, :, None], axis=1)
        np.testing.assert_allclose(gradient, rows, rtol=1e-4, atol=1e-6, err_msg=site)


def test_merging_writes_the_rows_and_nothing_else():
    method = jp.paca(RANK, targets=["down_proj"])
    _, trainable, rest = start(method)
    trainable = {path: leaf + 1 for path, leaf in trainable.items()}
    merged = tree.flatten(method.merge(jp.combine(trainable, rest)))
    site = "layers/mlp/down_proj"
    changed = np.any(np.asarray(merged[f"{site}/kernel"] != rest[f"{site}/kernel"]), axis=2)
    for layer, index in enumerate(rest[f"{site}/paca/index"]):
        assert np.flatnonzero(changed[layer]).tolist() == index.tolist()
        np.testing.assert_array_equal(merged[f"{site}/kernel"][layer, index], trainable[f"{site}/paca/rows"][layer])


def test_keeps_some_inputs_alone():
    """r float32 per token, site and layer beyond what a frozen backbone keeps."""
    ours = residuals.bytes_per_token(*start(jp.paca(RANK)), tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    token_ids = 4  # the backbone keeps the int32 token for the gradient of its embeddings; PaCA does not
    assert ours - (floor - token_ids) == SITES * LAYERS * RANK * 4


def test_rows_differ_from_layer_to_layer_and_are_distinct():
    _, _, rest = start(jp.paca(8, targets=["q_proj", "o_proj"]))
    found = [index for path, leaf in rest.items() if path.endswith("/index") for index in leaf]
    assert len({tuple(index.tolist()) for index in found}) == 2 * LAYERS
    assert all(index.dtype == jnp.int32 and len(set(index.tolist())) == 8 for index in found)


@pytest.mark.parametrize(("choice", "expected"), [("largest", [1, 4]), ("smallest", [0, 3])])
def test_rows_by_their_norms(choice, expected):
    kernel = jnp.array([0.1, -5, 2, 0.2, 4, 1])[:, None] * jnp.ones((6, 3))
    assert paca.choose_rows(jax.random.key(0), kernel, 2, choice).tolist() == expected


def test_alpha_is_a_rate():
    """The direction of the rows, and no other, is alpha / r times as much."""
    direction = {}
    for alpha in (None, 8.0):
        method = jp.paca(RANK, alpha, targets=["q_proj"])
        _, trainable, _ = start(method)
        leaves = {**trainable, "other": jnp.ones(3)}
        optimizer = method.update(optax.identity(), None)
        direction[alpha], _ = optimizer.update(leaves, optimizer.init(leaves), leaves)
    path = "layers/self_attn/q_proj/paca/rows"
    np.testing.assert_allclose(direction[8.0][path], 2 * direction[None][path])
    np.testing.assert_allclose(direction[8.0]["other"], direction[None]["other"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "paca: rank 0 must be"), ({"rows": "best"}, "paca: rows 'best' is not one of random, largest")],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.paca(**options)
