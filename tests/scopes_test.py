"""Adapters that would be lost without a word: leaves that a merge or a setup would leave unread are refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import method as methods
from jaxpeft import scopes, tree
from tests import tiny

KEY = jax.random.key(0)
LORA = jp.lora(2)


def assert_same(model, params, other, others):
    found, expected = model.apply(params, tiny.batch()), other.apply(others, tiny.batch())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def adapted(method=LORA):
    """(base, its parameters, the adapted model, its parameters with every trained leaf away from its start)."""
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, KEY)
    return base, params, model, jp.combine({path: x + 0.1 for path, x in trainable.items()}, rest)


@pytest.mark.parametrize("other", [jp.dora(2), jp.ia3(), jp.lora_fa(2), jp.full(), jp.lisa(), jp.mezo(), jp.Method()])
def test_a_merge_that_would_leave_an_adapter_is_refused(other):
    with pytest.raises(jp.InputError, match=f"^{other.name}: merge leaves .*/lora/a as it is.* with lora in it"):
        other.merge(adapted()[-1])


@pytest.mark.parametrize(
    ("made", "other"),
    [
        (LORA, jp.lora(4, alpha=8)),
        (LORA, jp.lora(2, rank_pattern={"q_proj": 3})),
        (jp.lora_fa(2), jp.lora_fa(3)),
        (jp.velora(2, groups=4), jp.velora(3, groups=4)),
        (jp.dora(2), jp.dora(4)),
        (jp.loha(2), jp.loha(4)),
    ],
)
def test_factors_of_another_rank_are_not_merged(made, other):
    with pytest.raises(jp.InputError, match="have rank 2, where the method has [34]"):
        other.merge(adapted(made)[-1])


def test_a_merge_takes_flat_parameters_and_is_compiled():
    base, _, model, params = adapted()
    merged = jax.jit(LORA.merge)(tree.flatten(params))
    np.testing.assert_allclose(
        base.apply(merged, tiny.batch()), model.apply(params, tiny.batch()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", [LORA, jp.dora(2)])
def test_a_merge_of_the_adapter_alone_says_what_it_lacks(method):
    trainable = jp.setup(method, *tiny.model(), KEY)[1]
    with pytest.raises(jp.InputError, match=r"merge misses 'layers/\S+/kernel'; it takes all parameters of a model"):
        method.merge(trainable)


def test_a_fault_of_a_merge_itself_keeps_its_traceback():
    with pytest.raises(KeyError, match="alpha"):
        jp.Method(merge=lambda params: {}["alpha"]).merge(tiny.model()[1])


def test_members_of_a_chain_merge_beside_one_another():
    base, _, model, params = adapted(jp.chain(jp.ia3(), LORA, jp.mezo()))
    merged = jp.chain(jp.ia3(), LORA, jp.mezo()).merge(params)
    np.testing.assert_allclose(
        base.apply(merged, tiny.batch()), model.apply(params, tiny.batch()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("other", [jp.ia3(), jp.dora(2), jp.full(), jp.prompt(2), jp.lisa()])
def test_leaves_that_nothing_would_read_are_refused(other):
    base, _, _, params = adapted()
    with pytest.raises(jp.InputError, match=rf"^{other.name}: the parameters hold \S+/lora/a, which nothing"):
        jp.setup(other, base, params, KEY)


def test_leaves_that_are_there_already_are_kept():
    """Of the method itself, as where a run goes on; of the adapted model that is given; in another method's scope."""
    base, _, model, params = adapted()
    _, trainable, _ = jp.setup(LORA, base, params, KEY)
    for path, leaf in trainable.items():
        np.testing.assert_array_equal(leaf, tree.flatten(params)[path])
    again, scales, rest = jp.setup(jp.ia3(), model, params, KEY)
    assert_same(again, jp.combine(scales, rest), model, params)
    owlore = jp.owlore(count=1, rank=2)  # whose leaves are GaLore's
    first = jp.setup(owlore, *tiny.model(), KEY, lambda: ())
    second = jp.setup(owlore, tiny.model()[0], jp.combine(*first[1:]), KEY, lambda: ())
    assert first[1].keys() == second[1].keys()


@pytest.mark.parametrize("method", [LORA, jp.vera(3), jp.ia3(), jp.oft(4), jp.svfit(rank=2), jp.dora(2)])
@pytest.mark.parametrize("plain", [False, True])
def test_a_method_is_not_put_on_a_model_that_has_it(method, plain):
    _, original, model, params = adapted(method)
    with pytest.raises(jp.InputError, match=f"^{method.name}: the model has {method.name} already"):
        jp.setup(method, model, original if plain else params, KEY)


def test_full_goes_on_after_full():
    _, _, model, params = adapted(jp.full("norms"))
    assert jp.setup(jp.full(), model, params, KEY)[0].methods == ("full", "full")


def test_what_is_no_method_or_no_model_is_told():
    base, params = tiny.model()
    with pytest.raises(TypeError, match='method is "lora"; it should be a Method, as jp.lora'):
        jp.setup("lora", base, params, KEY)
    with pytest.raises(TypeError, match="base is a DecoderConfig; it should be a Model"):
        jp.setup(LORA, base.config, params, KEY)


def test_modules_may_be_called_as_methods_are():
    """Of a model of one's own, whose modules are no adapters."""
    flat = {"prompt/lora/kernel": 0, "prompt/prefix/scale": 0, "full/kernel": 0, "full/bias": 0}
    assert scopes.at_modules(flat, methods.names()) == {}

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="prompt")(nn.Dense(4, name="lora")(x))

    example = {"x": jnp.ones((2, 4))}
    base = jp.from_linen(Own(), example)
    params = base.init(KEY, {})
    method = jp.ia3(targets="prompt", feedforward=[])
    model, trainable, rest = jp.setup(method, base, params, KEY)
    merged = method.merge(jp.combine(trainable, rest))
    np.testing.assert_allclose(base.apply(merged, example), model.apply(jp.combine(trainable, rest), example))


@pytest.mark.parametrize("method", [jp.lora(2, targets=["out"]), jp.full(), jp.dora(2, targets=["out"])])
def test_modules_called_so_beside_parameters_of_their_own_are_merged(method):
    """A scale of the module's own beside a branch `parallel`, a norm `half` and a linear map `vera`."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.ones, (4,))
            return scale * nn.Dense(4, name="parallel")(nn.LayerNorm(name="half")(x)) + nn.Dense(4, name="vera")(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="out")(Own(name="block")(x))

    example = {"x": jnp.arange(8.0).reshape(2, 4)}
    base = jp.from_linen(Outer(), example)
    model, trainable, rest = jp.setup(method, base, base.init(KEY, {}), KEY)
    params = jp.combine({path: leaf + 0.1 for path, leaf in trainable.items()}, rest)
    np.testing.assert_allclose(base.apply(method.merge(params), example), model.apply(params, example), rtol=1e-5)


def test_nested_parts_do_as_flat_ones():
    base, params = tiny.model()
    model, trainable, rest = jp.setup(LORA, base, params, KEY)
    whole = jp.combine(trainable, rest)
    assert jax.tree.structure(jp.combine(tree.unflatten(trainable), rest)) == jax.tree.structure(whole)
    states = [
        jp.init_state(LORA, optax.adam(1e-3), *parts, jax.random.key(1), model)
        for parts in ((trainable, rest), (tree.unflatten(trainable), tree.unflatten(rest)))
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    with pytest.raises(ValueError, match="both trainable and frozen: layers/"):
        jp.combine(tree.unflatten(trainable), whole)
