"""DoRA: PEFT's numbers, norms without the sum of kernel and update, dropout, its place in a chain, what it keeps."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.memory import planner, targets
from jaxpeft.methods import dora
from jaxpeft.model import Context
from jaxpeft.models import geometries
from jaxpeft.peft import attach
from jaxpeft.quant import dot
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.peft import reference

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_outputs_and_gradients_are_those_of_peft(tmp_path):
    """Logits, and the gradients of A, B and the magnitudes, with every leaf away from its start."""
    base = reference.write_base(tmp_path / "llama")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    theirs = reference.make_peft(base, use_dora=True, **settings)
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.data = 1 + parameter.data
    model, trainable, rest = jp.setup(jp.dora(4, alpha=6), *reference.load(base), jax.random.key(0))
    ends = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "mag": "lora_magnitude_vector.default.weight"}
    parameters = dict(theirs.named_parameters())

    def of_torch(path, value):
        _, *modules, _, leaf = path.split("/")
        name = "base_model.model.model.layers.{}." + ".".join((*modules, ends[leaf]))
        return np.stack([value(parameters[name.format(layer)]).numpy().T for layer in range(2)])

    trainable = {path: jnp.asarray(of_torch(path, lambda p: p.data)) for path in trainable}
    weights = RNG.normal(size=(*reference.TOKENS.shape, 97)).astype(np.float32)

    @jax.jit
    def ours(trainable):
        logits = model.apply(jp.combine(trainable, rest), {"tokens": reference.TOKENS})
        return jnp.sum(logits * weights), logits

    gradients, logits = jax.jit(jax.grad(ours, has_aux=True))(trainable)
    expected = theirs(torch.tensor(reference.TOKENS).long()).logits
    (expected * torch.tensor(weights)).sum().backward()
    reference.assert_close(np.asarray(logits), expected.detach().numpy())
    for path, gradient in gradients.items():
        reference.assert_close(np.asarray(gradient), of_torch(path, lambda p: p.grad))
    assert np.abs(expected.detach().numpy() - reference.torch_logits(reference.torch_base(base))).max() > 0.1

    theirs.save_pretrained(tmp_path / "adapter")  # and so is the adapter as it is read
    read, adapted, method = attach(tmp_path / "adapter", *reference.load(base))
    assert (method.name, method.specs[0].config["rank"], method.specs[0].config["alpha"]) == ("dora", 4, 6)
    for path, leaf in {**rest, **trainable}.items():
        np.testing.assert_array_equal(tree.flatten(adapted)[path], leaf, err_msg=path)
    reference.assert_close(reference.logits(read, adapted), expected.detach().numpy())


@pytest.mark.parametrize("format", [None, "nf4"])
def test_norms_without_the_sum(format):
    """c of W + s A B, from products with r rows alone; no (n, m) array is made of a plain kernel."""
    kernel, a, b = normal(128, 24), normal(128, 4), normal(4, 24)
    held = kernel if format is None else quantize(kernel, format)
    dense = kernel if format is None else dequantize(held, jnp.float32)
    squares = dora.squared_norms(dense)
    found = dora.norms(held, a, b, squares, 1.5, jnp.float32)
    summed = np.asarray(dense, np.float64) + 1.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(found, np.linalg.norm(summed, axis=0), rtol=1e-5)
    if format is None:
        jaxpr = jax.make_jaxpr(lambda *leaves: dora.norms(*leaves, 1.5, jnp.float32))(held, a, b, squares)
        assert (128, 24) not in set(residuals.intermediates(jaxpr.jaxpr))


def test_an_output_without_weights_stays_at_zero():
    kernel = normal(6, 3).at[:, 1].set(0)
    params = {"layers": {"dense": {"kernel": kernel[None]}}}
    leaves = {"a": jnp.ones((1, 6, 2)), "b": jnp.zeros((1, 2, 3)), "mag": jnp.linalg.norm(kernel, axis=0)[None]}
    params["layers"]["dense"]["dora"] = {**leaves, "squares": leaves["mag"] ** 2}
    merged = jp.dora(2).merge(params)
    np.testing.assert_allclose(merged["layers"]["dense"]["kernel"][0], kernel, rtol=1e-6)
    assert np.all(np.isfinite(dora.norms(kernel, leaves["a"][0], leaves["b"][0], leaves["mag"][0] ** 2, 1.0, float)))


def test_dropout_is_on_all_of_the_directions():
    """PEFT: y = x W - x' W + (mag / c) (x' W + s x' A B), with x' the dropped input."""
    kernel, x = normal(4, 4), normal(50, 4)
    module = dora.DoRA(rank=4, scale=0.5, dropout=0.3)
    summed = kernel + 0.5 * jnp.eye(4)
    c = jnp.linalg.norm(summed, axis=0)
    leaves = {"a": jnp.eye(4), "b": jnp.eye(4), "squares": dora.squared_norms(kernel)}

    def y(mag, rngs):
        site, inner = sites.Site("layers/q_proj", kernel, None, True), lambda x: dot(x, kernel)
        return module.apply({"params": {**leaves, "mag": mag}}, inner, x, site, Context(), rngs=rngs)

    rngs = {"dropout": jax.random.key(3)}
    dropped = (y(c, rngs) - x @ kernel) / 0.5  # with mag = c all that is left of x' is s x' A B
    share = float(jnp.mean(jnp.abs(dropped) < 1e-5))
    assert 0.2 < share < 0.4
    kept = jnp.abs(dropped) >= 1e-5
    np.testing.assert_allclose(jnp.where(kept, dropped, 0), jnp.where(kept, x / 0.7, 0), rtol=1e-3, atol=1e-5)
    expected = (x - dropped) @ kernel + 2 * dropped @ summed
    np.testing.assert_allclose(y(2 * c, rngs), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(y(2 * c, None), 2 * x @ summed, rtol=1e-4, atol=1e-5)


def test_is_the_last_of_a_chain():
    """Its norms are the kernel's, so nothing may lie between."""
    base, params = tiny.model()
    for method, refused in ((jp.chain(jp.dora(2), jp.ia3()), True), (jp.chain(jp.ia3(), jp.dora(2)), False)):
        model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
        error = pytest.raises(jp.InputError, match="dora: must be nearest to the kernel")
        with error if refused else nullcontext():
            jax.eval_shape(model.apply, jp.combine(trainable, rest), tiny.batch())


