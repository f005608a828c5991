"""SPEFT: each metric against gradients of full fine-tuning, packed kernels, the state's bytes, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import speft
from jaxpeft.quant import is_packed
from tests import tiny

KEY, SITE = jax.random.key(0), "layers/mlp/up_proj"
BATCHES = [tiny.batch(rows=2, seed=seed) for seed in (1, 2)]


def start(metric, params=None, **options):
    base, own = tiny.model()
    method = jp.speft(0.03, metric, ["up_proj"], **options)
    return method, *jp.setup(method, base, params or own, KEY, batches=lambda: iter(BATCHES))


@functools.cache
def gradient_of():
    base, params = tiny.model()
    flat = tree.flatten(params)
    of = lambda kernel, batch: jp.completion_loss(base, tree.unflatten({**flat, f"{SITE}/kernel": kernel}), batch)[0]
    gradient = jax.jit(jax.grad(of))
    return lambda batch: np.asarray(gradient(flat[f"{SITE}/kernel"], batch), np.float64)


@functools.cache
def expected(metric):
    """(L, n m) salience by NumPy, of autodiff's gradients of the kernel."""
    w = np.asarray(tree.flatten(tiny.model()[1])[f"{SITE}/kernel"], np.float64)
    g = sum(map(gradient_of(), BATCHES)) / 2
    rows = [{name: x[i : i + 1] for name, x in batch.items()} for batch in BATCHES for i in range(2)]
    found = {
        "gradient": lambda: abs(g),
        "saliency": lambda: abs(w * g),
        "skeletonization": lambda: -w * g,
        "taylor": lambda: (w * g) ** 2,
        "fisher": lambda: sum(gradient_of()(row) ** 2 for row in rows) / 4,
        "magnitude": lambda: abs(w),
    }[metric]()
    return found.reshape(len(w), -1)


@pytest.mark.parametrize("metric", [*speft.OF_GRADIENTS, "magnitude"])
def test_the_most_salient_entries_train(metric):
    """All that are taken lie above all that are not, within the rounding of two ways to the same gradient."""
    _, _, _, rest = start(metric)
    index = np.asarray(rest[f"{SITE}/speft/index"])
    assert index.shape == (3, int(0.03 * 32 * 56)) and index.dtype == np.int32 and (np.diff(index) > 0).all()
    for own, salience in zip(index, expected(metric), strict=True):
        others = np.delete(salience, own)
        assert salience[own].min() >= others.max() - 1e-4 * abs(salience).max()
    assert (index[0] != index[1]).any()


def test_the_gradient_is_the_kernels_at_the_entries():
    _, model, trainable, rest = start("gradient")
    loss = lambda trainable: jp.completion_loss(model, jp.combine(trainable, rest), BATCHES[0])[0]
    found = jax.jit(jax.grad(loss))(trainable)[f"{SITE}/speft/values"]
    whole = gradient_of()(BATCHES[0]).reshape(3, -1)
    at = np.take_along_axis(whole, np.asarray(rest[f"{SITE}/speft/index"]), axis=1)
    np.testing.assert_allclose(found, at, rtol=1e-4, atol=1e-5 * np.abs(at).max())


def test_the_state_is_16_bytes_of_an_entry():
    method, model, trainable, rest = start("random")
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    own = {path: leaf for path, leaf in state.frozen.items() if "/speft/" in path}
    counter = 4
    assert tree.num_bytes((state.trainable, own, state.opt_state)) == 3 * int(0.03 * 32 * 56) * 16 + counter


def test_packed_kernels_are_scored_and_stay_packed():
    base, params = tiny.model(hidden_size=64, intermediate_size=128)
    method = jp.chain(jp.quantize("int8"), jp.speft(0.01, "saliency", ["up_proj"]))
    _, _, rest = jp.setup(method, base, params, KEY, batches=lambda: iter(BATCHES))
    assert is_packed(rest[f"{SITE}/kernel"])
    plain = jp.speft(0.01, "saliency", ["up_proj"])
    _, _, dense = jp.setup(plain, base, params, KEY, batches=lambda: iter(BATCHES))
    ours, theirs = (np.asarray(leaves[f"{SITE}/speft/index"]) for leaves in (rest, dense))
    same = [len(set(a) & set(b)) / len(a) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    assert min(same) > 0.5  # int8 changes the weights by less than a hundredth, and few of the choices


def test_entries_that_are_there_stay():
    """As of an adapter's file; without batches, where a run is planned, shapes are those of a choice."""
    base, params = tiny.model()
    own = jnp.arange(3 * 53, dtype=jnp.int32).reshape(3, 53)
    adapted = tree.unflatten({**tree.flatten(params), f"{SITE}/speft/index": own})
    np.testing.assert_array_equal(start("gradient", adapted)[3][f"{SITE}/speft/index"], own)
    method = jp.speft(0.03, targets=["up_proj"])
    planned = jax.eval_shape(lambda p: jp.setup(method, base, p, KEY, batches=lambda: ())[2], params)
    assert planned[f"{SITE}/speft/index"].shape == own.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "speft: density 0.0 must be above 0 and at most 0.5"),
        ({"metric": "synflow"}, "speft: metric 'synflow' is not one of gradient, saliency"),
        ({}, "speft: metric 'gradient' starts from data: setup(..., batches=...)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=re.escape(message)):
        jp.setup(jp.speft(**options), *tiny.model(), KEY)
