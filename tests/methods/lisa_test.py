"""LISA: the layers that are drawn train, nothing else does, and a memory plan computes the same."""

import importlib.util
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import host, tree
from jaxpeft.backward.residuals import remat
from jaxpeft.memory import planner, targets
from jaxpeft.method import view_of
from jaxpeft.methods import lisa
from jaxpeft.models import geometries
from jaxpeft.train.optimizer import make_direction
from tests import tiny

KEY, BATCH, EVERY, LR = jax.random.key(0), tiny.batch(), 3, 1e-2
Q = "layers/self_attn/q_proj/kernel"


def start(method, optimizer=None, **options):
    model, trainable, rest = jp.setup(method, *tiny.model(**options), KEY)
    return model, jp.init_state(method, optimizer or make_direction(), trainable, rest, jax.random.key(1), model)


@pytest.fixture(scope="module")
def run():
    """The states before the first step and after each of twice the period, of which the second draws others."""
    method = jp.lisa(count=1, every=EVERY)
    model, state = start(method)
    step, states = jax.jit(jp.make_train_step(model, method, make_direction(), rate=LR)), [state]
    for i in range(2 * EVERY):
        states.append(step(states[-1], tiny.batch(seed=i))[0])
    return model, method, states


def test_only_the_layers_that_are_drawn_move(run):
    """And embeddings and final norm in every step."""
    _, _, states = run
    for before, after in itertools.pairwise(states):
        (active,) = np.asarray(before.moved["lisa/active"])
        for path, stack in before.moved.items():
            if path.startswith("layers/"):
                moves = np.any(np.asarray(after.moved[path] != stack).reshape(3, -1), axis=1)
                assert list(moves) == [layer == active for layer in range(3)], path
        for path in ("embed_tokens/embedding", "norm/scale"):
            assert np.any(after.trainable[path] != before.trainable[path])


def test_draws_anew_after_each_period(run):
    """Masters and stack then hold the new layers, and at no other time do the numbers change."""
    _, _, states = run
    drawn = [int(state.moved["lisa/active"][0]) for state in states]
    assert all(len(set(drawn[i : i + EVERY])) == 1 for i in (0, EVERY)) and len(set(drawn)) > 1
    for state in states:
        np.testing.assert_array_equal(state.trainable[f"lisa/{Q}"], state.moved[Q][state.moved["lisa/active"]])


def test_moments_and_their_count_start_anew_and_all_others_go_on(run):
    """After a draw a master's state is what the optimizer starts with; the embeddings' has every step in it."""
    _, _, states = run
    for done, state in enumerate(states):
        own = optax.tree_utils.tree_get(state.opt_state.masters, "mu")[f"lisa/{Q}"]
        assert bool(np.any(own)) == (done % EVERY != 0)
        assert int(optax.tree_utils.tree_get(state.opt_state.masters, "count")) == done % EVERY
        assert int(optax.tree_utils.tree_get(state.opt_state.others, "count")) == done


def test_its_step_is_that_of_full_fine_tuning_on_the_same_layer(run):
    """Gradients, the global norm that clips them, and Adam: full fine-tuning whose other layers are put back."""
    _, method, states = run
    full = jp.full()
    plain, trainable, rest = jp.setup(full, *tiny.model(), KEY)
    (active,) = np.asarray(states[0].moved["lisa/active"])

    def mask(grads):
        only = lambda g: jnp.where((jnp.arange(3) == active).reshape(-1, *[1] * (g.ndim - 1)), g, 0)
        return {path: only(g) if tree.stacked(path) else g for path, g in grads.items()}

    masked = optax.chain(optax.stateless(lambda grads, _: mask(grads)), make_direction())
    state = jp.init_state(full, masked, trainable, rest, jax.random.key(1), plain)
    step = jax.jit(jp.make_train_step(plain, full, masked, rate=LR))
    for i in range(EVERY - 1):
        state, _ = step(state, tiny.batch(seed=i))
    merged = tree.flatten(method.merge(states[EVERY - 1].params))
    for path, leaf in state.trainable.items():
        # Where a gradient is rounding, Adam's direction has any sign.
        near = np.isclose(merged[path], leaf, rtol=1e-3, atol=1e-3)
        assert near.mean() > 0.998, path


@pytest.mark.slow
def test_two_rows_two_layers_and_groups_of_16_tokens():
    """What is shared by all rows is divided by none, though its leading axis is as long as the batch."""
    method, batch = jp.lisa(count=2), tiny.batch(rows=2)
    model, state = start(method)
    noise = lambda i, leaf: leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)
    leaves = {path: noise(i, leaf) for i, (path, leaf) in enumerate(state.trainable.items())}

    def loss(model, trainable):
        return jp.completion_loss(model, tree.combine(trainable, {**state.frozen, **state.moved}), batch)[0]

    planned = remat(model, "matmuls,tokens=16")
    plain, grouped = (jax.jit(jax.value_and_grad(lambda t, m=m: loss(m, t)))(leaves) for m in (model, planned))
    np.testing.assert_allclose(grouped[0], plain[0], rtol=1e-6)
    chex.assert_trees_all_close(grouped[1], plain[1], rtol=1e-4, atol=1e-6)
    other = {path: leaf if path.startswith("lisa/") else state.trainable[path] for path, leaf in leaves.items()}
    assert abs(loss(model, other) - loss(model, state.trainable)) > 1e-3  # the masters are what is computed with


