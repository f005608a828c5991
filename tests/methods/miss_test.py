"""MiSS: PEFT's numbers in both linear forms, ranks that divide nothing, dropout, packed kernels, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import sites
from jaxpeft.methods import miss
from jaxpeft.model import Context
from jaxpeft.peft import attach, import_adapter
from jaxpeft.quant import dot
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.peft import reference

RNG = np.random.default_rng(0)
NAMES = ["q_proj", "o_proj", "down_proj"]
LEAVES = {f"layers/{site}/miss/block" for site in ("self_attn/q_proj", "self_attn/o_proj", "mlp/down_proj")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def of_peft(base, **settings):
    """PEFT's model with random blocks, and its parameters by name."""
    config = peft.MissConfig(task_type="CAUSAL_LM", target_modules=NAMES, **settings)
    model = peft.get_peft_model(reference.torch_base(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in model.named_parameters() if "miss_block" in name}
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, parameters


@pytest.mark.parametrize(
    ("settings", "method", "shape"),
    [
        ({"r": 8}, jp.miss(8, NAMES), (8, 32)),
        ({"r": 6}, jp.miss(6, NAMES), (6, 32)),  # divides neither 32 nor 56
        ({"r": 8, "mini_r": 4, "init_weights": "mini"}, jp.miss(8, NAMES, mini=4), (8, 4)),
    ],
    ids=["whole", "padded", "mini"],
)
def test_outputs_gradients_merged_weights_and_adapters_are_those_of_peft(settings, method, shape, llama, tmp_path):
    theirs, parameters = of_peft(llama, **settings)
    base, params = reference.load(llama)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert trainable.keys() == LEAVES and {leaf.shape for leaf in trainable.values()} == {(2, *shape)}

    def of_torch(path, value):
        name = "base_model.model.model.layers.{}." + ".".join(path.split("/")[1:3]) + ".miss_block.default"
        return np.stack([value(parameters[name.format(layer)]).numpy() for layer in range(2)])

    read, _, _ = reference.assert_same_as_peft(theirs, llama, method, model, trainable, rest, of_torch, tmp_path)
    assert read.specs[0].config == {**method.specs[0].config, "targets": sorted(NAMES)}


def test_layers_without_an_adapter_and_what_is_no_linear_form(llama, tmp_path):
    theirs, _ = of_peft(llama, r=8, layers_to_transform=[1])
    theirs.save_pretrained(tmp_path / "one")
    base, params = reference.load(llama)
    model, adapted, _ = attach(tmp_path / "one", base, params)
    reference.assert_close(reference.logits(model, adapted), reference.torch_logits(theirs))
    of_peft(llama, r=8, init_weights="bat")[0].save_pretrained(tmp_path / "bat")
    with pytest.raises(jp.InputError, match="init_weights 'bat' is not supported; supported: True, 'mini'"):
        import_adapter(tmp_path / "bat", base.config)
    wider = reference.load(reference.write_base(tmp_path / "wider", hidden_size=64))[0]
    with pytest.raises(jp.InputError, match="another base: .* has a block of 32 outputs, and 64 itself"):
        import_adapter(tmp_path / "one", wider.config)


def test_dropout_is_on_the_inputs():
    """Ones, of which every sum counts those that are kept, over what is kept of one in the mean."""
    x = jnp.ones((400, 24))
    sums = np.asarray(miss.summed(x, 8, 0.25, jnp.int32(3)), np.float64) * 0.75
    np.testing.assert_allclose(sums, np.round(sums), atol=1e-5)
    assert set(np.round(sums).ravel()) == {0, 1, 2, 3} and abs(sums.mean() / 3 - 0.75) < 0.02
    module, kernel = miss.MiSS(8, dropout=0.25), jnp.zeros((24, 4))
    site, leaves = sites.Site("layers/q_proj", kernel, None, True), {"params": {"block": jnp.ones((8, 4))}}
    y = lambda **rngs: module.apply(leaves, lambda x: dot(x, kernel), x, site, Context(), **rngs)
    np.testing.assert_array_equal(y(), 24)
    assert np.asarray(y(rngs={"dropout": jax.random.key(0)})).std() > 1


def test_on_a_packed_kernel_in_bfloat16():
    """Values and gradient of the unpacked kernel, with what is trained cast to the stream's type."""
    kernel = quantize(jnp.asarray(RNG.normal(size=(128, 16)), jnp.float32), "int8")
    plain, x = dequantize(kernel, jnp.float32), jnp.asarray(RNG.normal(size=(3, 128)), jnp.bfloat16)
    block = jnp.asarray(RNG.normal(size=(12, 4)), jnp.float32)

    def y(block, x, kernel):
        site = sites.Site("layers/v_proj", kernel, None, True)
        return miss.MiSS(12, 4).apply({"params": {"block": block}}, lambda x: dot(x, kernel), x, site, Context())

    def loss(block, x, kernel):
        return jnp.sum(jnp.square(y(block, x, kernel).astype(jnp.float32)))

    assert y(block, x, kernel).dtype == jnp.bfloat16
    found, wanted = jax.grad(loss)(block, x, kernel), jax.grad(loss)(block, x.astype(jnp.float32), plain)
    np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_keeps_the_sums_alone(dropout):
    """r float32 per token, site and layer beyond what a frozen backbone keeps, and no dropped input."""
    method = jp.miss(4, dropout=dropout)
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    ours = residuals.bytes_per_token(*start(method), tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    assert ours - floor <= 7 * 3 * 4 * 4
    kernel, block = jnp.zeros((64, 8)), jnp.ones((4, 8))
    site = sites.Site("layers/q_proj", kernel, None, True)

    def y(x, block):
        rngs = {"dropout": jax.random.key(0)}
        module = miss.MiSS(4, dropout=dropout)
        return module.apply({"params": {"block": block}}, lambda x: x @ kernel, x, site, Context(), rngs=rngs)

    kept = jax.tree.leaves(jax.eval_shape(lambda x, block: jax.vjp(y, x, block)[1], jnp.ones((50, 64)), block))
    assert (50, 64) not in {leaf.shape for leaf in kept}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "miss: rank 0 must be at least 1"),
        ({"rank": 33}, "miss: rank 33 is above the 32 inputs of layers/"),
        ({"mini": -1}, "miss: mini -1 must be at least 0"),
        ({"rank": 4, "mini": 5}, "miss: mini 5 does not divide the 32 outputs of layers/.*; 8 and its divisors"),
        ({"dropout": 1.0}, "miss: dropout 1.0 must be at least 0 and below 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.miss(**options), *tiny.model(), jax.random.key(0))
