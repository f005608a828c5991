"""LoHa: PEFT's numbers, both ways to compute them, packed kernels, what is made and what is kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import sites
from jaxpeft.methods import loha
from jaxpeft.model import Context
from jaxpeft.peft import attach, import_adapter
from jaxpeft.quant import dot
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.peft import reference

RNG = np.random.default_rng(0)
NAMES = ["q_proj", "k_proj", "down_proj"]  # 32 x 32, 32 x 16, 56 x 32
PEFTS = {"w1_down": "w1_b", "w1_up": "w1_a", "w2_down": "w2_b", "w2_up": "w2_a"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def of_peft(base, **settings):
    """PEFT's model with random factors, and its parameters by name."""
    config = peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=NAMES, **settings)
    model = peft.get_peft_model(reference.torch_base(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in model.named_parameters() if "hada_" in name}
    for parameter in parameters.values():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return model, parameters


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"r": 3, "alpha": 6}, jp.loha(3, 6, NAMES)),  # by factors of rank 9
        (
            {"r": 5, "alpha": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 7}},
            jp.loha(5, 4, NAMES, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 7}),
        ),  # q_proj and k_proj by the matrix, down_proj by factors
    ],
    ids=["factors", "patterns"],
)
def test_outputs_gradients_merged_weights_and_adapters_are_those_of_peft(settings, method, llama, tmp_path):
    theirs, parameters = of_peft(llama, **settings)
    base, params = reference.load(llama)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert 2 * len(trainable) == len(parameters) == 2 * 3 * 4

    def of_torch(path, value):
        module, leaf = path.split("/loha/")
        name = f"base_model.model.model.layers.{{}}.{'.'.join(module.split('/')[1:])}.hada_{PEFTS[leaf]}.default"
        return np.stack([value(parameters[name.format(layer)]).numpy().T for layer in range(2)])

    reference.assert_same_as_peft(theirs, llama, method, model, trainable, rest, of_torch, tmp_path)


def test_layers_without_an_adapter_and_what_is_none_of_this_base(llama, tmp_path):
    theirs, _ = of_peft(llama, r=3, layers_to_transform=[1])
    theirs.save_pretrained(tmp_path)
    base, params = reference.load(llama)
    model, adapted, _ = attach(tmp_path, base, params)
    reference.assert_close(reference.logits(model, adapted), reference.torch_logits(theirs))

    of_peft(llama, r=3)[0].save_pretrained(tmp_path)
    config, file = json.loads((tmp_path / "adapter_config.json").read_text()), tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = "base_model.model.model.layers.0.mlp.down_proj.hada_"

    def refused(match, fields=config, tensors=tensors, base=base):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        save_file(tensors, file)
        with pytest.raises(jp.InputError, match=match):
            import_adapter(tmp_path, base.config)

    refused(r"hada_w1_b is \(3, 56\), where r 4 on a kernel of 56 inputs .* means \(4, 56\)", {**config, "r": 4})
    refused("r 0 should be at least 1", {**config, "r": 0})
    refused("down_proj has no hada_w2_a", tensors={name: x for name, x in tensors.items() if name != f"{first}w2_a"})
    refused("the tensor .*hada_t1 is not supported", tensors={**tensors, f"{first}t1": np.zeros((3, 3, 1, 1), "f")})
    wider = reference.load(reference.write_base(tmp_path / "wider", hidden_size=64))[0]
    refused(r"an adapter for another base: \S+hada_w1_a has shape \(32, 3\), where .* 64 outputs", base=wider)


@pytest.mark.parametrize("rank", [2, 8])
def test_both_ways_on_a_packed_kernel_in_bfloat16(rank):
    """Values and gradients of the unpacked kernel; nothing is widened, and the matrix made where it must be."""
    kernel = quantize(jnp.asarray(RNG.normal(size=(128, 16)), jnp.float32), "int8")
    plain, x = dequantize(kernel, jnp.float32), jnp.asarray(RNG.normal(size=(3, 128)), jnp.bfloat16)
    shapes = loha.shapes_of(rank, 128, 16)
    own = {leaf: jnp.asarray(RNG.normal(size=shape), jnp.float32) for leaf, shape in shapes.items()}

    def y(own, x, kernel):
        site = sites.Site("layers/v_proj", kernel, None, True)
        return loha.LoHa(rank, 0.5).apply({"params": own}, lambda x: dot(x, kernel), x, site, Context())

    def loss(own, x, kernel):
        return jnp.sum(jnp.square(y(own, x, kernel).astype(jnp.float32)))

    assert y(own, x, kernel).dtype == jnp.bfloat16
    wide = x.astype(jnp.float32)
    change = 0.5 * (own["w1_down"] @ own["w1_up"]) * (own["w2_down"] @ own["w2_up"])
    np.testing.assert_allclose(
        y(own, wide, plain), wide @ (plain + change), rtol=1e-4, atol=1e-4 * np.abs(change).max()
    )
    found, wanted = jax.grad(loss)(own, x, kernel), jax.grad(loss)(own, wide, plain)
    for leaf, gradient in wanted.items():
        np.testing.assert_allclose(found[leaf], gradient, atol=0.03 * np.abs(gradient).max())
    jaxpr = jax.make_jaxpr(jax.grad(loss))(own, x, plain.astype(jnp.bfloat16)).jaxpr
    made = {(v.aval.shape, v.aval.dtype.name) for e in residuals.equations(jaxpr) for v in e.outvars}
    assert ((3, 128), "float32") not in made and ((128, 16), "float32") not in made
    assert ((128, 16) in {shape for shape, _ in made}) == (rank == 8)


def test_keeps_the_inputs():
    """Float32 per layer: the norm's output that q, k and v share, those of o_proj, gate and up, down_proj."""
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    for rank in (2, 16):
        ours = residuals.bytes_per_token(*start(jp.loha(rank)), tiny.batch)
        assert ours - floor <= 3 * (32 + 32 + 32 + 56) * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "loha: rank 0 must be at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, "loha: rank 0 must be at least 1"),
        ({"rank": 17}, "loha: rank 17 is above the smaller side of layers/self_attn/k_proj, a kernel of 32 x 16"),
        ({"targets": ["q_prj"]}, "targets 'q_prj': matches no linear site; nearest: q_proj"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.loha(**options), *tiny.model(), jax.random.key(0))