@pytest.mark.slow
def test_samples_the_layers_of_loras_leaves():
    """The kernels stay frozen; A and B of one layer train, in masters; merging writes them back and folds them."""
    method = jp.chain(jp.lora(rank=2), jp.lisa(count=1, every=2))
    model, state = start(method)
    assert all(path.startswith("lisa/layers/") and "/lora/" in path for path in state.trainable)
    assert Q in state.frozen and state.moved["layers/self_attn/q_proj/lora/a"].shape == (3, 32, 2)
    step = jax.jit(jp.make_train_step(model, method, make_direction(), rate=LR))
    for _ in range(3):
        state, _ = step(state, BATCH)
    base, _ = tiny.model()
    merged = base.apply(method.merge(state.params), BATCH)
    np.testing.assert_allclose(merged, model.apply(state.params, BATCH), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_kept_moments_go_on_where_a_layer_is_drawn_again():
    """Each layer's optimizer has made as many steps as the layer; the norm that clips is that of all gradients.

    So they do in the host's memory, where a layer's are the same as soon as another one is drawn in its place.
    """
    method = jp.chain(jp.lora(rank=2, targets="qv"), jp.lisa(count=2, every=1, moments="kept"))
    model, state = start(method)
    step, drawn = jax.jit(jp.make_train_step(model, method, make_direction(), rate=LR)), []
    for i in range(4):
        drawn += list(np.asarray(state.moved["lisa/active"]))
        before = state.opt_state
        state, _ = step(state, tiny.batch(seed=i))
        (still,) = {0, 1, 2} - set(drawn[-2:])
        for old, new in zip(jax.tree.leaves(before.masters), jax.tree.leaves(state.opt_state.masters), strict=True):
            np.testing.assert_array_equal(new[still], old[still])
    count = optax.tree_utils.tree_get(state.opt_state.masters, "count")
    assert list(count) == [drawn.count(layer) for layer in range(3)] and len(set(drawn[::2])) > 1
    view = view_of(model, method, state.leaves)
    counters = sum(x.ndim == 0 and x.dtype == np.int32 for x in jax.tree.leaves(state.opt_state))
    assert tree.size(state.opt_state) - counters == lisa.state_numbers(view, moments="kept")

    method = jp.chain(jp.lora(rank=2, targets="qv"), jp.lisa(count=2, every=1, moments="host"))
    model, own = start(method)
    step = jax.jit(jp.make_train_step(model, method, make_direction(), rate=LR))
    for i in range(4):
        own, _ = step(own, tiny.batch(seed=i))
    held = own.opt_state.masters
    whole = held.turned((held.at + 1) % 3)  # what was drawn last is put back, but for the layer that stays
    for x, rows, old in zip(*map(jax.tree.leaves, (whole.kept, held.rows, state.opt_state.masters)), strict=True):
        assert host.holds(x) == (x.ndim >= 3)
        found = np.array(jax.device_get(x))
        np.testing.assert_allclose(found, jax.device_get(old), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(rows, found[np.asarray(held.at)], rtol=0)
    for path, leaf in state.trainable.items():
        np.testing.assert_allclose(own.trainable[path], leaf, rtol=1e-5, atol=1e-7, err_msg=path)
    assert tree.size(own.opt_state) - counters - 2 == lisa.state_numbers(view, moments="host") - 2


def test_merge_writes_bf16_rounded_once_into_layers_of_a_cut_stack():
    active, small = jnp.array([3, 0]), 1 + jnp.arange(2.0)[:, None] * 2**-9
    params = {
        "layers_0_2": {"w": jnp.zeros((2, 1), jnp.bfloat16)},
        "layers_2_4": {"w": jnp.zeros((2, 1), jnp.bfloat16)},
        "lisa": {"active": active, "layers_0_2": {"w": small}, "layers_2_4": {"w": 3 * small}},
    }
    merged = jp.lisa().merge(params)
    chex.assert_trees_all_equal(
        merged,
        {
            "layers_0_2": {"w": small.astype(jnp.bfloat16)[1:] * jnp.array([[1], [0]], jnp.bfloat16)},
            "layers_2_4": {"w": jnp.array([[0], [3]], jnp.bfloat16)},
        },
    )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: jp.lisa(count=0), "count 0 must be at least 1"),
        (lambda: jp.lisa(every=0), "every 0 must be at least 1"),
        (lambda: jp.lisa(moments="disk"), "moments 'disk' is not one of dropped, kept, host"),
        (lambda: jp.lisa(which="("), "not a regular expression"),
        (lambda: jp.lisa(count=4), "count 4 must be at most 3, the layers that train"),
        (lambda: jp.lisa(which="embeddings"), "trains of which='embeddings'; name layers' own leaves with which"),
        (lambda: jp.chain(jp.lisa(), jp.lora()), "put lisa behind"),
    ],
)
def test_mistakes(method, message):
    with pytest.raises(jp.InputError, match=f"lisa: .*{message}" if "(" not in message else message):
        start(method())


@pytest.mark.slow
def test_what_an_h200_needs():
    """llama3.2-1b, 4 x 1024, `matmuls`: 11.4 GiB; full fine-tuning needs 22.4, LISA on whole leaves 22.6."""
    if not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    step = planner.make_step(geometries.load("llama3.2-1b"), jp.lisa(), 4, 1024, "matmuls")
    assert planner.row(step, targets.target("h200"))["bytes"]["total"] <= 11.5 * 2**30
