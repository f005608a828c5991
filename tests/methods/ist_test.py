"""IST: the drawn layers alone train and keep their own moments; scores are those of a transcription of the rule."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import sampling, tree
from jaxpeft.methods import ist
from jaxpeft.train.optimizer import make_direction
from tests import tiny

KEY, BATCH, LR, EVERY = jax.random.key(0), tiny.batch(), 1e-2, 3
OPTIONS = {"share": 0.3, "every": EVERY, "trials": 4, "gain": 1e4}  # of 3 layers one trains, two are suppressed


def lora():
    return jp.lora(rank=2, targets="qv")


def start(method, optimizer=None, **options):
    model, trainable, rest = jp.setup(method, *tiny.model(**options), KEY)
    return model, jp.init_state(method, optimizer or make_direction(), trainable, rest, jax.random.key(1), model)


@pytest.fixture(scope="module")
def run():
    """The states before the first step and after each of some; one of ten norms is large enough to be clipped."""
    method, optimizer = jp.chain(lora(), jp.ist(**OPTIONS)), make_direction(clip=1e-2)
    model, state = start(method, optimizer)
    noise = lambda i, leaf: leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)
    moved = {path: noise(i, x) if "/lora/" in path else x for i, (path, x) in enumerate(state.moved.items())}
    masters = {path: sampling.read(path, moved[path[4:]], moved["ist/active"], "ist/") for path in state.trainable}
    state = state._replace(moved=moved, trainable=masters)
    step, states = jax.jit(jp.make_train_step(model, method, optimizer, rate=LR)), [state]
    for i in range(2 * EVERY + 1):
        states.append(step(states[-1], tiny.batch(seed=i))[0])
    return model, method, states


def whole(state):
    """A and B of all layers, with the masters in their places."""
    (active,) = np.asarray(state.moved["ist/active"])
    found = {path: np.array(x) for path, x in state.moved.items() if "/lora/" in path}
    for path in found:
        found[path][active] = state.trainable[f"ist/{path}"][0]
    return found


def test_each_layers_adam_is_one_that_saw_its_steps_alone(run):
    """Every step against Adam of the drawn layer, clipped by the norm of its gradients; the others stay as they are."""
    _, _, states = run
    plain = jp.setup(lora(), *tiny.model(), KEY)[0]
    loss = lambda leaves, frozen, batch: jp.completion_loss(plain, tree.combine(leaves, frozen), batch)[0]
    gradient = jax.jit(jax.grad(loss))
    adam, moments, drawn = make_direction(clip=1e-2), {}, []
    update = jax.jit(adam.update)
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        (active,) = np.asarray(before.moved["ist/active"])
        drawn.append(int(active))
        leaves = whole(before)
        grads = {path: x[active] for path, x in gradient(leaves, before.frozen, tiny.batch(seed=i)).items()}
        own = {path: x[active] for path, x in leaves.items()}
        directions, moments[drawn[-1]] = update(grads, moments.get(drawn[-1]) or adam.init(own))
        now = {path: np.array(after.moved[path]) for path in leaves}
        for path, expected in leaves.items():
            others = [layer for layer in range(3) if layer != active]
            np.testing.assert_array_equal(now[path][others], expected[others])
            # Where a gradient is rounding, Adam's direction has any sign.
            near = np.isclose(now[path][active], own[path] - LR * directions[path], rtol=1e-3, atol=1e-3 * LR)
            assert near.mean() > 0.97, (i, path)
    assert len(set(drawn)) > 1 and len(drawn) > len(set(drawn))
    counts = optax.tree_utils.tree_get(states[-1].opt_state.masters, "count")
    assert list(counts) == [drawn.count(layer) for layer in range(3)]


def test_scores_follow_the_rule(run):
    """Of each trial the loss of a LoRA whose B is beta B in the suppressed layers; none between two updates."""
    _, _, states = run
    plain = jp.setup(lora(), *tiny.model(), KEY)[0]
    loss = jax.jit(lambda leaves, frozen, batch: jp.completion_loss(plain, tree.combine(leaves, frozen), batch)[0])
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        scores = np.asarray(before.moved["ist/scores"])
        if i % EVERY:
            np.testing.assert_array_equal(after.moved["ist/scores"], scores)
            continue
        key = jax.random.fold_in(jax.random.fold_in(before.key, before.step), 0x157)
        masks, leaves = np.asarray(ist.tried(key, scores, 4, 0.5)), whole(before)
        assert masks.shape == (4, 3) and set(masks.sum(axis=1)) == {2}
        rewards = []
        for mask in masks:
            factor = np.where(mask, 0.25, 1.0)[:, None, None]
            other = {path: x * factor if path.endswith("/b") else x for path, x in leaves.items()}
            rewards.append(np.exp(-float(loss(other, before.frozen, tiny.batch(seed=i)))))
        p = 1 / (1 + np.exp(-scores.astype(np.float64)))
        for reward, mask in zip(rewards, masks, strict=True):
            scores = scores + np.where(mask, 1e4 * (reward - np.mean(rewards)) * p * (1 - p), 0)
        np.testing.assert_allclose(after.moved["ist/scores"], scores, rtol=1e-3, atol=1e-3)
    assert np.ptp(states[-1].moved["ist/scores"]) > 0.1


def test_a_layer_that_matters_is_drawn_more_often():
    """Losses that a layer's suppression alone raises: its score falls below all others', and its share grows."""

    @functools.partial(jax.jit, static_argnums=2)
    def learn(scores, key, steps):
        def body(i, scores):
            masks = ist.tried(jax.random.fold_in(key, i), scores, 3, 0.5)
            return ist.updated(scores, masks, 1.0 + masks[:, 2], 10.0)

        return jax.lax.fori_loop(0, steps, body, scores)

    scores = learn(jnp.zeros(6), KEY, 40)
    assert scores[2] == scores.min() and scores[2] < -1
    draw = jax.jit(lambda key: sampling.weighted(key, range(6), 1, jax.nn.sigmoid(-scores)))
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(KEY, 4000)))[:, 0]
    shares = np.bincount(drawn, minlength=6) / 4000
    expected = np.asarray(jax.nn.sigmoid(-scores) / jax.nn.sigmoid(-scores).sum())
    assert shares[2] == shares.max()
    # Five standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: jp.ist(share=0), "share 0 must be above 0 and at most 1"),
        (lambda: jp.ist(suppress=1.5), "suppress 1.5 must be above 0 and at most 1"),
        (lambda: jp.ist(every=0), "every 0 must be at least 1"),
        (lambda: jp.ist(trials=1), "trials 1 must be at least 2"),
        (lambda: jp.ist(beta=1), "beta 1 must be at least 0 and below 1"),
        (lambda: jp.ist(gain=0), "gain 0 must be a finite number above 0"),
        (lambda: jp.ist(), "nothing in the layers trains; put ist behind"),
        (lambda: jp.chain(jp.full(), jp.ist()), "trains and is no adapter's; as lora.ist"),
        (lambda: jp.chain(jp.loreft(rank=2), jp.ist()), "what loreft adds is at no linear map"),
    ],
)
def test_mistakes(method, message):
    with pytest.raises(jp.InputError, match=f"ist: .*{message}"):
        start(method())


def test_behind_what_replaces_the_gradient():
    """In front of MeZO the bandit would not be asked; behind it trials are MeZO's forward passes, too."""
    for members, refused in (((jp.mezo(), jp.ist(**OPTIONS)), False), ((jp.ist(**OPTIONS), jp.mezo()), True)):
        model, state = start(method := jp.chain(lora(), *members))
        step = jp.make_train_step(model, method, make_direction(), rate=LR)
        if not refused:
            jax.eval_shape(step, state, BATCH)
            continue
        with pytest.raises(jp.InputError, match="ist: stands in front of what replaces the gradient; put ist last"):
            jax.eval_shape(step, state, BATCH)
