"""Models from outside the library: Linen and NNX modules under the same contract."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft import recipe, tree
from tests import tiny


class Classifier(nn.Module):
    """A user's own module."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(16, name="hidden")(x))
        return nn.Dense(3, use_bias=False, name="output")(x)


class Perceptron(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.output = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x)))


X = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
LABELS = (X[:, :3].argmax(-1)).astype(np.int32)


def loss(model, params, batch, key):
    logits = model.apply(params, {"x": batch["x"]}, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {"weight": jnp.ones(())}


def train(method, model, params):
    adapted, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    optimizer = optax.adam(3e-2)
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    step = jax.jit(jp.make_train_step(adapted, method, optimizer, loss))
    losses = []
    for _ in range(20):
        state, metrics = step(state, {"x": X, "y": LABELS})
        losses.append(float(metrics["loss"]))
    return adapted, state, losses


METHODS = [jp.full(), jp.lora(2), jp.lora_fa(2, targets=["hidden"])]


@pytest.mark.parametrize("method", METHODS)
def test_linen_module(method):
    """Adapters attach to `nn.Dense` by path, with and without a bias, and merge into its kernel."""
    module = Classifier()
    model = jp.from_linen(module, {"x": X})
    params = model.init(jax.random.key(3), {})
    adapted, state, losses = train(method, model, params)
    assert losses[-1] < losses[0] - 0.05
    merged = method.merge(state.params)
    np.testing.assert_allclose(module.apply({"params": merged}, X), adapted.apply(state.params, {"x": X}), atol=1e-4)


def test_nnx_module():
    module = Perceptron(nnx.Rngs(0))
    model, params = jp.from_nnx(module)
    np.testing.assert_allclose(model.apply(params, {"x": X}), module(X), atol=1e-6)
    method = jp.full("output")
    _, state, losses = train(method, model, params)
    assert losses[-1] < 0.9 * losses[0]
    assert set(state.trainable) == {"output/kernel", "output/bias"}
    assert tree.size(state.frozen) == 8 * 16 + 16


class Deep(nn.Module):
    """A module whose layers are not stacked, though the subtree is called as ours is."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="layers")(x)


def test_a_subtree_called_layers_need_not_be_stacked():
    model = jp.from_linen(Deep(), {"x": X})
    _, trainable, _ = jp.setup(
        jp.lora(2, targets=["layers"]), model, model.init(jax.random.key(0), {}), jax.random.key(1)
    )
    assert {path: leaf.shape for path, leaf in trainable.items()} == {"layers/lora/a": (8, 2), "layers/lora/b": (2, 3)}


def test_two_adapters_at_one_site_compose():
    """Both act, the bias is added once, and merging folds both; the same one twice is refused."""
    module = Classifier()
    model = jp.from_linen(module, {"x": X})
    params = model.init(jax.random.key(3), {})
    both = jp.chain(jp.lora(2, targets=["hidden"]), jp.lora_fa(2, targets=["hidden"]))
    adapted, trainable, frozen = jp.setup(both, model, params, jax.random.key(0))
    keys = dict(zip(trainable, jax.random.split(jax.random.key(1), len(trainable)), strict=True))
    moved = {path: leaf + jax.random.normal(keys[path], leaf.shape) for path, leaf in trainable.items()}
    found = adapted.apply(jp.combine(moved, frozen), {"x": X})
    merged = both.merge(jp.combine(moved, frozen))
    np.testing.assert_allclose(module.apply({"params": merged}, X), found, rtol=1e-4, atol=1e-4)
    for name in ("lora", "lora_fa"):
        without = {path: leaf if f"/{name}/" not in path else trainable[path] for path, leaf in moved.items()}
        assert np.abs(adapted.apply(jp.combine(without, frozen), {"x": X}) - found).max() > 1e-2
    with pytest.raises(jp.InputError, match="lora stands twice"):
        jp.chain(jp.lora(2, targets=["hidden"]), jp.lora(2, targets=["hidden"]))


@pytest.mark.parametrize(
    ("chained", "advised"),
    [
        ("ba_lora", "lora+ba_lora"),
        ("quantize", "quantize+lora"),
        ("quantize+ba_lora", "quantize+lora+ba_lora"),
    ],
)
def test_what_trains_nothing_is_told_its_own_chain(chained, advised):
    """In the order in which its file, and so the README, has it; that one is taken."""
    base, params = tiny.model()
    with pytest.raises(jp.InputError, match=f"chain what trains to it, as {re.escape(advised)};"):
        jp.setup(recipe.parse(chained), base, params, jax.random.key(0))
    method = recipe.parse(advised, rank=2)
    jax.eval_shape(lambda params: jp.setup(method, base, params, jax.random.key(0))[1:], params)


def test_nothing_to_train_is_refused():
    model = jp.from_linen(Classifier(), {"x": X})
    params = model.init(jax.random.key(3), {})
    with pytest.raises(jp.InputError, match="full: no parameter is trainable; none is named by which="):
        jp.setup(jp.full("no such path"), model, params, jax.random.key(0))
