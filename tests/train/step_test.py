"""The pure step: accumulation, metrics, donation, extra arguments, determinism."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from tests import tiny


def start(method, optimizer, accumulate=1, **changes):
    base, params = tiny.model(**changes)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    return state, jp.make_train_step(model, method, optimizer, accumulate=accumulate)


def test_accumulation_equals_the_whole_batch():
    """Also where micro-batches have different numbers of tokens that count."""
    batch = tiny.batch(rows=8)
    batch["loss_weights"][:3] = 0
    batch["loss_weights"][1, 2] = 1
    ends = {}
    for parts in (1, 2, 4):
        state, step = start(jp.lora(2), optax.sgd(0.1), parts)
        state, metrics = jax.jit(step)(state, batch)
        ends[parts] = (state.trainable, metrics)
    for parts in (2, 4):
        for name in ("loss", "grad_norm", "weight"):
            np.testing.assert_allclose(ends[parts][1][name], ends[1][1][name], rtol=1e-5)
        for path, leaf in ends[1][0].items():
            np.testing.assert_allclose(ends[parts][0][path], leaf, rtol=1e-4, atol=1e-7)


def test_accumulation_must_divide_the_batch():
    state, step = start(jp.lora(2), optax.sgd(0.1), 3)
    with pytest.raises(ValueError, match="a batch of 4 rows is not divided by accumulate=3"):
        step(state, tiny.batch())


def test_same_state_and_batch_give_the_same_bits():
    """With dropout too: its key is the run's, folded with the step."""
    state, step = start(jp.lora(2, dropout=0.3), optax.adam(1e-2))
    state = state._replace(trainable={path: leaf + 0.05 for path, leaf in state.trainable.items()})
    step = jax.jit(step)
    (one, m1), (two, m2) = step(state, tiny.batch()), step(state, tiny.batch())
    assert all(np.array_equal(one.trainable[path], two.trainable[path]) for path in one.trainable)
    later, m3 = step(one._replace(trainable=state.trainable, opt_state=state.opt_state), tiny.batch())
    assert m1["loss"] == m2["loss"] != m3["loss"]
    assert (int(state.step), int(one.step), int(later.step)) == (0, 1, 2)


def test_state_is_donated():
    """The compiled step reuses the buffers of every trainable, frozen and optimizer leaf."""
    state, step = start(jp.lora(2), optax.adam(1e-2))
    compiled = jax.jit(step, donate_argnums=0).lower(state, tiny.batch()).compile()
    analysis = compiled.memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.trainable, state.frozen, state.opt_state)))
    assert analysis.alias_size_in_bytes >= held


@pytest.mark.parametrize("method", [jp.full(), jp.lora(2, init="pissa"), jp.lora_fa(2)])
def test_a_fresh_state_may_be_donated(method):
    """No buffer is in it twice, also where a method keeps a copy of what it trains."""
    base, params = tiny.model.__wrapped__()  # not the one that other tests share: its buffers are given away
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    optimizer = optax.adam(1e-2)
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    step = jax.jit(jp.make_train_step(model, method, optimizer), donate_argnums=0)
    for _ in range(2):
        state, metrics = step(state, tiny.batch())
    assert np.isfinite(metrics["loss"])


def test_update_is_handed_aux():
    """An optimizer with extra arguments sees what the loss and the gradient slot reported."""
    seen = []

    def update(grads, state, params=None, *, aux, **extra):
        seen.append(set(aux))
        return jax.tree.map(jnp.zeros_like, grads), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state, step = start(jp.lora(2), optimizer)
    step(state, tiny.batch())
    assert seen == [{"weight"}]


def test_packed_rows_have_the_loss_of_their_documents():
    """Two documents in one row, and the same two in rows of their own: the same loss (1e-5) and gradients."""
    apart = tiny.batch(rows=2, length=8)
    packed = {name: x.reshape(1, 16) for name, x in apart.items()}
    packed["segment_ids"] = np.repeat([1, 2], 8)[None].astype(np.int32)
    results = []
    for batch in (apart, packed):
        state, step = start(jp.lora(2), optax.sgd(0.1), sliding_window=5, model_type="mistral")
        state, metrics = jax.jit(step)(state, batch)
        results.append((float(metrics["loss"]), state.trainable))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for path, leaf in results[0][1].items():
        np.testing.assert_allclose(results[1][1][path], leaf, rtol=1e-4, atol=1e-6)
