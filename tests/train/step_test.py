"""The pure step: accumulation, metrics, donation, extra arguments, determinism."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.train.step import in_place
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


@pytest.mark.parametrize("found", [1.0, (1.0,), (1.0, 2.0)])
def test_a_loss_of_ones_own_that_gives_no_pair_is_refused(found):
    model, params = tiny.model()
    method, optimizer = jp.lora(2), optax.sgd(0.1)
    model, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1), model)
    step = jp.make_train_step(model, method, optimizer, lambda *_: found)
    with pytest.raises(jp.InputError, match=r"make_train_step: the loss gives a (float|tuple); .* \(loss, aux\)"):
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


def test_what_changes_is_donated_and_nothing_else():
    """The compiled step writes trainable and optimizer leaves where they were; frozen ones are no results of it."""
    state, step = start(jp.lora(2), optax.adam(1e-2))
    compiled = jax.jit(in_place(step), donate_argnums=0).lower(*state.parted, tiny.batch()).compile()
    analysis = compiled.memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    assert held <= analysis.alias_size_in_bytes <= held + 64  # step and key
    assert analysis.output_size_in_bytes < held + 1024  # metrics, and the table of results
    frozen = sum(leaf.nbytes for leaf in state.frozen.values())
    assert analysis.argument_size_in_bytes > held + frozen


@pytest.mark.slow
def test_frozen_leaves_stay_where_they_are():
    """Over steps too, and those of a checkpoint, whose memory is not JAX's own."""
    state, step = start(jp.lora(2), optax.adam(1e-2))
    frozen = {path: jnp.asarray(np.asarray(leaf)) for path, leaf in state.frozen.items()}
    given = state._replace(frozen=frozen)
    places = {path: leaf.unsafe_buffer_pointer() for path, leaf in frozen.items()}
    run, plain = jp.jit_step(step), jax.jit(step)
    expected = jax.tree.map(jnp.copy, state)
    for _ in range(2):
        given, metrics = run(given, tiny.batch())
        expected, wanted = plain(expected, tiny.batch())
        assert metrics["loss"] == wanted["loss"]
    assert {path: leaf.unsafe_buffer_pointer() for path, leaf in given.frozen.items()} == places
    for path, leaf in expected.trainable.items():
        np.testing.assert_array_equal(given.trainable[path], leaf, err_msg=path)


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


# Optimizers of optax, rate and all, as a user would hand them over.
OPTAX = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    "adamw": lambda: optax.adamw(1e-2, mask=lambda leaves: jax.tree.map(lambda x: x.ndim > 2, leaves)),
    "lion": lambda: optax.lion(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "novograd": lambda: optax.novograd(1e-2),
    "sm3": lambda: optax.sm3(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.1),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.sgd(0.0), "b": optax.adam(1e-2)}, lambda leaves: {path: path[-1] for path in leaves}
    ),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.5, 0), optax.adam(1e-2)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_an_optimizer_of_your_own_keeps_its_state(name):
    """A step returns the state that it took, leaf by leaf, and no rate of its own."""
    state, step = start(jp.lora(2), OPTAX[name]())
    new, metrics = jax.eval_shape(step, state, tiny.batch())
    chex.assert_trees_all_equal_shapes_and_dtypes(new, jax.eval_shape(lambda: state))
    assert "lr" not in metrics


@pytest.mark.parametrize("name", ["multi_steps", "multi_transform", "muon"])
def test_an_optimizer_of_your_own_trains_as_it_says(name):
    """Its updates are added as they are: as in a loop by hand."""
    optimizer = OPTAX[name]()
    state, step = start(jp.lora(2), optimizer)
    expected, own, step = state.trainable, optimizer.init(state.trainable), jax.jit(step)
    loss = lambda leaves: jp.completion_loss(tiny_model(), jp.combine(leaves, state.frozen), tiny.batch())[0]
    gradient = jax.jit(jax.grad(loss))
    for _ in range(2):
        state, _ = step(state, tiny.batch())
        updates, own = optimizer.update(gradient(expected), own, expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(state.trainable, expected, rtol=2e-3, atol=1e-5)


def tiny_model():
    return jp.setup(jp.lora(2), *tiny.model(), jax.random.key(0))[0]


def test_the_rate_and_the_decay_are_the_steps():
    """leaf <- leaf - rate (direction + decay leaf), for matrices; the rate is a function of the steps alone."""
    base, params = tiny.model()
    method = jp.chain(jp.lora(2), jp.full("norms"))
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    rate = optax.linear_schedule(0.1, 0.0, 4)
    plain = jp.make_train_step(model, method, optax.identity(), rate=rate)
    decayed = jp.make_train_step(model, method, optax.identity(), rate=rate, weight_decay=0.5)
    state = jp.init_state(method, optax.identity(), trainable, rest, jax.random.key(1))
    for done in range(3):
        (new, metrics), (other, _) = (jax.jit(step)(state, tiny.batch()) for step in (plain, decayed))
        np.testing.assert_allclose(metrics["lr"], rate(done), rtol=1e-6)
        for path, leaf in state.trainable.items():
            shrunk = metrics["lr"] * 0.5 * leaf if "/lora/" in path else 0
            np.testing.assert_allclose(other.trainable[path], new.trainable[path] - shrunk, rtol=1e-5, atol=1e-6)
        state = new
    with pytest.raises(ValueError, match="weight_decay needs a rate"):
        jp.make_train_step(model, method, optax.identity(), weight_decay=0.5)


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


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_adapters_that_no_gradient_reaches_are_refused(adapter):
    """A network beside the frozen layers differentiates nothing of them; without a backward pass all leaves count."""
    from jaxpeft.train.step import objective_of

    base, params = tiny.model()
    chained = lambda *more: jp.chain(*more, getattr(jp, adapter)(2), jp.lst(4))
    model, trainable, rest = jp.setup(chained(), base, params, jax.random.key(0))
    with pytest.raises(jp.InputError, match=rf"{adapter}\+lst: layers/.*would train without effect"):
        objective_of(model, chained(), {**rest, **trainable})
    objective_of(model, jp.lst(4), {**rest, **trainable})
    assert not objective_of(model, chained(jp.mezo()), {**rest, **trainable}).backward
