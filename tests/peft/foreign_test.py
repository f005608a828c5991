"""Adapters of one's own Linen and NNX modules in files: back as they were, on their own base alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.peft import attach
from tests import tiny
from tests.modules import X, moved


class Tower(nn.Module):
    """Scanned layers of a kernel of several axes, a convolution and a scalar."""

    features: int = 4

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.DenseGeneral(8, axis=(-2, -1), name="join")(
                    nn.DenseGeneral((2, 4), name="split")(x)
                ), None

        layer = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x = self.param("gain", nn.initializers.ones, ()) * nn.Conv(8, (3,), name="conv")(x)
        return nn.Dense(self.features, name="classifier")(layer(name="layers")(x, None)[0])


class Normed(nnx.Module):
    """A list of layers, and batch statistics."""

    def __init__(self, rngs):
        join = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.layers = nnx.List([nnx.LinearGeneral(8, (2, 4), rngs=rngs), join])
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.layers[1](nnx.relu(self.layers[0](x))))


def linen(features=4):
    base = jp.from_linen(Tower(features), {"x": X})
    return base, base.init(jax.random.key(1), {})


def graph():
    return jp.from_nnx(Normed(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (linen, jp.lora_fa(2, targets=["split", "join", "conv", "classifier"])),
        (linen, jp.lora(2, init="pissa")),
        (graph, jp.chain(jp.ia3(targets=".*"), jp.dora(2))),
    ],
    ids=["lora_fa-linen", "pissa-linen", "ia3+dora-nnx"],
)
def test_an_adapter_comes_back_on_a_fresh_base(make, method, tmp_path):
    base, params = make()
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    trained = jp.combine(moved(trainable), frozen)
    jp.export_adapter(tmp_path / "adapter", trained, method, model)
    base, params = make()
    own, leaves = jp.import_adapter(tmp_path / "adapter", base, params)
    assert own.specs == method.specs
    assert leaves.keys() == tree.flatten(trained).keys() - base.shapes().keys()
    again, again_params, _ = attach(tmp_path / "adapter", base, params)
    np.testing.assert_array_equal(again.apply(again_params, {"x": X}), model.apply(trained, {"x": X}))


def test_an_adapter_for_another_base_is_refused(tmp_path):
    base, params = linen()
    method = jp.lora(2)
    _, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    trained = jp.combine(moved(trainable), frozen)
    folder = jp.export_adapter(tmp_path / "adapter", trained, method, base)
    with pytest.raises(jp.InputError, match=r"another base: classifier/bias is \[3\] here, \[4\] there"):
        jp.import_adapter(folder, *linen(features=3))
    with pytest.raises(jp.InputError, match=r"another base: classifier/bias is None here, \[4\] there"):
        jp.import_adapter(folder, *graph())
    other = {**params, "gain": jnp.full((), 2.0)}
    with pytest.raises(jp.InputError, match="another base: the values of gain differ from those it was trained beside"):
        jp.import_adapter(folder, base, other)
    with pytest.raises(jp.InputError, match="an adapter's base is None; for a model without a configuration give the"):
        jp.import_adapter(folder, base.config, params)
    ours, weights = tiny.model()
    with pytest.raises(jp.InputError, match="lacks layers/mlp/down_proj/lora/a of shape"):
        jp.import_adapter(folder, ours)
    adapted, trainable, _ = jp.setup(method, ours, weights, jax.random.key(0))
    known = jp.export_adapter(tmp_path / "known", tree.unflatten(trainable), method, adapted)
    assert jp.import_adapter(known, ours.config)[1].keys() == trainable.keys()
    with pytest.raises(jp.InputError, match="known: an adapter in PEFT's form, by names of a known family's modules"):
        jp.import_adapter(known, base, params)
    with pytest.raises(jp.InputError, match="full: is no adapter; merge it"):
        jp.export_adapter(tmp_path / "full", params, jp.full(), base)
