"""Several adapters on one base: each row computes, decodes and trains as with its adapter alone."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import adapters as several
from jaxpeft import generate as decoding
from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.generate import generate
from jaxpeft.memory import targets
from tests import tiny

ADAPTERS = {
    "small": jp.lora(rank=2, alpha=6),
    "wide": jp.lora(rank=7, targets="qv", rslora=True, lr_ratio=4),
    "fa": jp.lora_fa(rank=3, targets="mlp", alpha=9),
}
NAMES = ["wide", None, "fa", "small", "wide", "small"]
PROMPTS = [[5], [7, 11, 13], list(range(20, 60)), [96, 0, 3, 4], list(range(33)), [8, 9]]
BATCH = tiny.batch(rows=len(NAMES))


def noisy(leaves, seed=3):
    """All adapters' leaves with noise, what is frozen among them too."""
    own = sorted(path for path in leaves if "/several/" in path)
    keys = dict(zip(own, jax.random.split(jax.random.key(seed), len(own)), strict=True))
    noise = lambda path, leaf: 0.2 * jax.random.normal(keys[path], leaf.shape)
    return {path: leaf + noise(path, leaf) if path in keys else leaf for path, leaf in leaves.items()}


@pytest.fixture(scope="module")
def made():
    """(method, model, trainable, rest) with adapters that are not zero."""
    method = jp.several(ADAPTERS)
    model, trainable, rest = jp.setup(method, *tiny.model(), jax.random.key(0))
    return method, model, noisy(trainable), noisy(rest, 4)


@pytest.fixture(scope="module")
def single(made):
    """name -> (model, trainable, rest) of the adapter alone; None: the base."""
    _, _, trainable, rest = made
    base, params = tiny.model()
    whole = tree.combine(trainable, rest)
    found = {
        name: jp.setup(method, base, several.alone(whole, ADAPTERS, name), jax.random.key(0))
        for name, method in ADAPTERS.items()
    }
    return {**found, None: (base, {}, tree.flatten(params))}


def rows_of(batch, name):
    chosen = [i for i, own in enumerate(NAMES) if own == name]
    return {field: x[chosen] for field, x in batch.items()}


def told(batch, names=NAMES):
    return {**batch, "adapter": several.rows(ADAPTERS, names)}


def test_each_row_computes_as_with_its_adapter_alone(made, single):
    _, model, trainable, rest = made
    params, apply = tree.combine(trainable, rest), jax.jit(model.apply)
    found = apply(params, told(BATCH))
    for name, (own, *parts) in single.items():
        expected = jax.jit(own.apply)(tree.combine(*parts), rows_of(BATCH, name))
        ours = found[np.array([i for i, other in enumerate(NAMES) if other == name])]
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    base, of_base = tiny.model()
    np.testing.assert_array_equal(found[1], jax.jit(base.apply)(of_base, BATCH)[1])  # no adapter: exactly the base
    other = apply(params, told(BATCH, NAMES[::-1]))
    assert apply._cache_size() == 1 and np.abs(other - found).max() > 0.1
    swapped = {path: 2 * leaf if "/several/wide/" in path else leaf for path, leaf in tree.flatten(params).items()}
    again = apply(tree.unflatten(swapped), told(BATCH))
    assert apply._cache_size() == 1  # another leaf is another adapter
    np.testing.assert_array_equal(again[2], found[2])
    assert np.abs(again[0] - found[0]).max() > 0.1


def test_leaves_have_their_own_ranks(made):
    _, _, trainable, rest = made
    shapes = {path: leaf.shape for path, leaf in {**trainable, **rest}.items() if "/several/" in path}
    assert shapes["layers/self_attn/q_proj/several/wide/a"] == (3, 32, 7)
    assert shapes["layers/self_attn/q_proj/several/small/b"] == (3, 2, 32)
    assert "layers/self_attn/o_proj/several/wide/a" not in shapes
    assert {path.rsplit("/", 2)[1:][0] for path in rest if "/several/" in path} == {"fa"}
    assert all(path.endswith("/fa/a") for path in rest if "/several/" in path)


def arguments(adapters, where=None):
    """(bytes of the compiled forward pass's arguments, those of the adapters' leaves) on a device that is described."""
    base, params = tiny.model()
    model, leaves = base, tree.flatten(params)
    if adapters:
        model, trainable, rest = jp.setup(jp.several(adapters), base, params, jax.random.key(0))
        leaves = {**trainable, **rest}
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    batch = {name: BATCH[name] for name in ("tokens", "positions", "segment_ids")}
    batch |= {"adapter": several.rows(ADAPTERS, [None] * len(NAMES))}
    compiled = jax.jit(model.apply).lower(*jax.tree.map(shape, (tree.unflatten(leaves), batch))).compile()
    own = sum(leaf.nbytes for path, leaf in leaves.items() if "/several/" in path)
    return compiled.memory_analysis().argument_size_in_bytes, own


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_an_adapter_adds_its_own_bytes_and_the_base_is_held_once(name):
    """Compiled arguments without the adapters' leaves are the same for one adapter and for three."""
    where = None
    if name != "cpu":
        pytest.importorskip("jax_plugins.xla_cuda13")
        where = jax.sharding.SingleDeviceSharding(targets.devices(targets.target(name))[0])
    one, three = (arguments(dict(list(ADAPTERS.items())[:count]), where) for count in (1, 3))
    assert three[0] - three[1] == one[0] - one[1] and three[1] > one[1]
    if name == "cpu":
        plain, _ = arguments({})
        assert one[0] - one[1] - plain in (0, 4 * len(NAMES))  # the rows' numbers, which the base does not read


