"""RandLoRA: PEFT's numbers, its generator's too, both orders of the bases, the rank, what is kept, packed kernels."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.methods import randlora
from jaxpeft.model import Context
from jaxpeft.peft import attach, export_adapter, import_adapter
from jaxpeft.quant import dot
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.modules import X, moved
from tests.peft import reference

RNG = np.random.default_rng(0)
# 32 x 32 and 32 x 16, fewer outputs than the 42 tokens; 32 x 56 and 32 x 97, more; 56 x 32, more inputs than outputs.
NAMES = ["q_proj", "k_proj", "up_proj", "down_proj", "lm_head"]
RANK = 5  # divides none of them


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def of_peft(base, **settings):
    """PEFT's model with random scalings, and its parameters by name."""
    config = peft.RandLoraConfig(
        task_type="CAUSAL_LM", **{"r": RANK, "randlora_alpha": 12, "target_modules": NAMES, **settings}
    )
    model = peft.get_peft_model(reference.torch_base(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in model.named_parameters() if "randlora_" in name}
    for parameter in parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, parameters


def test_outputs_gradients_merged_weights_and_adapters_are_those_of_peft(llama, tmp_path):
    method = jp.randlora(RANK, 12.0, sorted(NAMES))
    theirs, parameters = of_peft(llama)
    base, params = reference.load(llama)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert len(trainable) == 2 * len(NAMES) and len(parameters) == 2 * (2 * 4 + 1)
    assert (rest["randlora/a"].shape, rest["randlora/b"].shape) == ((32, RANK), (97, 35))

    def of_torch(path, value):
        module, leaf = path.split("/randlora/")
        name = f"base_model.model.{module.replace('/', '.').replace('layers', 'model.layers.{}')}"
        rows = [value(parameters[f"{name}.randlora_{leaf}.default".format(layer)]).numpy().T for layer in range(2)]
        return np.stack(rows) if "{}" in name else rows[0]

    for path, leaf in trainable.items():  # PEFT's start
        start = 0.0 if path.endswith("lambda") else 1 / leaf.shape[-2]
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, start, np.float32))
    a, b = (getattr(theirs, f"randlora_{name}")["default"].numpy() for name in "AB")
    assert (a.shape, b.shape) == ((RANK, 1, 56), (97, 12, RANK))  # more than any kernel reads
    bases = {"randlora/a": a[:, 0, :32].T, "randlora/b": b[:, :7].reshape(97, 35)}
    rest |= {path: jnp.asarray(leaf).astype(jnp.bfloat16) for path, leaf in bases.items()}
    for path, leaf in bases.items():
        np.testing.assert_array_equal(rest[path].astype(jnp.float32), leaf)  # which loses nothing
    read, _, merged = reference.assert_same_as_peft(theirs, llama, method, model, trainable, rest, of_torch, tmp_path)
    assert read.specs == method.specs
    before, after = (tree.flatten(which)["layers/mlp/down_proj/kernel"] for which in (params, merged))
    assert (np.linalg.matrix_rank(after - before) == 32).all()


@pytest.mark.parametrize("bases", randlora.BASES)
def test_an_adapter_that_names_the_key_of_its_bases_alone(bases, llama, tmp_path):
    """They are those that PEFT draws; layers without scalings are as they were."""
    own = {} if bases == "uniform" else {bases: True}
    theirs, _ = of_peft(
        llama, save_projection=False, projection_prng_key=7, layers_to_transform=[1], randlora_dropout=0.2, **own
    )
    theirs.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "randlora_A" in name]
    model, adapted, method = attach(tmp_path, *reference.load(llama))
    for name, own in (("A", "a"), ("B", "b")):
        x = np.asarray(adapted["randlora"][own], np.float32)
        drawn = getattr(theirs, f"randlora_{name}")["default"].numpy()
        np.testing.assert_allclose(x, drawn[:, 0, :32].T if own == "a" else drawn[:, :7].reshape(x.shape), rtol=1e-6)
    reference.assert_close(reference.logits(model, adapted), reference.torch_logits(theirs))
    config = method.specs[0].config
    assert (config["dropout"], config["alpha"], config["bases"]) == (0.2, 12.0, bases)


