"""GPTQ's and AWQ's checkpoints: read bit by bit, trained beside, planned, merged; each mistake gets its line.

What is written here follows the formats number by number; what it is worth is computed from the codes themselves.
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import hf, tree
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.cli import export, merge
from jaxpeft.gguf import Stored
from jaxpeft.hf import quantized
from jaxpeft.memory import planner
from jaxpeft.models.quantized import Scheme, scheme_of
from jaxpeft.quant import Affine, dense, is_packed
from jaxpeft.train import begin
from jaxpeft.train import prepare as preparing
from tests import runs, virtual

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def in_words(codes, bits):
    """(k, m) codes -> (k bits / 32, m) int32: each column one long binary number, cut into words."""
    k, m = codes.shape
    out = np.zeros((k * bits // 32, m), np.uint32)
    for j in range(m):
        number = sum(int(code) << bits * i for i, code in enumerate(codes[:, j]))
        out[:, j] = [(number >> 32 * row) & 0xFFFFFFFF for row in range(len(out))]
    return out.view(np.int32)


def in_awq_order(codes):
    """(k, m) codes of 4 bits -> (k, m / 8) int32."""
    words = [
        sum(int(row[8 * j + place]) << 4 * nibble for nibble, place in enumerate(AWQ_ORDER))
        for row in codes
        for j in range(codes.shape[1] // 8)
    ]
    return np.array(words, np.uint32).view(np.int32).reshape(len(codes), -1)


def module(n, m, scheme, seed=0):
    """({part: array}, W (n, m) float64, codes, zero points) of random codes."""
    rng = np.random.default_rng(seed)
    groups, top = n // (scheme.group or n), 2**scheme.bits
    codes, zeros = rng.integers(0, top, (n, m)), rng.integers(0, top, (groups, m))
    scales = (0.002 + 0.01 * rng.random((groups, m))).astype(np.float16)
    index = rng.permutation(np.arange(n) * groups // n) if scheme.ordered else np.arange(n) * groups // n
    weight = (codes - zeros[index]) * scales[index].astype(np.float64)
    if scheme.method == "awq":
        return {"qweight": in_awq_order(codes), "qzeros": in_awq_order(zeros), "scales": scales}, weight, codes, zeros
    stored = in_words(((zeros - scheme.offset) % top).T, scheme.bits).T
    parts = {"qweight": in_words(codes, scheme.bits), "qzeros": np.ascontiguousarray(stored), "scales": scales}
    return parts | {"g_idx": index.astype(np.int32)}, weight, codes, zeros


def stored(name, array):
    kinds = {"int32": ("I32", None), "float16": ("F16", "float16")}
    return Stored(name, *kinds[array.dtype.name], array.shape, lambda: array)


SCHEMES = [
    Scheme("gptq", 4, 16, offset=1),
    Scheme("gptq", 4, 0, offset=1),
    Scheme("gptq", 4, 16, offset=0, ordered=True),
    Scheme("gptq", 8, 16, offset=1),
    Scheme("gptq", 3, 32, offset=1),
    Scheme("gptq", 3, 16, ordered=True),
    Scheme("gptq", 2, 16, offset=1),
    Scheme("awq", 4, 16),
    Scheme("awq", 4, 0),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_module_is_read_bit_by_bit(scheme):
    """Two layers: W to the last bit in float32, the bytes of so many bits, and both products with it."""
    n, m = 64, 32
    like, parts, weights = jax.ShapeDtypeStruct((2, n, m), jnp.float32), [], []
    for layer in range(2):
        own, weight, _, _ = module(n, m, scheme, layer)
        tensors = [stored(f"layer{layer}.{part}", array) for part, array in own.items()]
        parts += quantized.joined("here", tensors, scheme, ())
        weights.append(weight)
    assert [(part.name, part.shape, part.dtype) for part in parts] == [
        (f"layer{layer}.weight", (m, n), "float16") for layer in range(2)
    ]
    kernel = quantized.stacked("here", "layers/q_proj/kernel", like, parts)
    assert isinstance(kernel, Affine) and kernel.shape == (2, n, m) and kernel.bits == scheme.bits
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), quantized.shape_of(like, scheme))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), kernel) == shapes
    assert kernel.nbytes == 2 * (n * m * scheme.bits // 8 + 3 * kernel.groups * m + 4 * n * scheme.ordered)
    on_device = jax.tree.map(jnp.asarray, kernel)
    np.testing.assert_array_equal(dense(on_device), np.float32(weights))
    np.testing.assert_array_equal(parts[1].read(), np.float32(weights[1]).T.astype(np.float16))
    x = np.random.default_rng(3).normal(size=(5, n)).astype(np.float32)
    first = jax.tree.map(lambda leaf: leaf[0], on_device)
    product = lambda x: jp.quant.dot(x, first)
    y, back = jax.vjp(product, x)
    np.testing.assert_allclose(y, x @ weights[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(back(y)[0], np.asarray(y) @ weights[0].T, rtol=1e-4, atol=1e-5)


def test_what_is_stored_as_less_one_wraps():
    """A zero point of 0 is stored as 2^b - 1 in the first format."""
    scheme = Scheme("gptq", 4, 0, offset=1)
    own, _, _, zeros = module(8, 16, scheme)
    assert (zeros == 0).any()
    (tensor,) = quantized.joined("here", [stored(f"a.{part}", array) for part, array in own.items()], scheme, ())
    np.testing.assert_array_equal(tensor.packed().zeros, zeros)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("scales"), "a has a qweight and lacks scales"),
        (lambda parts: parts.update(scales=parts["scales"][:1]), r"a.scales has shape \(1, 32\), expected \(4, 32\)"),
        (lambda parts: parts.update(g_idx=parts["g_idx"] + 1), "a.g_idx has group 4, expected 0 to 3"),
        (lambda parts: parts.update(g_idx=parts["g_idx"] - 1), "a.g_idx has group -1, expected 0 to 3"),
        (lambda parts: parts["scales"].fill(np.inf), "a.scales holds a number that is not finite"),
        (lambda parts: parts.update(qzeros=parts["scales"]), "a.qzeros is F16, expected I32"),
        (lambda parts: parts.update(qweight=parts["qweight"][0]), r"a.qweight has shape \(32,\), expected 2 axes"),
        (lambda parts: parts.update(qweight=parts["qweight"][:7]), "a has 56 inputs, of which group_size 16 is no"),
        (lambda parts: parts.clear(), "no tensor is a qweight"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    scheme = Scheme("gptq", 4, 16, offset=1)
    own = module(64, 32, scheme)[0]
    change(own)
    with pytest.raises(jp.InputError, match=message):
        for tensor in quantized.joined("here", [stored(f"a.{p}", array) for p, array in own.items()], scheme, ()):
            tensor.packed()


def quantized_folder(files, folder, said):
    """(FOLDER/model, FOLDER/plain): the model of `files` with random packed kernels, and with what these are worth."""
    scheme = scheme_of({"quantization_config": said})
    shutil.copytree(files / "model", folder / "model")
    shutil.copytree(files / "model", folder / "plain")
    tensors = load_file(files / "model" / "model.safetensors")
    packed, plain = {}, dict(tensors)
    for seed, (name, array) in enumerate(tensors.items()):
        if "_proj" not in name:
            packed[name] = array
            continue
        m, n = array.shape
        own, weight, _, _ = module(n, m, scheme, seed)
        packed |= {name.replace("weight", part): value for part, value in own.items()}
        packed[name.replace("weight", "bias")] = np.zeros(m, np.float16)  # as AutoGPTQ adds it
        plain[name] = np.ascontiguousarray(weight.T.astype(np.float32))
    save_file(packed, folder / "model" / "model.safetensors")
    save_file(plain, folder / "plain" / "model.safetensors")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return folder


SAID = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "GEMM", "zero_point": True},
}


@pytest.fixture(scope="module", params=SAID)
def folder(request, files, tmp_path_factory):
    return quantized_folder(files, tmp_path_factory.mktemp(request.param), SAID[request.param])


def kernels(params):
    return {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("_proj/kernel")}


def batch():
    tokens = np.random.default_rng(0).integers(2, 40, (2, 8))
    return {"tokens": tokens, "positions": np.tile(np.arange(8), (2, 1)), "segment_ids": np.ones((2, 8), np.int32)}


def test_the_model_is_the_one_of_the_plain_weights(folder):
    base, params = hf.load_pretrained(folder / "model", "float32")
    _, plain = hf.load_pretrained(folder / "plain", "float32")
    assert kernels(params) and all(isinstance(kernel, Affine) for kernel in kernels(params).values())
    for path, kernel in kernels(params).items():
        np.testing.assert_array_equal(dense(kernel), kernels(plain)[path])
    np.testing.assert_allclose(base.apply(params, batch()), base.apply(plain, batch()), rtol=1e-4, atol=1e-5)


def test_a_plan_knows_the_bytes(folder):
    config = hf.load_config(folder / "model")
    step = planner.make_step(config, jp.lora(2), 2, 16, "blocks", jnp.float32)
    _, params = hf.load_pretrained(folder / "model", "float32")
    assert tree.num_bytes({p: step.state.frozen[p] for p in kernels(params)}) == tree.num_bytes(kernels(params))
    assert jax.tree.map(lambda x: x.shape, step.state.frozen["layers/mlp/up_proj/kernel"]) == jax.tree.map(
        lambda x: x.shape, kernels(params)["layers/mlp/up_proj/kernel"]
    )


def test_a_run_beside_them(folder, files, cache, tmp_path):
    """Codes are not kept in checkpoints; the adapter is an ordinary one; merging unpacks all, in the scales' type."""
    args = dataclasses.replace(
        runs.arguments(files, tmp_path / "run", samples=0, save="matmuls"), model=str(folder / "model")
    )
    begin.train(args)
    job = preparing.prepare(args)
    with Checkpoints(args.out / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(job.state)
    assert all(is_packed(kernel) for kernel in kernels(state.frozen).values()) and kernels(state.frozen)
    assert not (args.out / "checkpoints" / "frozen").exists()

    export.run(export.Export(args.out, tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    document = merge.run(merge.Merge(tmp_path / "adapter", tmp_path / "merged", str(folder / "model")))
    assert "float16" in document["dtype"]
    assert "quantization_config" not in hf.load_config(tmp_path / "merged")
    base, merged = hf.load_pretrained(tmp_path / "merged", "float32")
    assert not any(is_packed(kernel) for kernel in kernels(merged).values())
    found = job.model.apply(jp.combine(state.trainable, state.frozen), batch())
    np.testing.assert_allclose(base.apply(merged, batch()), found, rtol=5e-3, atol=5e-3)


def test_what_packs_leaves_them_as_they_are(folder):
    method = jp.chain(jp.quantize(), jp.lora(2))
    _, params = hf.load_pretrained(folder / "model", "float32", convert=method.convert)
    assert all(isinstance(kernel, Affine) for kernel in kernels(params).values())
    merged = kernels(method.merge(params))
    assert all(isinstance(kernel, Affine) for kernel in merged.values())


def test_their_scales_train_where_groups_are_in_order(files, tmp_path):
    made = quantized_folder(files, tmp_path, SAID["gptq"] | {"desc_act": False})
    base, params = hf.load_pretrained(made / "model", "float32", convert=jp.peqa(4, 8).convert)
    model, trainable, frozen = jp.setup(jp.peqa(4, 8), base, params, jax.random.key(0))
    assert {leaf.dtype for leaf in trainable.values()} == {jnp.dtype("float32")}
    found = model.apply(jp.combine(trainable, frozen), batch())
    np.testing.assert_allclose(found, base.apply(params, batch()), rtol=1e-4, atol=1e-5)
    with pytest.raises(jp.InputError, match="packed already, with bits=4, group=8; give these"):
        jp.setup(jp.peqa(4), base, params, jax.random.key(0))


def test_groups_in_the_order_of_activations_do_not_train(files, tmp_path):
    made = quantized_folder(files, tmp_path, SAID["gptq"])
    base, params = hf.load_pretrained(made / "model", "float32")
    with pytest.raises(jp.InputError, match="order of activations"):
        jp.setup(jp.peqa(4, 8), base, params, jax.random.key(0))


def test_a_stack_is_packed_in_all_layers_or_in_none(files, tmp_path):
    made = quantized_folder(files, tmp_path, SAID["gptq"])
    file, of = made / "model" / "model.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    for part in (*quantized.PARTS, "bias"):
        del tensors[f"{of}.{part}"]
    tensors[f"{of}.weight"] = load_file(made / "plain" / "model.safetensors")[f"{of}.weight"]
    save_file(tensors, file)
    with pytest.raises(jp.InputError, match=f"{of}.weight is not quantized, and other layers are"):
        hf.load_pretrained(made / "model")


def test_a_bias_that_is_something_is_not_dropped(files, tmp_path):
    made = quantized_folder(files, tmp_path, SAID["gptq"])
    file = made / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, file)
    with pytest.raises(jp.InputError, match="1 unexpected: model.layers.0.mlp.up_proj.bias"):
        hf.load_pretrained(made / "model")


def test_what_says_nothing_of_its_codes_or_says_a_weight_twice(files, tmp_path):
    made = quantized_folder(files, tmp_path, SAID["gptq"]) / "model"
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(jp.InputError, match=r"does not say how they are quantized \(quantization_config\): "):
        hf.load_pretrained(made)
    (made / "config.json").write_text(json.dumps(config))
    tensors, name = load_file(made / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    tensors[name] = load_file(tmp_path / "plain" / "model.safetensors")[name]
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(jp.InputError, match=rf"{name} \(quantized\) and {name} are the same parameter twice"):
        hf.load_pretrained(made)


# Trains on a mesh of eight devices as on one, over GPTQ's kernels and over packed ones of three bits.
MESH = """
import sys
import jax, numpy as np, optax
import jaxpeft as jp
from jaxpeft import hf, sharding, shares, tree
from tests import runs
method = jp.chain(jp.quantize("nf3", group=8, double=False), jp.lora(2))
optimizer = optax.sgd(1e-2)
tokens = np.random.default_rng(0).integers(2, 40, (8, 16)).astype(np.int32)
batch = {name: tokens for name in ("tokens", "targets")} | {
    "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)), "segment_ids": np.ones((8, 16), np.int32),
    "loss_weights": np.ones((8, 16), np.float32)}
for folder in sys.argv[1:]:
    found = []
    for text in ("", "fsdp=2,tensor=2,data=2"):
        mesh = sharding.make_mesh(text) if text else None
        base, params = hf.load_pretrained(folder, "float32", placement=shares.placement(mesh))
        model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
        state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
        step = jp.make_train_step(model, method, optimizer)
        losses = []
        if mesh is None:
            step = jax.jit(step)
            for _ in range(3):
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
        else:
            where = sharding.of_state(mesh, state, tree.flatten(params))
            state, batch_there = jax.device_put((state, batch), (where, sharding.of_batch(mesh, batch)))
            with jax.set_mesh(mesh):
                step = jax.jit(step, out_shardings=(where, None))
                for _ in range(3):
                    state, metrics = step(state, batch_there)
                    losses.append(float(metrics["loss"]))
            codes = jax.tree.leaves(state.frozen["layers/mlp/up_proj/kernel"])[0]
            assert not codes.sharding.is_fully_replicated
        found.append(losses)
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert found[0][-1] < found[0][0]
print("same")
"""


@pytest.mark.slow
def test_on_a_mesh(files, tmp_path):
    folder = quantized_folder(files, tmp_path, SAID["gptq"])
    command = [sys.executable, "-c", MESH, str(folder / "model"), str(files / "model")]
    done = subprocess.run(
        command, env=virtual.devices(8), cwd=virtual.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-2000:]
