"""Embeddings and convolutions as sites: chosen by name, they compute as the merged module does; others refuse them."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.quant import EMBEDDING
from jaxpeft.train.reach import unreached
from tests.modules import moved

IDS = jax.random.randint(jax.random.key(0), (3, 6), 0, 9)
EVERY = ["table", "conv", "patch", "out"]


class Layer(nn.Module):
    """A convolution that is scanned over."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Conv(8, 3, padding="CAUSAL", kernel_dilation=2, name="conv")(x)), None


class Tied(nn.Module):
    """A table that looks up and attends, with convolutions between, of patches and scanned."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(9, 8, name="table")
        layer = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layer(name="blocks")(table(x), None)
        x = nn.Conv(8, (2,), (2,), padding="VALID", use_bias=False, name="patch")(x)
        return table.attend(nn.Dense(8, name="out")(x))


class TiedGraph(nnx.Module):
    """The same, without a scan."""

    def __init__(self, rngs):
        self.table = nnx.Embed(9, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.patch = nnx.Conv(8, 8, (2,), (2,), padding="VALID", use_bias=False, rngs=rngs)
        self.out = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = self.table(x)
        return self.table.attend(self.out(self.patch(x + nnx.relu(self.conv(x)))))


def linen():
    base = jp.from_linen(Tied(), {"x": IDS})
    return base, base.init(jax.random.key(1), {}), lambda model, merged: Tied().apply({"params": merged}, IDS)


def graph():
    return *jp.from_nnx(TiedGraph(nnx.Rngs(0))), lambda model, merged: jp.to_nnx(model, merged)(IDS)


@pytest.mark.parametrize("make", [linen, graph])
@pytest.mark.parametrize(
    "method",
    [jp.lora(2, targets=EVERY, dropout=0.5), jp.lora_fa(2, targets=EVERY), jp.dora(2, targets=EVERY[1:])],
    ids=lambda method: method.name,
)
def test_an_adapter_beside_a_table_or_a_convolution(method, make):
    """At the start nothing has changed; each adapter acts; merged, the module computes the same."""
    base, params, run = make()
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    apply = jax.jit(lambda params: model.apply(params, {"x": IDS}))
    plain = tree.unflatten({path: getattr(leaf, "array", leaf) for path, leaf in tree.flatten(params).items()})
    np.testing.assert_allclose(apply(jp.combine(trainable, frozen)), run(base, plain), rtol=1e-5, atol=1e-5)
    changed = moved(trainable)
    found = apply(jp.combine(changed, frozen))
    for path in changed:
        without = jp.combine({**changed, path: trainable[path]}, frozen)
        assert np.abs(apply(without) - found).max() > 1e-6, path
    merged = method.merge(jp.combine(changed, frozen))
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, plain)
    np.testing.assert_allclose(run(model, merged), found, rtol=2e-4, atol=2e-4)
    if method.name == "lora":
        dropped = model.apply(jp.combine(changed, frozen), {"x": IDS}, jax.random.key(3))
        assert np.abs(dropped - found).max() > 1e-3
    assert not unreached(lambda leaves: apply(jp.combine(leaves, frozen)).sum(), changed)


def test_a_preset_chooses_neither():
    base, params, _ = linen()
    assert sites.find(params) == ["out"]
    base, params, _ = graph()
    assert sites.find(base.init(jax.random.key(0), params), ".*") == ["out"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (jp.ia3(targets=["table"]), "ia3: does not adapt table, an embedding; leave it out of targets"),
        (jp.paca(2, targets=["conv"]), "paca: does not adapt blocks/conv, a convolution; leave it out of targets"),
        (jp.dora(2, targets=["table"]), "dora: does not adapt table, an embedding; leave it out of targets"),
        (jp.galore(2, targets=["patch"]), "galore: does not adapt patch, a convolution; leave it out of targets"),
        (jp.chain(jp.quantize(targets=["table"]), jp.lora(2)), "quantize: does not adapt table, an embedding"),
        (jp.lora_fa(2, targets=["table"], store_a=False), r"lora_fa\(store_a=False\): does not adapt table"),
        (jp.lora(2, targets="patch"), r"targets 'patch': patch, a convolution, is chosen by name alone: \['patch'\]"),
    ],
    ids=lambda x: x.name if isinstance(x, jp.Method) else "",
)
def test_a_method_that_does_not_adapt_them_refuses_them_by_name(method, message):
    base, params, _ = linen()
    with pytest.raises(jp.InputError, match=message):
        jp.setup(method, base, params, jax.random.key(0))


class Grouped(nn.Module):
    """A convolution of groups, one with a mask."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3,), mask=np.ones((3, 8, 8)), name="masked")(
            nn.Conv(8, (3,), feature_group_count=2, name="groups")(x)
        )


class ByItself(nn.Module):
    """A table that is read besides its calls."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(9, 8, name="table")
        return nn.Embed(9, 8, name="called")(x) + table(x) @ table.embedding.T @ table.embedding


def test_a_table_that_is_read_by_itself_is_refused_by_name():
    base = jp.from_linen(ByItself(), {"x": IDS})
    params = base.init(jax.random.key(0), {})
    with pytest.raises(jp.InputError, match="table is no site: the model reads its table by itself, too, where no ada"):
        jp.setup(jp.lora(2, targets=["table"]), base, params, jax.random.key(0))
    assert sites.find(params, ["called"], "lora", (EMBEDDING,)) == ["called"]


def test_a_convolution_that_is_no_matrix_is_refused_by_name():
    x = np.ones((2, 4, 8), np.float32)
    base = jp.from_linen(Grouped(), {"x": x})
    params = base.init(jax.random.key(0), {})
    with pytest.raises(jp.InputError, match="groups is no site: its Conv has feature_group_count 2, a matrix for each"):
        jp.setup(jp.lora(2, targets=["groups"]), base, params, jax.random.key(0))
    with pytest.raises(jp.InputError, match="masked is no site: its Conv has a mask"):
        jp.setup(jp.lora(2, targets=["masked"]), base, params, jax.random.key(0))
