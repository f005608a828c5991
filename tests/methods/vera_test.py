"""VeRA: PEFT's numbers, its generator's too, factors in one place for all sites, what is kept, modules of one's own."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import sites
from jaxpeft.methods import vera
from jaxpeft.model import Context
from jaxpeft.peft import attach, export_adapter, import_adapter
from jaxpeft.quant import dot
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.modules import X, moved
from tests.peft import reference

RNG = np.random.default_rng(0)
NAMES = ["q_proj", "k_proj", "down_proj", "lm_head"]  # 32 x 32, 32 x 16, 56 x 32, 32 x 97
SITES = ("layers/self_attn/q_proj", "layers/self_attn/k_proj", "layers/mlp/down_proj", "lm_head")
RANK = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def of_peft(base, **settings):
    """PEFT's model with random vectors, and its parameters by name."""
    config = peft.VeraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=NAMES, **settings)
    model = peft.get_peft_model(reference.torch_base(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in model.named_parameters() if "vera_lambda" in name}
    for parameter in parameters.values():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model, parameters


def test_outputs_gradients_merged_weights_and_adapters_are_those_of_peft(llama, tmp_path):
    method = jp.vera(RANK, NAMES)
    theirs, parameters = of_peft(llama)
    base, params = reference.load(llama)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert trainable.keys() == {f"{site}/vera/lambda_{name}" for site in SITES for name in "bd"}
    assert (rest["vera/a"].shape, rest["vera/b"].shape) == ((56, RANK), (RANK, 97))

    def of_torch(path, value):
        module, leaf = path.split("/vera/")
        name = f"base_model.model.{module.replace('/', '.').replace('layers', 'model.layers.{}')}.vera_{leaf}.default"
        rows = [value(parameters[name.format(layer)]).numpy() for layer in range(2)]
        return np.stack(rows) if "{}" in name else rows[0]

    rest |= {f"vera/{name.lower()}": jnp.asarray(getattr(theirs, f"vera_{name}")["default"].numpy().T) for name in "AB"}
    read, _, _ = reference.assert_same_as_peft(theirs, llama, method, model, trainable, rest, of_torch, tmp_path)
    assert read.specs[0].config == {**method.specs[0].config, "targets": sorted(NAMES)}


def test_an_adapter_that_names_the_key_of_its_factors_alone(llama, tmp_path):
    """They are those that PEFT draws; layers without vectors are as they were."""
    theirs, _ = of_peft(llama, save_projection=False, projection_prng_key=7, layers_to_transform=[1], vera_dropout=0.2)
    theirs.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "vera_A" in name]
    model, adapted, method = attach(tmp_path, *reference.load(llama))
    for name, own in (("A", "a"), ("B", "b")):
        np.testing.assert_allclose(adapted["vera"][own].T, getattr(theirs, f"vera_{name}")["default"], atol=1e-7)
    reference.assert_close(reference.logits(model, adapted), reference.torch_logits(theirs))
    assert method.specs[0].config["dropout"] == 0.2


def test_what_is_no_adapter_of_this_base(llama, tmp_path):
    of_peft(llama)[0].save_pretrained(tmp_path)
    config, file = json.loads((tmp_path / "adapter_config.json").read_text()), tmp_path / "adapter_model.safetensors"
    tensors, base = load_file(file), reference.load(llama)[0]
    first = "base_model.model.model.layers.0.mlp.down_proj.vera_lambda_d"

    def refused(match, fields=config, **changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        save_file({name: x for name, x in {**tensors, **changes}.items() if x is not None}, file)
        with pytest.raises(jp.InputError, match=match):
            import_adapter(tmp_path, base.config)

    shared = {"base_model.vera_A": None, "base_model.vera_B": None}
    refused("bias 'vera_only' is not supported", {**config, "bias": "vera_only"})
    refused("save_projection is true, and the adapter has no vera_A and vera_B", **shared)
    refused("has base_model.vera_B; expected one vera_A and one vera_B", **{"base_model.vera_A": None})
    refused("down_proj has a rank of 3, and lm_head of 40", **{first: np.zeros(3, np.float32)})
    short = {"base_model.vera_A": np.zeros((RANK, 55), np.float32)}
    refused(r"base: vera_A has shape \(40, 55\), where kernels have up to 56 inputs and the rank is 40", **short)
    short = {"base_model.vera_B": np.zeros((96, RANK), np.float32)}
    refused(r"base: vera_B has shape \(96, 40\), where kernels have up to 97 outputs and the rank is", **short)


def test_on_a_packed_kernel_in_bfloat16():
    """Values and gradients of the unpacked kernel; the stream is not widened."""
    kernel = quantize(jnp.asarray(RNG.normal(size=(128, 16)), jnp.float32), "int8")
    plain, x = dequantize(kernel, jnp.float32), jnp.asarray(RNG.normal(size=(3, 128)), jnp.bfloat16)
    own = {"lambda_d": jnp.asarray(RNG.normal(size=12), jnp.float32), "lambda_b": jnp.ones(16)}
    shared = {"a": RNG.normal(size=(140, 12)) / 12, "b": RNG.normal(size=(12, 20))}
    ctx = Context(shared={"vera": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), shared)})

    def y(own, x, kernel):
        site = sites.Site("layers/v_proj", kernel, None, True)
        return vera.VeRA(12).apply({"params": own}, lambda x: dot(x, kernel), x, site, ctx)

    def loss(own, x, kernel):
        return jnp.sum(jnp.square(y(own, x, kernel).astype(jnp.float32)))

    assert y(own, x, kernel).dtype == jnp.bfloat16
    found, wanted = jax.grad(loss)(own, x, kernel), jax.grad(loss)(own, x.astype(jnp.float32), plain)
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, atol=0.03 * np.abs(leaf).max())
    jaxpr = jax.make_jaxpr(lambda x: y(own, x, plain.astype(jnp.bfloat16)))(x)
    shapes = {(v.aval.shape, v.aval.dtype.name) for e in residuals.equations(jaxpr.jaxpr) for v in e.outvars}
    assert ((3, 128), "float32") not in shapes and ((3, 16), "float32") not in shapes


