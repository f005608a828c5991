"""LoKr: PEFT's numbers in every form of its factors, sizes as PEFT takes them, packed kernels, what is kept."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.methods import lokr
from jaxpeft.model import Context
from jaxpeft.peft import attach, export_adapter, import_adapter
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
    config = peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=NAMES, **settings)
    model = peft.get_peft_model(reference.torch_base(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in model.named_parameters() if "lokr_" in name}
    for parameter in parameters.values():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model, parameters


@pytest.mark.parametrize(
    ("settings", "method", "q_proj"),
    [
        pytest.param(
            {"r": 3, "alpha": 6},
            jp.lokr(3, 6, NAMES),
            {"w1": (4, 4), "w2_down": (8, 3), "w2_up": (3, 8)},
            marks=pytest.mark.slow,
        ),
        ({"r": 4, "alpha": 2}, jp.lokr(4, 2, NAMES), {"w1": (4, 4), "w2": (8, 8)}),
        (
            {"r": 1, "alpha": 1, "decompose_both": True},
            jp.lokr(1, 1, NAMES, both=True),
            {"w1_down": (4, 1), "w1_up": (1, 4), "w2_down": (8, 1), "w2_up": (1, 8)},
        ),
        (
            {
                "r": 5,
                "alpha": 4,
                "decompose_factor": 2,
                "rank_pattern": {"down_proj": 3},
                "alpha_pattern": {"q_proj": 7},
            },
            jp.lokr(5, 4, NAMES, factor=2, rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 7}),
            {"w1": (2, 2), "w2_down": (16, 5), "w2_up": (5, 16)},
        ),
        pytest.param(
            {"r": 3, "alpha": 3, "decompose_factor": 8, "decompose_both": True},
            jp.lokr(3, 3, NAMES, factor=8, both=True),
            {"w1_down": (8, 3), "w1_up": (3, 8), "w2": (4, 4)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["low rank", "whole", "both low rank", "patterns", "first larger than second"],
)
def test_outputs_gradients_merged_weights_and_adapters_are_those_of_peft(settings, method, q_proj, llama, tmp_path):
    theirs, parameters = of_peft(llama, **settings)
    base, params = reference.load(llama)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    own = {path.rpartition("/")[2]: leaf.shape for path, leaf in trainable.items() if "q_proj" in path}
    assert own == {leaf: (2, *shape) for leaf, shape in q_proj.items()}
    assert 2 * len(trainable) == len(parameters)

    def of_torch(path, value):
        module, leaf = path.split("/lokr/")
        name = f"base_model.model.model.layers.{{}}.{'.'.join(module.split('/')[1:])}.lokr_{PEFTS.get(leaf, leaf)}"
        return np.stack([value(parameters[f"{name.format(layer)}.default"]).numpy().T for layer in range(2)])

    read, _, _ = reference.assert_same_as_peft(theirs, llama, method, model, trainable, rest, of_torch, tmp_path)
    for field in ("factor", "both"):
        assert read.specs[0].config[field] == method.specs[0].config[field], field


def test_layers_without_an_adapter_and_what_is_none_of_this_base(llama, tmp_path):
    theirs, _ = of_peft(llama, r=3, layers_to_transform=[1])
    theirs.save_pretrained(tmp_path)
    base, params = reference.load(llama)
    model, adapted, _ = attach(tmp_path, base, params)
    reference.assert_close(reference.logits(model, adapted), reference.torch_logits(theirs))

    of_peft(llama, r=3)[0].save_pretrained(tmp_path)
    config, file = json.loads((tmp_path / "adapter_config.json").read_text()), tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = "base_model.model.model.layers.0.mlp.down_proj.lokr_"

    def refused(match, fields=config, tensors=tensors, base=base):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        save_file(tensors, file)
        with pytest.raises(jp.InputError, match=match):
            import_adapter(tmp_path, base.config)

    refused(r"lokr_w2 is none, where r 4 on a kernel of 56 inputs and 32 outputs means \(8, 8\)", {**config, "r": 4})
    refused("r 0 should be at least 1", {**config, "r": 0})
    pattern = {**config, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    refused("layers.1.mlp.down_proj has r 3 and alpha 3, other layers 3 and 8", pattern)
    lacking = {name: x for name, x in tensors.items() if name != f"{first}w1"}
    refused("layers.0.mlp.down_proj has no lokr_w1$", tensors=lacking)
    refused("the tensor .*lokr_t2 is not supported", tensors={**tensors, f"{first}t2": np.zeros((3, 3, 1, 1), "f")})
    wider = reference.load(reference.write_base(tmp_path / "wider", hidden_size=64))[0]
    refused(r"an adapter for another base or rank: \S+lokr_w1 is \(4, 7\), where .* means \(8, 7\)", base=wider)


@pytest.mark.parametrize(
    ("lost", "put", "reason"),
    [
        ("w1", None, "{file}: {name} has no lokr_w1$"),
        ("w2_a", None, "{file}: {name} has no lokr_w2_a$"),
        ("w2_b", None, "{file}: {name} has no lokr_w2_b$"),
        (None, "w1_a", "{file}: {name} has lokr_w1 and lokr_w1_a, which stands in its place"),
        ("w2", "w2", r"jaxpeft.json: an adapter .*: {name}.lokr_w2_b is none, where r 3 .* means \(3, 8\)"),
    ],
)
def test_factors_that_are_not_whole_are_refused(lost, put, reason, tmp_path):
    """Also where jaxpeft.json speaks of them."""
    model, params = tiny.model()
    _, trainable, rest = jp.setup(jp.lokr(3), model, params, jax.random.key(0))
    folder = export_adapter(tmp_path, tree.combine(trainable, rest), jp.lokr(3), model.config)
    file, name = folder / "adapter_model.safetensors", "model.layers.1.self_attn.q_proj"
    start = f"base_model.model.{name}.lokr_"
    tensors = {key: x for key, x in load_file(file).items() if lost is None or not key.startswith(start + lost)}
    save_file(tensors if put is None else {**tensors, start + put: np.zeros((8, 8), "f")}, file)
    own = json.loads((folder / "jaxpeft.json").read_text())
    own["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "jaxpeft.json").write_text(json.dumps(own))
    with pytest.raises(jp.InputError, match=reason.format(file=file.name, name=name)):
        import_adapter(folder, model.config)


def test_sizes_are_those_of_peft():
    for size in (1, 2, 7, 16, 32, 56, 96, 97, 360, 4096, 11008, 14336):
        for factor in (None, 1, 2, 3, 5, 8, 16, 100, 5000):
            assert lokr.divided(size, factor) == factorization(size, factor or -1), (size, factor)


@pytest.mark.parametrize("rank", [2, 8])
def test_on_a_packed_kernel_in_bfloat16(rank):
    """Values and gradients of the unpacked kernel; neither the stream is widened nor a product of its size made."""
    kernel = quantize(jnp.asarray(RNG.normal(size=(128, 16)), jnp.float32), "int8")
    plain, x = dequantize(kernel, jnp.float32), jnp.asarray(RNG.normal(size=(3, 128)), jnp.bfloat16)
    shapes = lokr.shapes_of(rank, 128, 16, None, True)
    own = {leaf: jnp.asarray(RNG.normal(size=shape), jnp.float32) for leaf, shape in shapes.items()}

    def y(own, x, kernel):
        site = sites.Site("layers/v_proj", kernel, None, True)
        module = lokr.LoKr(rank, 0.5, None, True)
        return module.apply({"params": own}, lambda x: dot(x, kernel), x, site, Context())

    def loss(own, x, kernel):
        return jnp.sum(jnp.square(y(own, x, kernel).astype(jnp.float32)))

    assert y(own, x, kernel).dtype == jnp.bfloat16
    found, wanted = jax.grad(loss)(own, x, kernel), jax.grad(loss)(own, x.astype(jnp.float32), plain)
    for leaf, gradient in wanted.items():
        np.testing.assert_allclose(found[leaf], gradient, atol=0.03 * np.abs(gradient).max())
    jaxpr = jax.make_jaxpr(jax.grad(loss))(own, x, plain.astype(jnp.bfloat16)).jaxpr
    made = {(v.aval.shape, v.aval.dtype.name) for e in residuals.equations(jaxpr) for v in e.outvars}
    assert ((3, 128), "float32") not in made and (128, 16) not in {shape for shape, _ in made}


def test_keeps_the_inputs():
    """Float32 per layer: the norm's output that q, k and v share, those of o_proj, gate and up, down_proj."""
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    ours = residuals.bytes_per_token(*start(jp.lokr(2)), tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    assert ours - floor <= 3 * (32 + 32 + 32 + 56) * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lokr: rank 0 must be at least 1"),
        ({"rank_pattern": {"q_proj": -1}}, "lokr: rank -1 must be at least 1"),
        ({"factor": 0}, "lokr: factor 0 must be at least 1, or None for the square root"),
        ({"targets": ["q_prj"]}, "targets 'q_prj': matches no linear site; nearest: q_proj"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.lokr(**options), *tiny.model(), jax.random.key(0))
