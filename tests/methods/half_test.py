"""HFT: of each layer's matrices half trains, by full fine-tuning's step, and the other half does not move."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import sampling, tree
from jaxpeft.memory import planner, targets
from jaxpeft.methods import half
from jaxpeft.models import geometries
from jaxpeft.train.optimizer import make_direction
from tests import tiny

KEY, LR, EVERY = jax.random.key(0), 1e-2, 3
ATTENTION = [f"self_attn/{name}_proj" for name in "koqv"]
FEED_FORWARD = [f"mlp/{name}_proj" for name in ("down", "gate", "up")]


def start(method, optimizer=None, **options):
    model, trainable, rest = jp.setup(method, *tiny.model(**options), KEY)
    return model, jp.init_state(method, optimizer or make_direction(), trainable, rest, jax.random.key(1), model)


@pytest.mark.parametrize(
    ("count", "layers"), [(4, range(6)), (3, range(2, 8)), (4, range(5)), (3, range(7)), (1, range(4))]
)
def test_every_layer_trains_half_of_its_matrices(count, layers):
    """And every matrix in half of the layers; of three, one in one half of the layers and two in the other."""
    draw = jax.jit(lambda key: half.halves(key, count, layers))
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(KEY, 200)))
    trains = (drawn[..., None] == np.asarray(layers)).any(axis=2)  # (draws, matrices, layers)
    assert drawn.shape == (200, count, (len(layers) + 1) // 2)
    assert set(np.unique(drawn)) <= {*layers, sampling.NO_LAYER}
    of_layer = trains.sum(axis=1)
    assert set(np.unique(of_layer)) == {count // 2, (count + 1) // 2}
    if len(layers) % 2 == 0:
        assert np.all(trains.sum(axis=2) == len(layers) // 2)
        assert np.all((of_layer == count // 2).sum(axis=1) >= len(layers) // 2)
    # Each is as likely as any other: five standard deviations of 200 draws.
    np.testing.assert_allclose(trains.mean(axis=0), 0.5, atol=5 * 0.5 / np.sqrt(200))


@pytest.fixture(scope="module")
def run():
    """The states before the first step and after each of more than a round."""
    method = jp.half(every=EVERY)
    model, state = start(method)
    step, states = jax.jit(jp.make_train_step(model, method, make_direction(), rate=LR)), [state]
    for i in range(EVERY + 1):
        states.append(step(states[-1], tiny.batch(seed=i))[0])
    return method, states


def trained(state):
    """{path of a kernel: (3,) whether it trains in a layer}."""
    at = {path[12:]: numbers for path, numbers in state.moved.items() if path.startswith("half/active/")}
    return {
        f"{site}/kernel": (np.asarray(numbers)[:, None] == np.arange(3)).any(axis=0) for site, numbers in at.items()
    }


def test_the_chosen_halves_move_and_nothing_else(run):
    """Norms, embeddings and final norm in every step; other halves after a round, whose moments start anew."""
    method, states = run
    for before, after in itertools.pairwise(states):
        old, new = (tree.flatten(method.merge(state.params)) for state in (before, after))
        chosen = trained(before)
        assert set(chosen) == {f"layers/{site}/kernel" for site in (*ATTENTION, *FEED_FORWARD)}
        for path, leaf in old.items():
            moves = np.any(np.asarray(new[path] != leaf).reshape(len(leaf), -1), axis=1)
            if path in chosen:
                assert list(moves) == list(chosen[path]), path
            else:
                assert moves.any()
        for sites in (ATTENTION, FEED_FORWARD):
            of_layer = sum(chosen[f"layers/{site}/kernel"].astype(int) for site in sites)
            assert set(of_layer) <= {len(sites) // 2, (len(sites) + 1) // 2}
    assert any(np.any(trained(states[0])[path] != trained(states[EVERY])[path]) for path in trained(states[0]))
    for done, state in enumerate(states):
        count = optax.tree_utils.tree_get(state.opt_state.masters, "count")
        assert int(count) == done % EVERY


def test_its_step_is_that_of_full_fine_tuning_on_the_same_halves(run):
    """Gradients, the norm that clips them, and Adam: full fine-tuning with the other halves' gradients zero."""
    method, states = run
    full, chosen = jp.full(), trained(states[0])
    plain, trainable, rest = jp.setup(full, *tiny.model(), KEY)

    def mask(grads):
        only = lambda path, g: jnp.where(chosen[path][:, None, None], g, 0) if path in chosen else g
        return {path: only(path, g) for path, g in grads.items()}

    masked = optax.chain(optax.stateless(lambda grads, _: mask(grads)), make_direction())
    state = jp.init_state(full, masked, trainable, rest, jax.random.key(1), plain)
    step = jax.jit(jp.make_train_step(plain, full, masked, rate=LR))
    for i in range(EVERY - 1):
        state, _ = step(state, tiny.batch(seed=i))
    merged = tree.flatten(method.merge(states[EVERY - 1].params))
    for path, leaf in state.trainable.items():
        # Where a gradient is rounding, Adam's direction has any sign.
        assert np.isclose(merged[path], leaf, rtol=1e-3, atol=1e-3).mean() > 0.998, path


def test_one_round_keeps_its_halves_and_one_optimizer():
    method = jp.half()
    model, state = start(method)
    shapes = jax.eval_shape(jp.make_train_step(model, method, make_direction(), rate=LR), state, tiny.batch())[0]
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert set(optax.tree_utils.tree_get(state.opt_state, "mu")) == set(state.trainable)
    assert state.trainable["half/layers/mlp/up_proj/kernel"].shape == (2, 32, 56)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: jp.half(every=-1), "every -1 must be at least 0"),
        (lambda: jp.half(which="("), "which.*not a regular expression"),
        (lambda: jp.half(which="norm"), "nothing in the layers trains that is a kernel"),
        (lambda: jp.chain(jp.lora(2), jp.half()), "nothing in the layers trains that is a kernel; leave half out"),
        (lambda: jp.chain(jp.quantize(), jp.full(), jp.half()), "is quantized and cannot train"),
    ],
)
def test_mistakes(method, message):
    with pytest.raises(jp.InputError, match=f"half: .*{message}"):
        start(method())


@pytest.mark.slow
def test_what_an_h200_needs():
    """llama3.2-1b, 4 x 1024, `matmuls`: full fine-tuning needs 22.4 GiB.

    Of masters, moments and gradients, 16 bytes a number, half of the layers' matrices is 7.25 GiB; the stacks beside
    them are 1.8 in bfloat16.
    """
    if not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    step = planner.make_step(geometries.load("llama3.2-1b"), jp.half(), 4, 1024, "matmuls")
    total = planner.row(step, targets.target("h200"))["bytes"]["total"]
    assert total <= (22.4 - 7.25 + 1.8 + 0.1) * 2**30
