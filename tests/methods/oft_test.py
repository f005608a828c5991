"""OFT: PEFT's numbers in both forms, block sizes as PEFT takes them, orthogonality, packed kernels, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import sites
from jaxpeft.methods import oft
from jaxpeft.model import Context
from jaxpeft.peft import attach, export_adapter, import_adapter
from jaxpeft.quant import dot
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.peft import reference

RNG = np.random.default_rng(0)
NAMES = ["q_proj", "o_proj", "down_proj"]
LEAVES = {f"layers/{site}/oft/w" for site in ("self_attn/q_proj", "self_attn/o_proj", "mlp/down_proj")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def of_peft(base, **settings):
    """PEFT's model with random rotations, and its parameters by name."""
    config = peft.OFTConfig(task_type="CAUSAL_LM", target_modules=NAMES, **settings)
    model = peft.get_peft_model(reference.torch_base(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in model.named_parameters() if "oft_R" in name}
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, parameters


@pytest.mark.parametrize(
    ("settings", "method", "shape"),
    [
        ({"oft_block_size": 8}, jp.oft(8, NAMES), (4, 28)),
        (
            {"oft_block_size": 8, "use_cayley_neumann": False, "block_share": True},
            jp.oft(8, NAMES, exact=True, share=True),
            (1, 28),
        ),
        # PEFT takes blocks of 28 for the 56 inputs of down_proj, which 32 does not divide.
        (
            {"oft_block_size": 32, "num_cayley_neumann_terms": 7},
            jp.oft(32, NAMES, terms=7, block_pattern={"down_proj": 28}),
            (1, 496),
        ),
        ({"r": 4, "oft_block_size": 0}, jp.oft(8, NAMES, block_pattern={"down_proj": 14}), (4, 28)),
    ],
    ids=["series", "exact and shared", "adjusted", "number of blocks"],
)
def test_outputs_gradients_merged_weights_and_adapters_are_those_of_peft(settings, method, shape, llama, tmp_path):
    theirs, parameters = of_peft(llama, **settings)
    base, params = reference.load(llama)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert trainable.keys() == LEAVES and trainable["layers/self_attn/q_proj/oft/w"].shape == (2, *shape)

    def of_torch(path, value):
        name = "base_model.model.model.layers.{}." + ".".join(path.split("/")[1:3]) + ".oft_R.default.weight"
        return np.stack([value(parameters[name.format(layer)]).numpy() for layer in range(2)])

    read, _, _ = reference.assert_same_as_peft(theirs, llama, method, model, trainable, rest, of_torch, tmp_path)
    for field in ("block_size", "terms", "exact", "share"):
        assert read.specs[0].config[field] == method.specs[0].config[field], field


def test_layers_without_an_adapter_are_not_rotated(llama, tmp_path):
    theirs, _ = of_peft(llama, oft_block_size=8, layers_to_transform=[1])
    theirs.save_pretrained(tmp_path)
    model, adapted, _ = attach(tmp_path, *reference.load(llama))
    reference.assert_close(reference.logits(model, adapted), reference.torch_logits(theirs))


def test_what_pefts_form_cannot_say(llama, tmp_path):
    base, params = reference.load(llama)
    method = jp.oft(4, NAMES, block_pattern={"q_proj": 16})
    _, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    with pytest.raises(jp.InputError, match=r"oft: PEFT has one block size .* sizes \[4, 16\]"):
        export_adapter(tmp_path / "ours", jp.combine(trainable, rest), method, base.config, llama)
    of_peft(llama, oft_block_size=8, coft=True)[0].save_pretrained(tmp_path / "constrained")
    with pytest.raises(jp.InputError, match="coft True is not supported"):
        import_adapter(tmp_path / "constrained", base.config)
    of_peft(llama, oft_block_size=8)[0].save_pretrained(tmp_path / "theirs")
    wider = reference.load(reference.write_base(tmp_path / "wider", hidden_size=64))[0]
    with pytest.raises(jp.InputError, match=r"another base: \S+oft_R.weight has shape \(4, 28\), .* n = 64 inputs"):
        import_adapter(tmp_path / "theirs", wider.config)


def test_rotations_are_orthogonal():
    """The exact form to rounding; the series up to the first power of Q that it lacks."""
    w = jnp.asarray(0.02 * RNG.normal(size=(3, 28)), jnp.float32)
    q = np.asarray(oft.skew(w), np.float64)
    np.testing.assert_array_equal(q, -q.swapaxes(1, 2))
    np.testing.assert_array_equal(q[:, *np.triu_indices(8, 1)], w)
    eye = np.eye(8)
    exact = oft.rotations(w, 5, True)
    np.testing.assert_allclose(exact, (eye - q) @ np.linalg.inv(eye + q), atol=1e-6)
    np.testing.assert_allclose(exact @ exact.mT, np.broadcast_to(eye, (3, 8, 8)), atol=1e-6)
    np.testing.assert_allclose(oft.rotations(w, 8, False), (eye + q) @ np.linalg.inv(eye - q), atol=1e-6)
    four = eye + 2 * q + 2 * q @ q + q @ q @ q
    np.testing.assert_allclose(oft.rotations(w, 4, False), four, atol=1e-6)


def test_on_a_packed_kernel_in_bfloat16():
    """Values and gradient of the unpacked kernel; the stream is not widened."""
    kernel = quantize(jnp.asarray(RNG.normal(size=(128, 16)), jnp.float32), "int8")
    plain, x = dequantize(kernel, jnp.float32), jnp.asarray(RNG.normal(size=(3, 128)), jnp.bfloat16)
    w = jnp.asarray(0.1 * RNG.normal(size=(16, 28)), jnp.float32)

    def y(w, x, kernel):
        site = sites.Site("layers/v_proj", kernel, None, True)
        return oft.OFT(8).apply({"params": {"w": w}}, lambda x: dot(x, kernel), x, site, Context())

    def loss(w, x, kernel):
        return jnp.sum(jnp.square(y(w, x, kernel).astype(jnp.float32)))

    found, wanted = jax.grad(loss)(w, x, kernel), jax.grad(loss)(w, x.astype(jnp.float32), plain)
    np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())
    jaxpr = jax.make_jaxpr(lambda x: y(w, x, plain.astype(jnp.bfloat16)))(x)
    shapes = {(v.aval.shape, v.aval.dtype.name) for e in residuals.equations(jaxpr.jaxpr) for v in e.outvars}
    assert ((3, 128), "float32") not in shapes and ((3, 16, 8), "float32") not in shapes


def test_keeps_the_inputs():
    """Float32 per layer: the norm's output that q, k and v share, those of o_proj, gate and up, down_proj."""
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    ours = residuals.bytes_per_token(*start(jp.oft(8)), tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    assert ours - floor <= 3 * (32 + 32 + 32 + 56) * 4


def test_what_a_refusal_advises_is_taken():
    for options in ({"block_size": 8}, {"block_size": 16, "block_pattern": {"down_proj": 14}}):
        jp.setup(jp.oft(**options), *tiny.model(), jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "oft: block_size 1 must be at least 2"),
        ({"terms": 3}, "oft: terms 3 must be at least 4"),
        (
            {"block_size": 16},
            "oft: block_size 16 does not divide the 56 inputs of layers/mlp/down_proj, .*; 8 and",
        ),
        ({"block_size": 16}, r"divide those of all, and block_pattern \{down_proj: 14\} is for this one alone"),
        ({"block_size": 8, "block_pattern": {"q_proj": 0}}, "oft: block_size 0 must be at least 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.oft(**options), *tiny.model(), jax.random.key(0))
