"""Residuals by name: the gradients of plain autodiff, however the layers run."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import sites
from jaxpeft.backward import loop, residuals
from jaxpeft.backward.flops import count_flops
from jaxpeft.errors import InputError
from jaxpeft.models import layers
from pallas_kernels import packed as quantized
from pallas_kernels.platform import tracing_for
from pallas_kernels.stacked import Stacked
from tests import contract_test, tiny, virtual
from tests.backward.gradients import (
    METHODS,
    gradients,
    loss,
    packed,
    plain,
    same,
    segments,
    start,
)

page = contract_test.page  # the namespace of docs/contract.md


# Gradients.


@pytest.mark.parametrize(
    ("method", "family", "save"),
    [
        ("lora", "llama", "matmuls"),
        ("lora", "llama", "matmuls,attention=recompute,tokens=16"),
        pytest.param("lora", "llama", "offload,block_input=offload,tokens=32", marks=pytest.mark.slow),
        pytest.param("lora_fa", "llama", "matmuls", marks=pytest.mark.slow),
        ("lora_fa seed", "llama", "blocks"),
        ("full", "llama", "gate_proj=save,q_rotary=offload,after_attention=save,tokens=40"),
        pytest.param("full", "tied", "matmuls", marks=pytest.mark.slow),
        pytest.param("last:1", "llama", "matmuls,tokens=1", marks=pytest.mark.slow),
        ("lora", "qwen3", "matmuls"),
        ("lora", "windows by layer", "matmuls"),
        ("lora", "mistral", "blocks,tokens=16"),
        # All rows in one group: the masks of plain autodiff.
        pytest.param("dropout", "llama", "matmuls", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_plain_autodiff(method, family, save):
    (model, trainable, frozen), wanted = plain(method, family)
    key = jax.random.key(9) if method == "dropout" else None
    same(gradients(residuals.remat(model, save), trainable, frozen, packed(), key), wanted)


@pytest.mark.parametrize("name", ["qlora", "many_lora"])
def test_methods_that_change_the_stack(page, name):
    """Kernels that are pytrees of integers, adapters chosen row by row."""
    made = start(page["many_lora"](3, 2) if name == "many_lora" else jp.chain(jp.quantize("int8"), jp.lora(4)))
    batch = {**packed(), "adapter": np.array([0, 2, 1, 2], np.int32)} if name == "many_lora" else packed()
    remat = residuals.remat(made[0], "matmuls,tokens=32")
    same(gradients(remat, *made[1:], batch), gradients(*made, batch))


@pytest.mark.parametrize("name", ["lora", "last:1", "int8"])
def test_a_block_reads_frozen_kernels_in_their_stacks(monkeypatch, name):
    """In both loops, and in the primal; to the bit what it computes with slices of them."""
    model, trainable, frozen = start(METHODS["lora" if name == "int8" else name])
    model = residuals.remat(model, "matmuls,tokens=32")
    if name == "int8":
        quantize = jax.vmap(functools.partial(quantized.quantize, format="int8"))
        frozen = {path: quantize(x) if path.endswith("_proj/kernel") else x for path, x in frozen.items()}
    seen, dense = [], layers.Dense.linear

    def linear(self, x, kernel):
        seen.append(isinstance(kernel, Stacked))
        return dense(self, x, kernel)

    with monkeypatch.context() as patch:
        patch.setattr(layers.Dense, "linear", linear)
        ours = gradients(model, trainable, frozen, packed())
        value = jax.jit(loss(model, frozen, packed()))(trainable)
    assert any(seen) and np.isclose(value, ours[0], rtol=1e-6)
    monkeypatch.setattr(loop.Loop, "stacked", lambda self, leaves, perturbed, nested=True: self)
    jax.tree.map(np.testing.assert_array_equal, ours, gradients(model, trainable, frozen, packed()))


@pytest.mark.parametrize(
    ("method", "save"),
    [
        pytest.param("lora", "matmuls,tokens=32", marks=pytest.mark.slow),
        pytest.param("lora", "blocks,tokens=16", marks=pytest.mark.slow),  # the backward pass holds kernels
        pytest.param("lora", "compressed,block_input=compress,tokens=16", marks=pytest.mark.slow),
        pytest.param("lora", "compressed12,tokens=16", marks=pytest.mark.slow),  # whose codes are made without a seed
        ("lora", "blocks,block_input=offload,tokens=16"),
        pytest.param("lora", "offload,tokens=32", marks=pytest.mark.slow),  # one loop: what is made goes to the host
        pytest.param("dropout", "matmuls,tokens=16", marks=pytest.mark.slow),
        pytest.param("qlora", "blocks,tokens=16", marks=pytest.mark.slow),
        pytest.param("last:1", "blocks,tokens=16", marks=pytest.mark.slow),
        pytest.param("full", "matmuls,tokens=16", marks=pytest.mark.slow),
    ],
)
def test_groups_within_layers(method, save):
    """On GPUs: to the bit the values and gradients of one loop over both; but for codes, whose rounding differs."""
    model, trainable, frozen = start(METHODS[method])
    model, key = residuals.remat(model, save), jax.random.key(9) if method == "dropout" else None

    def depth(platform):
        with tracing_for(platform):
            jaxpr = jax.make_jaxpr(jax.value_and_grad(loss(model, frozen, packed(), key)))(trainable).jaxpr
            return max(map(_loops, jaxpr.eqns)), gradients(model, trainable, frozen, packed(), key)

    (flat, wanted), (nested, found) = depth("cpu"), depth("cuda")
    assert (flat, nested) == (1, 1 if save.startswith("offload") else 2)
    if save.startswith("compressed,"):
        same(found, wanted, 1e-6)
    else:
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def _loops(equation) -> int:
    """How many scans of the block are within one another; those without a product are others."""
    bodies = [x.jaxpr for x in jax.tree.leaves(dict(equation.params)) if hasattr(x, "jaxpr")]
    inside = max((_loops(e) for body in bodies for e in body.eqns), default=0)
    own = equation.primitive.name == "scan" and count_flops(equation.params["jaxpr"]) > 0
    return inside + own


def test_an_adapter_that_reads_the_kernel_gets_its_values():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, inner, x, site, ctx):
            gain = self.param("gain", nn.initializers.ones, (site.kernel.shape[1],))
            return x @ (site.kernel * (gain / jnp.linalg.norm(site.kernel, axis=0)))

    base, params = tiny.model()
    model = sites.attach(base, "normed", lambda site: Normed(), lambda params: ["layers/mlp/up_proj"])
    params = model.init(jax.random.key(0), params)
    planned = residuals.remat(model, "matmuls")
    np.testing.assert_allclose(planned.apply(params, packed()), model.apply(params, packed()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_group_has_dropout_of_its_own():
    """Groups draw masks of their own, the same in both passes: the slope is that of the value that was computed."""
    (model, trainable, frozen), _ = plain("dropout", "llama")
    function = loss(residuals.remat(model, "matmuls,tokens=16"), frozen, packed(), jax.random.key(9))
    z = {path: jax.random.normal(jax.random.key(4), x.shape) for path, x in trainable.items()}

    @jax.jit
    def slopes(trainable):
        ends = [function({p: x + step * z[p] for p, x in trainable.items()}) for step in (1e-3, -1e-3)]
        return (ends[0] - ends[1]) / 2e-3, optax.tree_utils.tree_vdot(jax.grad(function)(trainable), z)

    measured, exact = slopes(trainable)
    np.testing.assert_allclose(measured, exact, rtol=2e-2)


def test_bfloat16():
    """Recomputed values are rounded as the first ones were; only sums over groups differ."""
    model, trainable, frozen = start(METHODS["lora"], jnp.bfloat16)
    found = gradients(residuals.remat(model, "matmuls,tokens=16"), trainable, frozen, packed())
    same(found, gradients(model, trainable, frozen, packed()), 3e-2)


def test_a_train_step_with_accumulation():
    (model, trainable, frozen), _ = plain("lora", "llama")
    optimizer, ends = optax.sgd(0.1), []
    for each in (model, residuals.remat(model, "matmuls,tokens=16")):
        state = jp.init_state(METHODS["lora"], optimizer, trainable, frozen, jax.random.key(1))
        step = jax.jit(jp.make_train_step(each, METHODS["lora"], optimizer, accumulate=2))
        state, metrics = step(state, packed())
        ends.append((metrics["loss"], state.trainable))
    same(ends[1], ends[0])


SHARDED = """
import jax, numpy as np
from jaxpeft.backward import passes, residuals
from tests import contract_test
from tests.backward import gradients as here
page = contract_test.page.__wrapped__()
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
made, batch = here.start(here.METHODS["lora"]), here.packed(rows=8)
wanted = here.gradients(*made, batch)
(trainable, frozen), rows = page["shard"](mesh, made[1:], batch)
for save in ("matmuls,tokens=64", "blocks,tokens=16"):
    found = here.gradients(residuals.remat(made[0], save), trainable, frozen, rows)
    here.same(found, wanted)
