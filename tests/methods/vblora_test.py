"""VB-LoRA: PEFT's numbers, the top k alone, one bank for all sites, packed kernels, the rates, what is refused."""

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
from jaxpeft.methods import vblora
from jaxpeft.model import Context
from jaxpeft.peft import attach, export_adapter, import_adapter
from jaxpeft.quant import dot
from jaxpeft.train.optimizer import make_direction
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.modules import X, moved
from tests.peft import reference

RNG = np.random.default_rng(0)
NAMES = ["q_proj", "k_proj", "down_proj"]  # 32 x 32, 32 x 16, 56 x 32
SITES = ("layers/self_attn/q_proj", "layers/self_attn/k_proj", "layers/mlp/down_proj")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def of_peft(base, **settings):
    """PEFT's model with a large bank and distinct logits, and its parameters by name."""
    sizes = {"r": 3, "num_vectors": 12, "vector_length": 8, "topk": 3, "target_modules": NAMES}
    torch.manual_seed(1)
    config = peft.VBLoRAConfig(
        task_type="CAUSAL_LM", init_vector_bank_bound=0.5, init_logits_std=1.0, **{**sizes, **settings}
    )
    model = peft.get_peft_model(reference.torch_base(base), config).eval()
    return model, dict(model.named_parameters())


def test_outputs_gradients_merged_weights_and_adapters_are_those_of_peft(llama, tmp_path):
    method = jp.vblora(3, 12, 8, 3, sorted(NAMES), bound=0.5, std=1.0)
    theirs, parameters = of_peft(llama)
    base, params = reference.load(llama)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    logits = {f"{site}/vblora/logits_{name}" for site in SITES for name in "ab"}
    assert trainable.keys() == {*logits, "vblora/bank"}
    assert trainable["layers/mlp/down_proj/vblora/logits_a"].shape == (2, 3, 7, 12)
    assert trainable["layers/mlp/down_proj/vblora/logits_b"].shape == (2, 4, 3, 12)

    def of_torch(path, value):
        if path == "vblora/bank":
            return value(theirs.base_model.vblora_vector_bank["default"]).numpy()
        module, leaf = path.split("/vblora/")
        leaf = f"{leaf[:-1]}{leaf[-1].upper()}"
        name = f"base_model.model.{module.replace('/', '.').replace('layers', 'model.layers.{}')}.vblora_{leaf}.default"
        return np.stack([value(parameters[name.format(layer)]).numpy() for layer in range(2)])

    read, _, _ = reference.assert_same_as_peft(theirs, llama, method, model, trainable, rest, of_torch, tmp_path)
    assert read.specs == method.specs