def test_what_is_no_adapter_of_this_base(llama, tmp_path):
    of_peft(llama)[0].save_pretrained(tmp_path)
    config, file = json.loads((tmp_path / "adapter_config.json").read_text()), tmp_path / "adapter_model.safetensors"
    tensors, base = load_file(file), reference.load(llama)[0]
    first = "base_model.model.model.layers.0.mlp.down_proj.randlora"

    def refused(match, fields=config, **changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        save_file({name: x for name, x in {**tensors, **changes}.items() if x is not None}, file)
        with pytest.raises(jp.InputError, match=match):
            import_adapter(tmp_path, base.config)

    zeros = lambda *shape: np.zeros(shape, np.float32)
    shared = {"base_model.randlora_A": None, "base_model.randlora_B": None}
    refused("bias 'all' is not supported", {**config, "bias": "all"})
    refused("r 4 should be 5, the rank of the tensors", {**config, "r": 4})
    refused("save_projection is true, and the adapter has no randlora_A and randlora_B", **shared)
    refused("has base_model.randlora_B; expected one randlora_A and one", **{"base_model.randlora_A": None})
    refused(r"randlora_lambda has shape \(6, 4\); a \d+ x \d+ kernel at the rank", **{f"{first}_lambda": zeros(6, 4)})
    narrow = {f"base_model.model.model.layers.{i}.mlp.down_proj.randlora_gamma": zeros(7, 31) for i in range(2)}
    refused(r"down_proj.randlora_gamma has shape \(7, 31\); a 56 x 32 kernel .* needs \(7, 32\)", **narrow)
    for name, shape, needed in (
        ("A", (5, 1, 55), (5, 1, 56)),
        ("A", (4, 1, 56), (5, 1, 56)),
        ("A", (5, 56), (5, 1, 56)),
        ("B", (96, 12, 5), (97, 12, 5)),
        ("B", (97, 11, 5), (97, 12, 5)),
        ("B", (97, 12, 6), (97, 12, 5)),
    ):
        match = f"another base: randlora_{name} has shape {shape}; its kernels need {needed}"
        refused(re.escape(match), **{f"base_model.randlora_{name}": zeros(*shape)})


@pytest.mark.parametrize(("n", "m", "tokens"), [(128, 16, 3), (64, 128, 3), (64, 32, 40), (64, 64, 70)])
def test_on_a_packed_kernel_in_bfloat16(n, m, tokens):
    """Values and gradients of the unpacked kernel; the stream is not widened; dropout is of the inputs."""
    kernel = quantize(jnp.asarray(RNG.normal(size=(n, m)), jnp.float32), "int8")
    plain, x = dequantize(kernel, jnp.float32), jnp.asarray(RNG.normal(size=(tokens, n)), jnp.bfloat16)
    least, copies = min(n, m), -(-min(n, m) // 6)
    own = {"lambda": jnp.asarray(RNG.normal(size=(copies, 6)), jnp.float32), "gamma": jnp.ones((least, copies)) / least}
    shared = {"a": RNG.normal(size=(70, 6)), "b": RNG.normal(size=(130, 6 * 12))}
    ctx = Context(shared={"randlora": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), shared)})

    def y(own, x, kernel, **rngs):
        site, module = sites.Site("layers/v_proj", kernel, None, True), randlora.RandLoRA(6, 1.0, 0.5)
        return module.apply({"params": own}, lambda x: dot(x, kernel), x, site, ctx, **rngs)

    def loss(own, x, kernel):
        return jnp.sum(jnp.square(y(own, x, kernel).astype(jnp.float32)))

    assert y(own, x, kernel).dtype == jnp.bfloat16
    found, wanted = jax.grad(loss)(own, x, kernel), jax.grad(loss)(own, x.astype(jnp.float32), plain)
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, atol=0.03 * np.abs(leaf).max())
    jaxpr = jax.make_jaxpr(lambda x: y(own, x, plain.astype(jnp.bfloat16)))(x)
    shapes = {(v.aval.shape, v.aval.dtype.name) for e in residuals.equations(jaxpr.jaxpr) for v in e.outvars}
    assert not {((tokens, size), "float32") for size in (n, m)} & shapes

    key = {"dropout": jax.random.key(0)}
    ones, nothing = jnp.ones((4000, n)), jnp.zeros((n, m))
    whole, dropped = y(own, ones, nothing), y(own, ones, nothing, rngs=key)
    assert np.abs(dropped - whole).max() > 0.1
    np.testing.assert_allclose(dropped.mean(0), whole[0], atol=0.1 * np.abs(whole[0]).max() + 0.1)


def test_keeps_the_narrower_side_of_the_bases():
    """Per token x where the update reads it, x B where it has fewer outputs; no scaled bases, which are made again."""
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    for names, numbers in (("up_proj", 32), ("down_proj", 35), ("k_proj", 20)):
        model, trainable, rest = start(jp.randlora(RANK, targets=[names]))
        ours = residuals.bytes_per_token(model, trainable, rest, tiny.batch)
        assert ours - floor <= 3 * 4 * numbers
        kept = [leaf.shape for leaf in residuals.saved(model, trainable, rest, tiny.batch(rows=2))]
        assert not [shape for shape in kept if shape[-2:] in ((32, 35), (16, 20)) and len(shape) == 3]


def test_bases_have_a_standard_deviation_of_one_and_their_share_of_zeros():
    shares = {"uniform": 0, "sparse": 2 / 3, "very_sparse": 1 - 1 / 8}
    for bases, share in shares.items():
        x = np.asarray(randlora._random(jax.random.key(0), (64, 400), bases, 64), np.float32)
        assert abs(x.std() - 1) < 0.03 and abs(x.mean()) < 0.02
        assert abs((x == 0).mean() - share) < 0.02 and (bases == "uniform" or len(np.unique(x)) == 3)


class Graph(nnx.Module):
    """A few maps."""

    def __init__(self, rngs):
        self.up, self.out = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.up(x)))


def test_in_modules_without_visible_layers(tmp_path):
    base, params = jp.from_nnx(Graph(nnx.Rngs(0)))
    method = jp.randlora(3, targets=".*")
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert (rest["randlora/a"].shape, rest["randlora/b"].shape) == ((8, 3), (12, 9))
    trained = jp.combine(moved(trainable), rest)
    expected = model.apply(trained, {"x": X})
    assert np.abs(expected - base.apply(params, {"x": X})).max() > 0.1
    np.testing.assert_allclose(base.apply(method.merge(trained), {"x": X}), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(jp.InputError, match="randlora: its bases are beside the module, which cannot run alone"):
        jp.to_nnx(model, trained)(X)
    export_adapter(tmp_path / "adapter", trained, method, model)
    again, leaves, _ = attach(tmp_path / "adapter", base, params)
    np.testing.assert_array_equal(again.apply(leaves, {"x": X}), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "randlora: rank 0 must be at least 1"),
        ({"bases": "dense"}, "randlora: bases 'dense' should be one of uniform, sparse, very_sparse"),
        ({"dropout": 1.0}, "randlora: dropout 1.0 must be at least 0 and below 1"),
        ({"targets": ["q_prj"]}, "targets 'q_prj': matches no linear site; nearest: q_proj"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.randlora(**options), *tiny.model(), jax.random.key(0))