assert frozen["layers/mlp/up_proj/kernel"].addressable_shards[0].data.shape[-1] == here.F // 2
"""


@pytest.mark.slow
def test_sharded():
    """Parameters split over a 2 x 2 mesh of host devices, rows over all four."""
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=virtual.devices(4), capture_output=True, text=True, cwd=virtual.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_compressed_input_moves_only_the_backward_pass():
    (model, trainable, frozen), (value, wanted) = plain("lora", "llama")
    found = gradients(residuals.remat(model, "compressed,block_input=compress"), trainable, frozen, packed())
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    assert any(np.abs(found[1][path] - g).max() > 1e-4 * np.abs(g).max() for path, g in wanted.items())


# Refused.


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(InputError, match="no activation is called 'gate_prj'; nearest: gate_proj") as error:
        segments("lora", "matmuls,gate_prj=save")
    assert "known: block_input, input_layernorm" in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_runs_its_layers_itself_is_refused(page):
    model, _, _ = start(page["meft"](4))
    with pytest.raises(InputError, match="--save matmuls: this model runs its layers in its own way"):
        residuals.remat(model)
    assert residuals.remat(model, "everything") is model


def test_a_block_that_a_method_has_changed_gets_plain_arrays():
    """A function around a block that computes with its layer's parameters: the same under every plan."""
    base, params = tiny.model()

    def scaled(function):
        def call(layer, *args, **named):
            return function(jax.tree.map(lambda leaf: 2 * leaf - jnp.mean(leaf), layer), *args, **named)

        return call

    model = base._replace(stack=base.stack.map_layers(scaled))
    of = lambda model: jax.jit(lambda params: jp.completion_loss(model, params, packed())[0])(params)
    assert np.allclose(of(model), of(residuals.remat(model, "matmuls")), rtol=1e-6)
    assert not np.allclose(of(model), of(base), rtol=1e-3)