def test_a_decoded_batch_says_what_each_adapter_says_alone(made, single):
    _, model, trainable, rest = made
    params = tree.combine(trainable, rest)
    numbers = several.rows(ADAPTERS, NAMES).tolist()
    together = generate(model, params, PROMPTS, 9, eos=(), adapters=numbers)
    for name, (own, *parts) in single.items():
        chosen = [i for i, other in enumerate(NAMES) if other == name]
        alone = generate(own, tree.combine(*parts), [PROMPTS[i] for i in chosen], 9, eos=())
        assert [together[i] for i in chosen] == alone
    assert generate(model, params, PROMPTS, 9, eos=(), batch_size=4, adapters=numbers) == together
    before = decoding._read._cache_size(), decoding._steps._cache_size()
    other = generate(model, params, PROMPTS, 9, eos=(), adapters=numbers[::-1])
    assert (decoding._read._cache_size(), decoding._steps._cache_size()) == before and other != together
    pieces = decoding.stream(model, params, PROMPTS[2], 9, eos=(), adapter=numbers[2])
    assert [token for piece in pieces for token in piece] == together[2]
    with pytest.raises(InputError, match="2 adapters for 6 prompts"):
        generate(model, params, PROMPTS, 9, adapters=[0, 1])
    with pytest.raises(InputError, match=f"number {len(ADAPTERS)} is beyond the {len(ADAPTERS)} of the model"):
        generate(model, params, PROMPTS[:1], 9, adapters=[len(ADAPTERS)])
    with pytest.raises(InputError, match="the model has not several"):
        decoding.stream(*tiny.model(), PROMPTS[0], 9, adapter=0)


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        ({}, "names no adapter"),
        ({"a/b": jp.lora()}, "name 'a/b' should be of letters"),
        ({"none": jp.lora()}, "name 'none' should be"),
        ({"x": jp.dora()}, "'x': dora is more than a pair of factors"),
        ({"x": jp.lora(init="pissa")}, "'x': lora with init='pissa' is more than a pair"),
        ({"x": jp.lora_fa(store_a=False)}, "several at once are lora and lora_fa"),
        ({"x": jp.chain(jp.quantize(), jp.lora())}, r"'x': quantize\+lora"),
    ],
)
def test_methods_that_cannot_share_a_batch(adapters, reason):
    with pytest.raises(InputError, match=reason):
        jp.several(adapters)


def test_what_is_outside_the_layers_and_what_is_not_there(made):
    method, _, trainable, rest = made
    base, params = tiny.model(tie_word_embeddings=False)
    with pytest.raises(InputError, match="adapter 'x': adapts lm_head, outside the layers"):
        jp.setup(jp.several({"x": jp.lora(targets=["lm_head"])}), base, params, jax.random.key(0))
    with pytest.raises(InputError, match="adapter 'y': lora: rank 65 is above the smaller side of layers/"):
        jp.setup(jp.several({"x": jp.lora(2), "y": jp.lora(65)}), base, params, jax.random.key(0))
    with pytest.raises(InputError, match="no adapter is called 'wid'; did you mean wide"):
        several.rows(ADAPTERS, ["wid"])
    with pytest.raises(InputError, match="no adapter is called 'other'"):
        several.alone(tree.combine(trainable, rest), ADAPTERS, "other")
    with pytest.raises(InputError, match="one adapter is merged at a time"):
        method.merge(tree.combine(trainable, rest))
    opaque = base._replace(stack=base.stack._replace(layered=False))
    with pytest.raises(InputError, match="a model of visible layers"):
        jp.setup(method, opaque, params, jax.random.key(0))


def test_over_a_packed_base(made):
    """Rows with adapters beside NF4 kernels: as each alone."""
    method = jp.chain(jp.quantize(), jp.several(ADAPTERS))
    base, params = tiny.model()
    _, _, trainable, rest = made
    own = {path: leaf for path, leaf in {**trainable, **rest}.items() if "/several/" in path}
    whole = tree.unflatten({**tree.flatten(params), **own})
    model, *parts = jp.setup(method, base, whole, jax.random.key(0))
    found = jax.jit(model.apply)(tree.combine(*parts), told(BATCH))
    alone = several.alone(whole, ADAPTERS, "wide")
    one, *parts = jp.setup(jp.chain(jp.quantize(), ADAPTERS["wide"]), base, alone, jax.random.key(0))
    expected = jax.jit(one.apply)(tree.combine(*parts), rows_of(BATCH, "wide"))
    np.testing.assert_allclose(found[np.array([0, 4])], expected, rtol=1e-4, atol=1e-4)
