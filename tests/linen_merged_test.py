"""What methods make of a Linen module's kernels of several axes, and of its stacks in stacks, fits the module again."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.linen import own_shapes
from jaxpeft.method import about, make, module
from tests.linen_test import MODULES
from tests.modules import X

NESTED = (
    *("bitfit", "dora", "ia3", "int21", "lamda", "loha", "lokr", "lora", "lora_fa", "lq_lora", "miss", "oft", "paca"),
    *("peqa", "pst", "randlora", "sara", "shira", "snell", "snella", "sparsegrad", "speft", "spt_lora", "svfit"),
    *("vblora", "velora", "vera", "welore"),
)
SMALL = ("rank", "mask_rank", "length", "block_size")


def loss(model, params, batch, key):
    return jnp.var(model.apply(params, batch, key)), {}


def adapted(name, kind):
    """(the module, its method, the adapted model, what it computes with) of trained leaves that have moved."""
    own, method = MODULES[kind][0], made(name)
    base = jp.from_linen(own, {"x": X})
    params = base.init(jax.random.key(1), {})
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(2), lambda: [{"x": X}], loss)
    keys = jax.random.split(jax.random.key(3), len(trainable))
    noise = lambda key, leaf: leaf + 0.05 * jax.random.normal(key, leaf.shape)
    moved = {path: noise(key, trainable[path]) for key, path in zip(keys, trainable, strict=True)}
    return own, method, model, jp.combine(moved, rest), params


def made(name):
    accepted = inspect.signature(getattr(module(name), name)).parameters
    options = {**about(name).example, **{option: 2 for option in SMALL if option in accepted}}
    return make(name, options | {"targets": "all" if name == "bitfit" else "all-linear"})


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "members") for name in NESTED), ("bitfit", "attention"), ("spiel", "scanned")]
)
def test_merged_parameters_are_the_module_s_and_compute_the_same(name, kind):
    own, method, model, params, before = adapted(name, kind)
    merged = method.merge(params)
    shape = lambda leaf: (type(leaf).__name__, leaf.shape, leaf.dtype)
    assert jax.tree.map(shape, tree.flatten(merged)) == jax.tree.map(shape, tree.flatten(own_shapes(before)))
    found = model.apply(params, {"x": X})
    np.testing.assert_allclose(own.apply({"params": merged}, X), found, rtol=1e-5, atol=1e-5)
    assert np.abs(found - own.apply({"params": own_shapes(before)}, X)).max() > 1e-3


def test_thresholds_are_of_kernels_as_their_modules_have_them():
    """sparse_mezo moves the base's own leaves, whatever axes they have."""
    base = jp.from_linen(MODULES["attention"][0], {"x": X})
    method = jp.sparse_mezo()
    _, _, rest = jp.setup(method, base, base.init(jax.random.key(1), {}), jax.random.key(2))
    kernel = rest["attention/query/kernel"]
    assert kernel.shape == (8, 2, 6)
    kept = np.mean(np.abs(kernel) <= rest["sparse_mezo/attention/query/kernel"])
    np.testing.assert_allclose(kept, 0.25, atol=0.011)  # of 96 weights


def test_layers_of_a_stack_in_a_stack_take_no_turns():
    base = jp.from_linen(MODULES["members"][0], {"x": X})
    with pytest.raises(jp.InputError, match="spiel: dense is stacked in stacks, whose layers take no turns; leave it"):
        jp.setup(jp.spiel(0.1), base, base.init(jax.random.key(1), {}), jax.random.key(2))