@pytest.mark.parametrize("topk", [1, 2])
def test_an_adapter_of_the_top_k_alone(topk, llama, tmp_path):
    """PEFT's is read, and PEFT reads ours; it trains on, with the vectors that it has."""
    theirs, _ = of_peft(llama, save_only_topk_weights=True, topk=topk, vblora_dropout=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, base = reference.torch_logits(theirs), reference.load(llama)
    model, adapted, method = attach(tmp_path / "theirs", *base)
    assert method.specs[0].config["only_topk"] and method.specs[0].config["dropout"] == 0.1
    reference.assert_close(reference.logits(model, adapted), expected)
    export_adapter(tmp_path / "ours", adapted, method, model.config, llama)
    reference.assert_close(reference.with_adapter(llama, tmp_path / "ours"), expected)
    ours, written = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {name: (x.shape, x.dtype) for name, x in ours.items()} == {n: (x.shape, x.dtype) for n, x in written.items()}
    again, leaves, _ = attach(tmp_path / "ours", *base)
    reference.assert_close(reference.logits(again, leaves), expected)

    flat = {path: leaf for path, leaf in tree.flatten(adapted).items() if "vblora" in path}
    rest = {path: leaf for path, leaf in tree.flatten(adapted).items() if path not in flat}
    loss = lambda own: jnp.sum(jnp.square(model.apply(tree.combine(own, rest), {"tokens": reference.TOKENS})))
    gradients = jax.grad(loss)(flat)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert np.abs(gradients["vblora/bank"]).max() > 0


def test_what_is_no_adapter_of_this_base(llama, tmp_path):
    of_peft(llama)[0].save_pretrained(tmp_path)
    config, file = json.loads((tmp_path / "adapter_config.json").read_text()), tmp_path / "adapter_model.safetensors"
    tensors, base = load_file(file), reference.load(llama)[0]
    first = "base_model.model.model.layers.0.mlp.down_proj.vblora_logits"
    zeros = lambda *shape: np.zeros(shape, np.float32)

    def refused(match, fields=config, **changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        save_file({name: x for name, x in {**tensors, **changes}.items() if x is not None}, file)
        with pytest.raises(jp.InputError, match=match):
            import_adapter(tmp_path, base.config)

    refused("bias 'vblora_only' is not supported", {**config, "bias": "vblora_only"})
    refused("topk 13 should be at most 12", {**config, "topk": 13})
    refused("r 4 should be 3", {**config, "r": 4})
    refused("has 0 tensors base_model.vblora_vector_bank; expected one", **{"base_model.vblora_vector_bank": None})
    refused(r"has shape \(12,\); expected vectors", **{"base_model.vblora_vector_bank": zeros(12)})
    needed = r"logits_A has shape \(3, 7, 12\); a 56 x 32 kernel, the rank 3 of .* bank of 12 x 4 need \(3, 14, 12\)"
    refused(needed, **{"base_model.vblora_vector_bank": zeros(12, 4)})
    refused("a bank of 12 x 5 need", **{"base_model.vblora_vector_bank": zeros(12, 5)})
    refused("0.mlp.down_proj has no adapter, and .*1.mlp", **{f"{first}_A": None, f"{first}_B": None})
    pair = {f"{first}_A": None, f"{first}_A_topk_indices": np.full((3, 7, 2), 12, np.uint8)}
    refused("_A has no topk_indices and topk_weights that are one fewer", **pair)
    refused("_A_topk_indices holds 12; the bank has 12", **{**pair, f"{first}_A_topk_weights": zeros(3, 7, 1)})


def test_on_a_packed_kernel_in_bfloat16():
    """Values and gradients of the unpacked kernel, of the bank too; the stream is not widened; dropout is of inputs."""
    kernel = quantize(jnp.asarray(RNG.normal(size=(128, 16)), jnp.float32), "int8")
    plain, x = dequantize(kernel, jnp.float32), jnp.asarray(RNG.normal(size=(3, 128)), jnp.bfloat16)
    normal = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    own = {"logits_a": normal(5, 16, 9), "logits_b": normal(2, 5, 9), "bank": normal(9, 8)}

    def y(own, x, kernel, **rngs):
        site, ctx = sites.Site("layers/v_proj", kernel, None, True), Context(shared={"vblora": {"bank": own["bank"]}})
        leaves = {name: leaf for name, leaf in own.items() if name != "bank"}
        module = vblora.VBLoRA(5, 9, 8, 2, dropout=0.5)
        return module.apply({"params": leaves}, lambda x: dot(x, kernel), x, site, ctx, **rngs)

    def loss(own, x, kernel):
        return jnp.sum(jnp.square(y(own, x, kernel).astype(jnp.float32)))

    assert y(own, x, kernel).dtype == jnp.bfloat16
    found, wanted = jax.grad(loss)(own, x, kernel), jax.grad(loss)(own, x.astype(jnp.float32), plain)
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, atol=0.03 * np.abs(leaf).max())
    jaxpr = jax.make_jaxpr(lambda x: y(own, x, plain.astype(jnp.bfloat16)))(x)
    shapes = {(v.aval.shape, v.aval.dtype.name) for e in residuals.equations(jaxpr.jaxpr) for v in e.outvars}
    assert ((3, 128), "float32") not in shapes and ((3, 16), "float32") not in shapes

    ones, nothing = jnp.ones((4000, 128)), jnp.zeros((128, 16))
    whole, dropped = y(own, ones, nothing), y(own, ones, nothing, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - whole).max() > 0.1
    np.testing.assert_allclose(dropped.mean(0), whole[0], atol=0.1 * np.abs(whole[0]).max() + 0.5)


def test_a_mixture_is_of_the_largest_logits():
    bank, logits = RNG.normal(size=(9, 4)), RNG.normal(size=(2, 3, 9))
    found = vblora.mixed(jnp.asarray(bank), jnp.asarray(logits), 2)
    for place in np.ndindex(2, 3):
        first, second = np.argsort(-logits[place])[:2]
        weight = 1 / (1 + np.exp(logits[place][second] - logits[place][first]))
        np.testing.assert_allclose(found[place], weight * bank[first] + (1 - weight) * bank[second], rtol=1e-5)


@pytest.mark.slow
def test_logits_move_faster_than_the_bank():
    """The first step of Adam is the rate."""
    method = jp.vblora(2, 12, 8, lr_ratio=4.0)
    model, trainable, rest = jp.setup(method, *tiny.model(), jax.random.key(0))
    optimizer = make_direction("adam")
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    after, _ = jax.jit(jp.make_train_step(model, method, optimizer, rate=1e-3))(state, tiny.batch())
    change = {path: float(np.abs(after.trainable[path] - leaf).max()) for path, leaf in trainable.items()}
    assert change.pop("vblora/bank") == pytest.approx(1e-3, rel=1e-2)
    assert max(change.values()) == pytest.approx(4e-3, rel=1e-2)


class Graph(nnx.Module):
    """A few maps."""

    def __init__(self, rngs):
        self.up, self.out = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.up(x)))