def test_keeps_what_lies_between_the_factors_alone():
    """r float32 per token, site and layer beyond what a frozen backbone keeps; A and B once."""
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    model, trainable, rest = start(jp.vera(4))
    ours = residuals.bytes_per_token(model, trainable, rest, tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    assert ours - floor <= 7 * 3 * 4 * 4
    kept = [leaf.shape for leaf in residuals.saved(model, trainable, rest, tiny.batch(rows=2))]
    assert not [shape for shape in kept if shape[-2:] in ((56, 4), (32, 4)) and len(shape) == 3]


class Tower(nn.Module):
    """Scanned layers, and a map beside them."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(12, name="up")(x))), None

        layer = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(4, name="out")(layer(name="layers")(x, None)[0])


class Graph(nnx.Module):
    """A few maps."""

    def __init__(self, rngs):
        self.up, self.out = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.up(x)))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_in_modules_without_visible_layers(kind, tmp_path):
    if kind == "linen":
        base = jp.from_linen(Tower(), {"x": X})
        params = base.init(jax.random.key(1), {})
    else:
        base, params = jp.from_nnx(Graph(nnx.Rngs(0)))
    method = jp.vera(6, ".*")
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert (rest["vera/a"].shape, rest["vera/b"].shape) == ((12, 6), (6, 12))
    trained = jp.combine(moved(trainable), rest)
    expected = model.apply(trained, {"x": X})
    assert np.abs(expected - base.apply(params, {"x": X})).max() > 0.1
    np.testing.assert_allclose(base.apply(method.merge(trained), {"x": X}), expected, rtol=1e-4, atol=1e-4)
    if kind == "nnx":
        with pytest.raises(jp.InputError, match="vera: its factors are beside the module, which cannot run alone"):
            jp.to_nnx(model, trained)(X)
    export_adapter(tmp_path / "adapter", trained, method, model)
    again, leaves, _ = attach(tmp_path / "adapter", base, params)
    np.testing.assert_array_equal(again.apply(leaves, {"x": X}), expected)


def test_dropout_is_in_front_of_the_factors():
    module, kernel, x = vera.VeRA(5, dropout=0.5), jnp.zeros((24, 4)), jnp.ones((200, 24))
    site, leaves = sites.Site("layers/q_proj", kernel, None, True), {"lambda_d": jnp.ones(5), "lambda_b": jnp.ones(4)}
    ctx = Context(shared={"vera": {"a": jnp.ones((24, 5)) / 24, "b": jnp.ones((5, 4)) / 5}})
    y = lambda **rngs: module.apply({"params": leaves}, lambda x: dot(x, kernel), x, site, ctx, **rngs)
    np.testing.assert_allclose(y(), 1, rtol=1e-6)
    dropped = np.asarray(y(rngs={"dropout": jax.random.key(0)}))
    assert abs(dropped.mean() - 1) < 0.05 and dropped.std() > 0.1
    np.testing.assert_allclose(dropped * 12, np.round(dropped * 12), atol=1e-4)  # of 24 ones, those kept count twice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "vera: rank 0 must be at least 1"),
        ({"start": 0.0}, "vera: start 0.0 must be a finite number other than 0"),
        ({"dropout": 1.0}, "vera: dropout 1.0 must be at least 0 and below 1"),
        ({"targets": ["q_prj"]}, "targets 'q_prj': matches no linear site; nearest: q_proj"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.vera(**options), *tiny.model(), jax.random.key(0))
