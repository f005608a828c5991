"""Linen modules that show no layers: those that are sampled train in the stack over which the module scans."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from tests.modules import X, mean_square


class Narrow(nn.Module):
    """What `Stacked` scans over."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.DenseGeneral((2, 4), name="split")(x))
        return x + nn.Dense(8, name="down")(y.reshape(x.shape)), None


class Stacked(nn.Module):
    """Layers that `nn.scan` has stacked under the name of ours, and what lies outside of them."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(Narrow, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layer(name="layers")(nn.Dense(8, name="into")(x), None)
        return nn.Dense(4, name="head")(x)


SAMPLED = {
    "lisa": jp.lisa(count=2, every=100),
    "half": jp.half(every=100),
    "owlore": jp.owlore(count=2, every=100, rank=3, scores="uniform", targets="down"),
    "lora+lisa": jp.chain(jp.lora(2), jp.lisa(count=2, every=100)),
    "full+lisa+lora": jp.chain(jp.full("down/"), jp.lisa(count=2, every=100), jp.lora(2, targets="split")),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_layers_that_are_sampled_train_in_a_module_that_shows_none(name):
    """Their masters stand in the stack over which the module scans: those drawn change, each by what merging says."""
    method, base = SAMPLED[name], jp.from_linen(Stacked(), {"x": X})
    params = base.init(jax.random.key(1), {})
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(2))
    optimizer = optax.scale_by_adam()
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(3), model)
    before = tree.flatten(method.merge(state.params))
    step = jax.jit(jp.make_train_step(model, method, optimizer, mean_square, rate=1e-2))
    losses = []
    for _ in range(4):
        state, metrics = step(state, {"x": X})
        losses.append(float(metrics["loss"]))
    merged = method.merge(state.params)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(base.apply(merged, {"x": X}), model.apply(state.params, {"x": X}), rtol=1e-5, atol=1e-6)
    after = tree.flatten(merged)
    for path in ("layers/split/kernel", "layers/down/kernel"):
        changed = int(jnp.any((after[path] != before[path]).reshape(3, -1), axis=1).sum())
        behind = name.endswith("+lora") and path == "layers/split/kernel"  # what stands behind lisa is not sampled
        assert changed == 3 if behind else 0 < changed < 3, path
    own = {path: getattr(leaf, "own_shape", leaf.shape) for path, leaf in tree.flatten(params).items()}
    assert {path: leaf.shape for path, leaf in after.items()} == own


def test_a_kernel_of_several_axes_is_not_projected():
    base = jp.from_linen(Stacked(), {"x": X})
    with pytest.raises(jp.InputError, match="owlore: changes layers/split/kernel, a kernel of 3x8x2x4, itself; leave"):
        jp.setup(jp.owlore(1, rank=2, scores="uniform"), base, base.init(jax.random.key(1), {}), jax.random.key(2))


CUT = [jp.full("last:1"), jp.mezo(which="last:1"), jp.hybrid(), jp.pockengine({"layers/2/": 1.0})]


@pytest.mark.parametrize("method", CUT, ids=lambda method: method.name)
def test_a_stack_that_a_module_scans_is_not_cut(method):
    base = jp.from_linen(Stacked(), {"x": X})
    with pytest.raises(jp.InputError, match="the model shows no stack of layers"):
        jp.setup(method, base, base.init(jax.random.key(1), {}), jax.random.key(2))


@pytest.mark.parametrize("method", [jp.lisa(), jp.half(), jp.owlore(), jp.slimfit()], ids=lambda method: method.name)
def test_without_a_stack_no_layers_are_drawn(method):
    base = jp.from_linen(nn.Dense(4), {"inputs": X})
    with pytest.raises(jp.InputError, match=f"{method.name}: the model shows no stack of layers, of which some could"):
        jp.setup(method, base, base.init(jax.random.key(1), {}), jax.random.key(2))