def test_in_modules_without_visible_layers(tmp_path):
    base, params = jp.from_nnx(Graph(nnx.Rngs(0)))
    method = jp.vblora(3, 6, 4, targets=".*")
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    trained = jp.combine(moved(trainable), rest)
    expected = model.apply(trained, {"x": X})
    assert np.abs(expected - base.apply(params, {"x": X})).max() > 0.1
    np.testing.assert_allclose(base.apply(method.merge(trained), {"x": X}), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(jp.InputError, match="vblora: its vectors are beside the module, which cannot run alone"):
        jp.to_nnx(model, trained)(X)
    export_adapter(tmp_path / "adapter", trained, method, model)
    again, leaves, _ = attach(tmp_path / "adapter", base, params)
    np.testing.assert_array_equal(again.apply(leaves, {"x": X}), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "vblora: rank 0 must be at least 1"),
        ({"rank": 17}, "vblora: rank 17 is above the smaller side of layers/self_attn/k_proj, a kernel of 32 x 16"),
        ({"length": 0}, "vblora: length 0 must be at least 1"),
        ({"length": 16}, "length 16 does not divide the sides of .*, a kernel of 56 x 32; 8 and its divisors divide"),
        ({"topk": 0}, "vblora: topk 0 must be at least 1 and at most the bank's 12 vectors"),
        ({"topk": 13}, "vblora: topk 13 must be at least 1 and at most the bank's 12 vectors"),
        ({"bound": 0.0}, "vblora: bound 0.0 must be a finite number above 0"),
        ({"std": -1.0}, "vblora: std -1.0 must be a finite number above 0"),
        ({"lr_ratio": float("inf")}, "vblora: lr_ratio inf must be a finite number above 0"),
        ({"dropout": 1.0}, "vblora: dropout 1.0 must be at least 0 and below 1"),
        ({"targets": ["q_prj"]}, re.escape("targets 'q_prj': matches no linear site; nearest: q_proj")),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.vblora(**{"rank": 2, "vectors": 12, "length": 8, **options}), *tiny.model(), jax.random.key(0))
