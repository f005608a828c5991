"""MeZO's variants: each a step of its own equations in numpy, on whole leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import noise, tree
from jaxpeft.backward.flops import count_flops
from jaxpeft.method import View
from jaxpeft.train.step import objective_of
from tests.methods.estimates import BATCH, EPS, RATE, RUN, SGD, start, z_of_step

LAYERS = 2
ALL = np.ones(1 + LAYERS)


def of_kernels(**options):
    """MeZO for the layers' kernels and all norms, in float32."""
    return jp.chain(jp.mezo(eps=EPS, **options), jp.full("^layers/.*/kernel|norm/scale$"))


@pytest.fixture(scope="module")
def weights():
    """(state, loss of theta + amount z with an amount for each block, z of the first step)."""
    model, state = start(of_kernels(), num_hidden_layers=LAYERS)

    @jax.jit
    def loss(amounts, z):
        """Amounts of what lies outside the layers, and of each layer."""
        of = lambda path, leaf: amounts[1:].reshape(-1, *[1] * (leaf.ndim - 1)) if tree.stacked(path) else amounts[0]
        leaves = {path: leaf + of(path, leaf) * z[path] for path, leaf in state.trainable.items()}
        return jp.completion_loss(model, tree.combine(leaves, state.frozen), BATCH)[0]

    z = z_of_step(state.trainable)
    return state, lambda amounts, z=z: float(loss(jnp.float32(amounts), z)), z


def step_of(rate=RATE, **options):
    """A compiled step: (by how much each leaf moved over the rate, metrics)."""
    method = of_kernels(**options)
    step = jax.jit(jp.make_train_step(start(method, num_hidden_layers=LAYERS)[0], method, SGD, rate=rate))

    def call(state):
        after, metrics = step(state, BATCH)
        lr = float(metrics["lr"])
        return {path: (leaf - after.trainable[path]) / lr for path, leaf in state.trainable.items()}, metrics

    return call


def assert_steps(found, expected):
    """Equal but for the rounding of leaves, 6e-8 of 1 over the rate."""
    for path, step in found.items():
        np.testing.assert_allclose(step, expected[path], rtol=2e-3, atol=1e-3, err_msg=path)


def test_one_sided(weights):
    state, loss, z = weights
    found, metrics = step_of(variant="one_sided")(state)
    slope = (loss(EPS * ALL) - loss(0 * ALL)) / EPS
    np.testing.assert_allclose(metrics["slope"], slope, rtol=2e-3, atol=1e-3)
    assert_steps(found, {path: float(metrics["slope"]) * z[path] for path in z})


@pytest.mark.slow
def test_sign(weights):
    state, loss, z = weights
    found, _ = step_of(variant="sign")(state)
    assert_steps(found, {path: np.sign(loss(EPS * ALL) - loss(-EPS * ALL)) * z[path] for path in z})


@pytest.mark.slow
def test_blockwise(weights):
    """Each layer, and what lies outside, has the slope of its own z."""
    state, loss, z = weights
    found, metrics = step_of(variant="blockwise")(state)
    slopes = np.array([(loss(EPS * block) - loss(-EPS * block)) / (2 * EPS) for block in np.eye(1 + LAYERS)])
    assert np.abs(np.diff(slopes)).min() > 0.02
    np.testing.assert_allclose(metrics["slope"], slopes.mean(), rtol=2e-3, atol=1e-3)
    for path, step in found.items():
        own = slopes[1:].reshape(-1, *[1] * (step.ndim - 1)) if tree.stacked(path) else slopes[0]
        np.testing.assert_allclose(np.sum(step * z[path]) / np.sum(own * z[path] ** 2), 1, rtol=0.02, err_msg=path)
        assert np.std(step - own * z[path]) < 2e-3


