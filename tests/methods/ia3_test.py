"""(IA)^3: PEFT's numbers where there are biases, what is merged, what is kept, which side is scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.memory import planner
from jaxpeft.methods import ia3
from jaxpeft.model import Context
from jaxpeft.peft import attach
from jaxpeft.quant import dot
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.peft import reference

LEAVES = {"self_attn/k_proj": "out", "self_attn/v_proj": "out", "mlp/down_proj": "in"}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """(folder, Model, params): a family with biases on keys and values, here not zero."""
    folder = reference.write_base(tmp_path_factory.mktemp("base") / "qwen2", "qwen2")
    torch_model = reference.torch_base(folder)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in torch_model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    torch_model.save_pretrained(folder)
    return folder, *reference.load(folder)


def test_outputs_gradients_and_merged_biases_are_those_of_peft(qwen2, tmp_path):
    folder, base, params = qwen2
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    theirs = peft.get_peft_model(reference.torch_base(folder), config).eval()
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in theirs.named_parameters() if "ia3_l" in name}
    for parameter in parameters.values():
        parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    method = jp.ia3()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert trainable.keys() == {f"layers/{site}/ia3/{leaf}" for site, leaf in LEAVES.items()}

    def of_torch(path, value):
        name = "base_model.model.model.layers.{}." + ".".join(path.split("/")[1:3]) + ".ia3_l.default"
        return np.stack([value(parameters[name.format(layer)]).numpy().reshape(-1) for layer in range(2)])

    trainable = {path: jnp.asarray(of_torch(path, lambda p: p.data)) for path in trainable}
    weights = np.random.default_rng(0).normal(size=(*reference.TOKENS.shape, 97)).astype(np.float32)

    def ours(trainable):
        logits = model.apply(jp.combine(trainable, rest), {"tokens": reference.TOKENS})
        return jnp.sum(logits * weights), logits

    gradients, logits = jax.jit(jax.grad(ours, has_aux=True))(trainable)
    expected = theirs(torch.tensor(reference.TOKENS).long()).logits
    (expected * torch.tensor(weights)).sum().backward()
    expected = expected.detach().numpy()
    reference.assert_close(np.asarray(logits), expected)
    for path, gradient in gradients.items():
        reference.assert_close(np.asarray(gradient), of_torch(path, lambda p: p.grad))
    assert np.abs(expected - reference.torch_logits(reference.torch_base(folder))).max() > 0.1
    merged = method.merge(jp.combine(trainable, rest))
    reference.assert_close(reference.logits(base, merged), expected)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()

    theirs.save_pretrained(tmp_path / "adapter")
    _, adapted, read = attach(tmp_path / "adapter", base, params)
    assert read.name == "ia3" and read.specs[0].config["feedforward"] == ["down_proj"]
    for path, leaf in trainable.items():
        np.testing.assert_array_equal(tree.flatten(adapted)[path], leaf, err_msg=path)


def test_keeps_what_the_vectors_scale_and_no_more():
    """Keys and values before the vector, and the MLP's product, beside what the frozen backbone keeps."""
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    ours = residuals.bytes_per_token(*start(jp.ia3()), tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    assert ours - floor <= 3 * (16 + 16 + 56) * 4


def test_matmuls_keep_nothing_for_it():
    """x, q, k, v, attention and its log-sum-exp, one array after attention, gate, up: what any backward pass needs."""
    rows, length, layers, d, f, kv, heads = 8, 64, 3, 32, 56, 16, 4
    step = planner.make_step(tiny.CONFIG, jp.ia3(), rows, length, "matmuls", jnp.float32)
    cost = planner.cost(step)
    assert cost.activations == layers * rows * length * 4 * (d + d + 2 * kv + d + d + 2 * f + heads)


@pytest.mark.parametrize("feedforward", [True, False])
def test_on_a_packed_kernel(feedforward):
    """Values and the vector's gradient are those of the unpacked kernel."""
    rng = np.random.default_rng(0)
    kernel = quantize(jnp.asarray(rng.normal(size=(128, 16)), jnp.float32), "int8")
    plain, x = dequantize(kernel, jnp.float32), jnp.asarray(rng.normal(size=(3, 128)), jnp.float32)
    vector = jnp.asarray(rng.normal(size=128 if feedforward else 16), jnp.float32)
    module, leaf = ia3.IA3(feedforward), "in" if feedforward else "out"

    def of(vector, kernel):
        inner, site = lambda x: dot(x, kernel), sites.Site("layers/v_proj", kernel, None, True)
        return jnp.sum(module.apply({"params": {leaf: vector}}, inner, x, site, Context()) ** 2)

    expected = lambda vector: jnp.sum(((x * vector) @ plain if feedforward else (x @ plain) * vector) ** 2)
    for found, wanted in zip(
        *(jax.value_and_grad(f)(vector) for f in (lambda v: of(v, kernel), expected)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-2)


def test_which_side_is_scaled():
    method = jp.ia3(targets="all-linear", feedforward="o_proj,mlp.down_proj")
    _, trainable, _ = jp.setup(method, *tiny.model(), jax.random.key(0))
    ends = {path.split("/ia3/")[0].rsplit("/", 1)[1] for path in trainable if path.endswith("/in")}
    assert ends == {"o_proj", "down_proj"}
    assert len(trainable) == 7


def test_refuses_a_name_with_which_no_target_ends():
    with pytest.raises(jp.InputError, match="ia3: feedforward 'fc2': no target ends with it; nearest"):
        jp.setup(jp.ia3(feedforward=["fc2"]), *tiny.model(), jax.random.key(0))
