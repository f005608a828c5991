"""What an NNX module has beside its parameters: RNG streams, batch statistics, caches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpeft as jp
from tests.modules import X, mean_square
from tests.nnx_modules import Normed, Scanned, adapt, evaluated


def test_keys_seed_dropout_and_none_is_evaluation():
    """Of the module's streams and of the adapters; the module that was given does not change."""
    module = Normed(nnx.Rngs(0))
    before = jax.tree.map(lambda x: x, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    for method in (jp.full(), jp.lora(2, dropout=0.5, targets=["hidden"])):
        model, changed, frozen, _ = adapt(method, module)
        run = lambda key: model.apply(jp.combine(changed, frozen), {"x": X}, key)  # noqa: B023
        np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
        assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 1e-2
        np.testing.assert_array_equal(run(None), run(None))
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_adapters_of_a_stack_drop_each_their_own():
    """The adapter's dropout alone is on: with a key the result is another one, and gradients are finite."""
    module = Scanned(nnx.Rngs(0))
    module.eval()
    model, changed, frozen, _ = adapt(jp.lora(2, dropout=0.5, targets=["split", "join"]), module)
    run = jax.jit(lambda leaves, key: model.apply(jp.combine(leaves, frozen), {"x": X}, key))
    assert np.abs(run(changed, jax.random.key(1)) - run(changed, jax.random.key(2))).max() > 1e-3
    grads = jax.grad(lambda leaves: jnp.sum(run(leaves, jax.random.key(1)) ** 2))(changed)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in grads.values())


def test_state_is_carried_from_step_to_step():
    """As three calls of the module in training mode have it; without `carry` it stays, and is read."""
    module = Normed(nnx.Rngs(0))
    base, params = jp.from_nnx(module)
    for _ in range(3):
        module(X)
    optimizer = optax.sgd(0.0)
    found = {}
    for name, method in {"carried": jp.chain(jp.lora(2), jp.carry(base)), "read": jp.lora(2)}.items():
        model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
        state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
        step = jax.jit(jp.make_train_step(model, method, optimizer, mean_square))
        for _ in range(3):
            state, _ = step(state, {"x": X})
        found[name] = jp.to_nnx(model, state.params), state
    back, state = found["carried"]
    assert set(state.moved) == {"norm/mean", "norm/var", "calls"} and not found["read"][1].moved
    np.testing.assert_allclose(back.norm.mean[...], module.norm.mean[...], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back.norm.var[...], module.norm.var[...], rtol=1e-5, atol=1e-6)
    assert int(back.calls[...]) == 3 and back.calls[...].dtype == jnp.int32
    assert not np.any(found["read"][0].norm.mean[...])
    np.testing.assert_allclose(model.apply(state.params, {"x": X}), evaluated(back), rtol=1e-5, atol=1e-5)


def test_carried_state_with_accumulation_is_the_mean():
    base, params = jp.from_nnx(Normed(nnx.Rngs(0)))
    method, optimizer = jp.chain(jp.lora(2), jp.carry(base)), optax.sgd(0.0)
    batch = {"x": jnp.concatenate([X, X + 1])[jnp.array([0, 3, 1, 4, 2, 5])]}  # parts: every second row
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    state, _ = jax.jit(jp.make_train_step(model, method, optimizer, mean_square, accumulate=2))(state, batch)
    means = []
    for x in (X, X + 1):
        module = Normed(nnx.Rngs(0))
        module(x)
        means.append(module.norm.mean[...])
    np.testing.assert_allclose(state.moved["norm/mean"], (means[0] + means[1]) / 2, rtol=1e-5, atol=1e-6)
    assert int(state.moved["calls"]) == 1


def test_carry_must_be_last():
    base, params = jp.from_nnx(Normed(nnx.Rngs(0)))
    method, optimizer = jp.chain(jp.carry(base), jp.full()), optax.sgd(0.1)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    with pytest.raises(jp.InputError, match="carry: .* is trained by another method; chain carry last"):
        jp.make_train_step(model, method, optimizer, mean_square)(state, {"x": X})
