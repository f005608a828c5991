"""Adapters of one's own Linen and NNX modules in files: back as they were, on their own base alone."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import linen as nn
from flax import nnx

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.peft import attach
from jaxpeft.quant import unfolded_all
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
        (linen, jp.speft(0.5, metric="magnitude", targets=["split", "join"])),  # whose places are those of a matrix
    ],
    ids=["lora_fa-linen", "pissa-linen", "ia3+dora-nnx", "speft-linen"],
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
    with pytest.raises(jp.InputError, match=r"holds \S+/lora/\w, which is no part of lora on such a base"):
        jp.import_adapter(folder, ours)
    adapted, trainable, _ = jp.setup(method, ours, weights, jax.random.key(0))
    known = jp.export_adapter(tmp_path / "known", tree.unflatten(trainable), method, adapted)
    assert jp.import_adapter(known, ours.config)[1].keys() == trainable.keys()
    with pytest.raises(
        jp.InputError, match="known: an adapter in PEFT's form, by names of modules; say how this model's are"
    ):
        jp.import_adapter(known, base, params)
    with pytest.raises(jp.InputError, match="full: is no adapter; merge it"):
        jp.export_adapter(tmp_path / "full", params, jp.full(), base)


NAMES = {"layers/split": "blocks.{i}.split", "layers/join": "blocks.{i}.join", "classifier": "classifier"}


class Twin(torch.nn.Module):
    """What of `Tower` are linear maps, in torch; its convolution and gain are left to the input."""

    def __init__(self, params):
        super().__init__()

        def linear(leaves, n, m):
            found = torch.nn.Linear(n, m)
            found.weight.data = torch.tensor(np.asarray(leaves["kernel"]).reshape(n, m).T.copy())
            found.bias.data = torch.tensor(np.asarray(leaves["bias"]).reshape(m))
            return found

        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(2)]
        pairs = [{name: linear(layer[name], 8, 8) for name in ("split", "join")} for layer in layers]
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict(pair) for pair in pairs)
        self.classifier = linear(params["classifier"], 8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["join"](block["split"](x))
        return self.classifier(x)


@pytest.mark.parametrize("method", [jp.lora(2, targets=[*NAMES]), jp.dora(2, targets=["join"])], ids=["lora", "dora"])
def test_peft_reads_an_adapter_whose_modules_are_named(method, tmp_path):
    """PEFT computes on the torch twin what the adapted module computes; it comes back, and so does what PEFT writes."""
    base, params = linen()
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    trained = jp.combine(moved(trainable), frozen)
    folder = jp.export_adapter(tmp_path / "adapter", trained, method, model, names=NAMES)
    own = unfolded_all(tree.flatten(params))
    inputs = nn.Conv(8, (3,)).apply({"params": {name: own[f"conv/{name}"] for name in ("kernel", "bias")}}, X)
    adapted = peft.PeftModel.from_pretrained(Twin(tree.unflatten(own)), folder)
    wanted = adapted(torch.tensor(np.asarray(inputs))).detach().numpy()
    np.testing.assert_allclose(model.apply(trained, {"x": X}), wanted, rtol=1e-5, atol=1e-5)

    _, leaves = jp.import_adapter(folder, base, params, names=NAMES)
    assert trainable.keys() <= leaves.keys()
    adapted.save_pretrained(tmp_path / "theirs")
    again, again_params, found = attach(tmp_path / "theirs", base, params, names=NAMES)
    assert found.specs[0].name == method.specs[0].name
    np.testing.assert_allclose(again.apply(again_params, {"x": X}), wanted, rtol=1e-5, atol=1e-5)


REFUSED = {
    "site": ({"layers/splits": "a"}, "names: 'layers/splits' is no site of this model; nearest: layers/split"),
    "layers": ({"layers/split": "split"}, "it should have {i} once, for the layer"),
    "layer": ({"classifier": "head.{i}"}, "it should have no {i}, as it has no layers"),
    "twice": (
        {"classifier": "b.0", "layers/join": "b.{i}"},
        "names: 'layers/join' is called 'b.0', as 'classifier' is",
    ),
    "convolution": ({"conv": "conv"}, "names: 'conv' is a convolution; PEFT's form is of linear maps"),
    "without": ({"layers/join": "b.{i}"}, "lora: classifier has no name for PEFT; named are layers/join"),
}


@pytest.mark.parametrize(("names", "said"), REFUSED.values(), ids=REFUSED)
def test_names_are_refused_in_a_line(names, said, tmp_path):
    base, params = linen()
    method = jp.lora(2, targets=["classifier"])
    _, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    trained = jp.combine(moved(trainable), frozen)
    with pytest.raises(jp.InputError) as error:
        jp.export_adapter(tmp_path / "adapter", trained, method, base, names=names)
    assert said in str(error.value)
    assert not (tmp_path / "adapter").exists()
    ours, _ = tiny.model()
    with pytest.raises(jp.InputError, match="names: a model of a known family has names of its own"):
        jp.import_adapter(tmp_path, ours, names=names)
