"""LoRA-FA: what it keeps, the projected gradient, A from a seed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import lora_fa
from tests import residuals, tiny

SITES, LAYERS, RANK = 7, 3, 4


def start(method):
    base, params = tiny.model()
    return jp.setup(method, base, params, jax.random.key(0))


@pytest.mark.parametrize("store_a", [True, False])
def test_keeps_no_adapter_input(store_a):
    """Exactly the low-rank products beyond what a frozen backbone keeps: r float32 per token, site and layer."""
    ours = residuals.bytes_per_token(*start(jp.lora_fa(RANK, store_a=store_a)), tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    token_ids = 4  # the backbone keeps the int32 token for the gradient of its embeddings; LoRA-FA does not
    assert ours - (floor - token_ids) == SITES * LAYERS * RANK * 4


def test_lora_keeps_the_inputs_that_lora_fa_does_not():
    """The difference is every distinct adapter input: attention's, o_proj's, the MLP's and down_proj's."""
    lora = residuals.bytes_per_token(*start(jp.lora(RANK)), tiny.batch)
    ours = residuals.bytes_per_token(*start(jp.lora_fa(RANK)), tiny.batch)
    hidden, intermediate = 32, 56
    assert lora - ours == LAYERS * (3 * hidden + intermediate) * 4


def test_regenerated_a_is_not_kept_either():
    """Nothing of A's shape (layers, n, r) waits for the backward pass."""
    model, trainable, frozen = start(jp.lora_fa(RANK, store_a=False))
    shapes = [leaf.shape for leaf in residuals.saved(model, trainable, frozen, tiny.batch(rows=2))]
    assert not [shape for shape in shapes if shape in ((LAYERS, 32, RANK), (LAYERS, 56, RANK))]
    frozen_bytes = sum(leaf.nbytes for path, leaf in frozen.items() if "/lora_fa/" in path)
    assert frozen_bytes == SITES * LAYERS * 4


@pytest.mark.parametrize("init", ["kaiming", pytest.param("gaussian", marks=pytest.mark.slow), "orthonormal"])
def test_stored_and_regenerated_a_compute_the_same(init):
    """Drawing A in the pass or beforehand: the same logits and the same gradients."""
    method = jp.lora_fa(RANK, init=init, store_a=False)
    model, trainable, frozen = start(method)
    trainable = {path: jax.random.normal(jax.random.key(3), leaf.shape) for path, leaf in trainable.items()}
    stored = dict(frozen)
    for path in [path for path in frozen if path.endswith("/seed")]:
        site = path.removesuffix("/lora_fa/seed")
        leaves = {"seed": stored.pop(path), "b": trainable[f"{site}/lora_fa/b"]}
        inputs = frozen[f"{site}/kernel"].shape[-2]
        stored[f"{site}/lora_fa/a"] = lora_fa.factors(method.specs[0].config, leaves, inputs)[0]
    with_a, _, _ = jp.setup(jp.lora_fa(RANK, init=init), *tiny.model(), jax.random.key(0))
    batch = tiny.batch()

    def loss(model, frozen):
        return jax.jit(jax.value_and_grad(lambda t: jp.completion_loss(model, tree.combine(t, frozen), batch)[0]))(
            trainable
        )

    (value, grads), (value_a, grads_a) = loss(model, frozen), loss(with_a, stored)
    np.testing.assert_allclose(value, value_a, rtol=1e-6)
    for path in grads:
        np.testing.assert_allclose(grads[path], grads_a[path], rtol=1e-4, atol=1e-6)


def test_orthonormal_columns():
    _, _, frozen = start(jp.lora_fa(RANK, init="orthonormal"))
    for path, a in frozen.items():
        if path.endswith("/lora_fa/a"):
            gram = np.einsum("lnr,lns->lrs", a, a)
            np.testing.assert_allclose(gram, np.tile(np.eye(RANK), (LAYERS, 1, 1)), atol=1e-5)


def test_projection_is_the_nearest_step_to_the_full_gradient():
    """g minimises || s A g - G ||_F: least squares by numpy in float64."""
    rng = np.random.default_rng(0)
    a, full_gradient, scale = rng.normal(size=(12, 3)), rng.normal(size=(12, 5)), 2.5
    d_b = scale * a.T @ full_gradient
    nearest = np.linalg.lstsq(scale * a, full_gradient, rcond=None)[0]
    np.testing.assert_allclose(lora_fa.project(jnp.array(a), jnp.array(d_b), scale), nearest, rtol=1e-4)


def test_projected_step_uses_the_projected_gradient():
    """One SGD step of the projected method moves B by -lr (A^T A)^-1 dB / s^2."""
    base, params = tiny.model()
    batch, lr = tiny.batch(), 0.1
    steps = {}
    for projected in (False, True):
        method = jp.lora_fa(RANK, alpha=8, projected=projected)
        model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
        state = jp.init_state(method, optax.sgd(lr), trainable, frozen, jax.random.key(1))
        state, _ = jax.jit(jp.make_train_step(model, method, optax.sgd(lr)))(state, batch)
        steps[projected] = {path: np.asarray(leaf) / -lr for path, leaf in state.trainable.items()}
    for path, d_b in steps[False].items():
        a = np.asarray(frozen[path[:-1] + "a"], np.float64)
        gram = np.einsum("lnr,lns->lrs", a, a)
        expected = np.linalg.solve(gram, d_b) / (8 / RANK) ** 2
        np.testing.assert_allclose(steps[True][path], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_adam_sees_no_difference_with_orthonormal_a():
    """With A^T A = I the projection is a factor, which Adam divides out (up to eps)."""
    base, params = tiny.model()
    ends = []
    for projected in (False, True):
        method = jp.lora_fa(RANK, alpha=8, init="orthonormal", projected=projected)
        model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
        optimizer = optax.adam(1e-3, eps=1e-12)
        state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
        step = jax.jit(jp.make_train_step(model, method, optimizer))
        for i in range(3):
            state, _ = step(state, tiny.batch(seed=i))
        ends.append(state.trainable)
    for path in ends[0]:
        np.testing.assert_allclose(ends[0][path], ends[1][path], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": 33}, {"init": "pissa"}, {"dropout": 1.0}])
def test_bad_configurations(bad):
    with pytest.raises(jp.InputError, match="lora_fa"):
        start(jp.lora_fa(**bad))