def test_leaves_and_their_start():
    base, params = tiny.model()
    _, trainable, rest = jp.setup(jp.dora(4, targets=["k_proj"], rslora=True), base, params, jax.random.key(0))
    site = "layers/self_attn/k_proj"
    shapes = {f"{site}/dora/{leaf}": shape for leaf, shape in {"a": (32, 4), "b": (4, 16), "mag": (16,)}.items()}
    assert {path: leaf.shape[1:] for path, leaf in trainable.items()} == shapes
    np.testing.assert_allclose(
        trainable[f"{site}/dora/mag"], jnp.linalg.norm(rest[f"{site}/kernel"], axis=1), rtol=1e-6
    )
    assert dora.scale_at(jp.dora(4, alpha=6, rslora=True).specs[0].config, site) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "dora: rank 0 must be at least 1"),
        ({"init": "pissa"}, "dora: init 'pissa' is not one of"),
        ({"dropout": 1.0}, "dora: dropout 1.0 must be"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.dora(**options)


def test_matmuls_keep_one_array_more_than_lora():
    """down_proj's product, and c of every site and group of rows; A^T W is not computed again."""
    rows, length, layers, d, f, kv = 8, 64, 3, 32, 56, 16

    def cost(method):
        step = planner.make_step(tiny.CONFIG, method, rows, length, "matmuls", jnp.float32)
        return planner.cost(step)

    ours, lora = cost(jp.dora(4)), cost(jp.lora(4))
    norms = layers * 4 * (2 * d + 2 * kv + 2 * f + d)
    assert ours.activations - lora.activations == 4 * layers * rows * length * d + norms
    assert ours.recompute_flops == lora.recompute_flops


@pytest.mark.slow
def test_memory_of_a_step_of_llama_1b():
    """On an H200: kept beyond what LoRA keeps are down_proj's product, 0.25 GiB, and norms, 0.01 GiB with the state;
    beside it, of one layer at a time, gradients of products before their magnitudes: f + 2 d numbers per token.
    """
    config, found = geometries.load("llama3.2-1b"), {}
    for name, method, save in (
        ("lora", jp.lora(8), "matmuls"),
        ("dora", jp.dora(8), "matmuls"),
        ("again", jp.dora(8), "matmuls,down_proj_product=recompute"),
    ):
        step = planner.make_step(config, method, 4, 1024, save)
        found[name] = planner.row(step, targets.target("h200"))["bytes"]
    more = {name: {part: found[name][part] - found["lora"][part] for part in found["lora"]} for name in found}
    kept = {name: more[name]["total"] - more[name]["workspace"] for name in more}
    assert kept["dora"] <= 0.26 * 2**30
    assert kept["again"] <= 0.02 * 2**30
    one_layer = 4 * 1024 * (config["intermediate_size"] + 2 * config["hidden_size"]) * 2
    assert max(more[name]["workspace"] for name in ("dora", "again")) <= one_layer


@pytest.mark.parametrize("method", [jp.dora(2, alpha=1e38), jp.lora_fa(2, alpha=1e38)])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_step_is_made_with_the_largest_scale(method):
    """Its square is above float32's numbers."""
    model, trainable, rest = jp.setup(method, *tiny.model(), jax.random.key(0))
    optimizer = optax.sgd(0.0)
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    _, metrics = jax.jit(jp.make_train_step(model, method, optimizer))(state, tiny.batch())
    assert np.isfinite(metrics["loss"])