def test_blocks_of_weights_that_move():
    """In the order of a cut stack; a block without weights that move is not evaluated."""
    seen = {}
    for which in ("last:1", "norms"):
        method = jp.mezo(which, eps=EPS, variant="blockwise")
        model, state = start(method, num_hidden_layers=LAYERS)
        objective = objective_of(model, method, state.leaves)
        (_, aux), _ = jax.eval_shape(objective.value_and_grad, {}, {**state.frozen, **state.moved}, BATCH, RUN, None)
        trace = jax.make_jaxpr(lambda o=objective, s=state: o.value_and_grad({}, s.leaves, BATCH, RUN, None))()
        one = jax.make_jaxpr(lambda m=model, s=state: jp.completion_loss(m, s.params, BATCH)[0])()
        seen[which] = (aux["slopes"].shape, count_flops(trace) / count_flops(one))
    assert seen == {"last:1": ((1, 3), 2), "norms": ((1, 3), 6)}


@pytest.mark.slow
def test_conservative_takes_the_best_of_three(weights):
    """Down the slope where that helps; nowhere when both ways are too far."""
    state, loss, _ = weights
    rates = (RATE, 1e3)
    step = step_of(rate=lambda count: jnp.array(rates)[count], variant="conservative")
    for number, (rate, best) in enumerate(zip(rates, (1.0, 0.0), strict=True)):
        z = z_of_step(state.trainable, number)
        found, metrics = step(state._replace(step=jnp.int32(number)))
        slope = (loss(EPS * ALL, z) - loss(-EPS * ALL, z)) / (2 * EPS)
        tried = {way: loss(-rate * slope * way * ALL, z) for way in (1.0, -1.0, 0.0)}
        assert min(tried, key=tried.get) == best
        np.testing.assert_allclose(metrics["slope"], best * slope, rtol=2e-3, atol=1e-3)
        assert_steps(found, {path: float(metrics["slope"]) * z[path] for path in z})


@pytest.mark.parametrize(("variant", "numbers"), [("momentum", 1), ("adam", 2)])
def test_moments_are_the_optimizers(weights, variant, numbers):
    """The run's direction is that of the estimates themselves; the state is that of what trains, as the file says."""
    state, _, z = weights
    method = of_kernels(variant=variant)
    view = View(None, method.specs, method.role, state.leaves)
    found, own = method.update(SGD, view), {"momentum": optax.trace(0.9), "adam": optax.scale_by_adam()}[variant]
    states = [found.init(state.trainable), own.init(state.trainable)]
    for scale in (1.0, -0.3):
        estimate = {path: jnp.float32(scale * z[path]) for path in z}
        ways, states = zip(*(of.update(estimate, s) for of, s in zip((found, own), states, strict=True)), strict=True)
        chex.assert_trees_all_equal(*ways)
    counters = sum(leaf.ndim == 0 for leaf in jax.tree.leaves(states[0]))
    promised = jp.method.about("mezo").promises.state(view, variant=variant)
    assert tree.size(states[0]) - counters == promised == numbers * tree.size(state.trainable)


@pytest.mark.slow
def test_a_random_part_of_z(weights):
    """A quarter of the elements, the same in evaluations and update; other ones with each draw, whatever z is."""
    state, loss, z = weights
    found, metrics = step_of(sparsity=0.75)(state)
    kept = {path: np.asarray(step != 0) for path, step in found.items()}
    share = np.mean(np.concatenate([np.ravel(part) for part in kept.values()]))
    np.testing.assert_allclose(share, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / tree.size(state.trainable)))
    part = {path: kept[path] * z[path] for path in z}
    slope = (loss(EPS * ALL, part) - loss(-EPS * ALL, part)) / (2 * EPS)
    np.testing.assert_allclose(metrics["slope"], slope, rtol=2e-3, atol=1e-3)
    assert_steps(found, {path: float(metrics["slope"]) * part[path] for path in z})
    index, wide = noise.numbers((256, 256)), jnp.zeros((256, 256))
    draws = [noise.of_leaf(noise.draw(jax.random.key(i)), "a") for i in range(2)]
    masks = [np.asarray(noise.Direction(keys, kept=0.5)(wide, index)) != 0 for keys in draws]
    whole = np.asarray(noise.normal(draws[0], index))
    stats = np.stack([*masks, whole, np.abs(whole)]).reshape(4, -1).astype(np.float64)
    np.testing.assert_allclose(np.corrcoef(stats)[:2], np.eye(4)[:2], atol=0.02)
    np.testing.assert_allclose(stats[:2].mean(1), 0.5, atol=0.01)
