"""Starts of LoRA that are calculated: LoftQ of the kernels, EVA and LoRA-GA of data."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

import jaxpeft as jp
from jaxpeft import quant, tree
from jaxpeft.quant import dense
from jaxpeft.train.loss import completion_loss
from tests import tiny
from tests.peft import reference

KEY, BATCH = jax.random.key(0), tiny.batch()
UP = "layers/mlp/up_proj"


def loftq_of(w, quantize, rank, rounds):
    """Algorithm 1 of the paper, on one matrix: (Q_T, s A_T B_T)."""
    low = np.zeros_like(w)
    for _ in range(rounds):
        q = np.asarray(quantize(w - low))
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return q, low


@pytest.mark.parametrize("rounds", [1, 4])
def test_loftq_alternates_as_its_paper_does(rounds):
    """Packed kernels and the product beside them; each round comes nearer to W; merged, the start is nearer to W."""
    lora = jp.lora(4, alpha=6, init="loftq", init_options={"iterations": rounds}, targets=["up_proj"])
    method = jp.chain(lora, jp.quantize("int4", group=8))
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, KEY)
    kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"])
    pack = lambda w: dense(quant.pack(jnp.asarray(w), "int4", 8))
    for layer in range(3):
        q, low = loftq_of(kernel[layer], pack, 4, rounds)
        np.testing.assert_allclose(dense(rest[f"{UP}/kernel"])[layer], q, atol=1e-6)
        ours = 6 / 4 * trainable[f"{UP}/lora/a"][layer] @ trainable[f"{UP}/lora/b"][layer]
        np.testing.assert_allclose(ours, low, atol=1e-4)
        plain = np.linalg.norm(pack(kernel[layer]) - kernel[layer])
        assert np.linalg.norm(q + low - kernel[layer]) < 0.9 * plain
    assert (f"{UP}/lora/a0" in rest) == (rounds > 1)
    whole = jp.combine(trainable, rest)
    np.testing.assert_allclose(base.apply(method.merge(whole), BATCH), model.apply(whole, BATCH), rtol=1e-4, atol=1e-4)


def test_loftq_of_a_bfloat16_base_starts_from_the_codes_that_are_kept():
    """What is subtracted is rounded to the kernel's type before it is packed, and the pair is made of these codes."""
    lora = jp.lora(4, init="loftq", init_options={"iterations": 2}, targets=["up_proj"])
    base, params = tiny.model(jnp.bfloat16)
    _, trainable, rest = jp.setup(jp.chain(lora, jp.quantize()), base, params, KEY)
    lost = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float32) - dense(rest[f"{UP}/kernel"])
    u, s, vt = np.linalg.svd(lost, full_matrices=False)
    low = trainable[f"{UP}/lora/a"] @ trainable[f"{UP}/lora/b"]
    np.testing.assert_allclose(low, (u[..., :4] * s[:, None, :4]) @ vt[:, :4], atol=1e-4)


def test_loftq_of_other_packed_formats():
    """PEQA's codes are iterated on as well."""
    lora = jp.lora(4, init="loftq", init_options={"iterations": 3})
    base, params = tiny.model()
    found = {}
    for name, first in {"plain": jp.lora(4), "loftq": lora}.items():
        model, trainable, rest = jp.setup(jp.chain(first, jp.peqa(4)), base, params, KEY)
        found[name] = np.abs(model.apply(jp.combine(trainable, rest), BATCH) - base.apply(params, BATCH)).mean()
    assert found["loftq"] < 0.8 * found["plain"]


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_in_files(rounds, tmp_path):
    """An adapter comes back bit by bit with the codes; for PEFT it is one of the quantized base, or of the original."""
    lora = jp.lora(4, init="loftq", init_options={"iterations": rounds}, targets="mlp")
    method = jp.chain(lora, jp.quantize())
    folder = reference.write_base(tmp_path / "llama")
    base, params = reference.load(folder)
    model, trainable, rest = jp.setup(method, base, params, KEY)
    whole = tree.combine(reference.randomise(trainable), rest)
    jp.export_adapter(tmp_path / "adapter", whole, method, base.config, folder)
    again, leaves = jp.import_adapter(tmp_path / "adapter", base.config, params)
    assert again.specs == method.specs
    _, *parts = jp.setup(again, base, tree.unflatten({**tree.flatten(params), **leaves}), KEY)
    back = tree.flatten(jp.combine(*parts))
    for path, leaf in tree.flatten(whole).items():
        jax.tree.map(np.testing.assert_array_equal, back[path], leaf)
    # On the base with what is left of the kernels unpacked, PEFT computes what ours does.
    theirs = reference.torch_base(folder)
    names = {f"layers/mlp/{name}": f"model.layers.{{}}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    for site, name in names.items():
        kernel = np.array(dense(tree.flatten(whole)[f"{site}/kernel"]))
        if rounds > 1:
            kernel += np.asarray(tree.flatten(whole)[f"{site}/lora/a0"] @ tree.flatten(whole)[f"{site}/lora/b0"])
        for layer in range(2):
            theirs.get_submodule(name.format(layer)).weight.data.copy_(torch.tensor(kernel[layer].T))
    for name, module in ((f"{at}_proj", f"self_attn/{at}_proj") for at in "qkvo"):
        kernel = np.array(dense(tree.flatten(whole)[f"layers/{module}/kernel"]))
        for layer in range(2):
            at = theirs.get_submodule(f"model.layers.{layer}.self_attn.{name}")
            at.weight.data.copy_(torch.tensor(kernel[layer].T))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    reference.assert_close(reference.logits(model, whole), reference.torch_logits(adapted))


TARGETS = ["q_proj", "v_proj", "down_proj"]
MODULES = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}
LABELS = np.where(
    np.random.default_rng(5).random((4, 30)) < 0.6, np.random.default_rng(6).integers(0, 97, (4, 30)), -100
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def batch_for(labels=LABELS, seed=4):
    """(a batch of ours, the same for PyTorch); of the labels -100 does not count."""
    tokens = np.random.default_rng(seed).integers(0, 97, labels.shape).astype(np.int32)
    ours = {
        "tokens": tokens,
        "targets": np.maximum(labels, 0).astype(np.int32),
        "loss_weights": (labels >= 0).astype(np.float32),
        "positions": np.tile(np.arange(labels.shape[1], dtype=np.int32), (len(labels), 1)),
        "segment_ids": np.ones(labels.shape, np.int32),
    }
    return ours, {"input_ids": torch.tensor(tokens).long(), "labels": torch.tensor(labels).long()}


def assert_same_directions(ours, theirs, tolerance=1e-3):
    """Columns (n, r) up to their signs."""
    signs = np.sign((ours * theirs).sum(0))
    reference.assert_close(ours * signs, theirs, tolerance)


def test_eva_starts_where_peft_s_does(llama):
    """On one batch, whose directions PEFT looks for until they stay."""
    ours, theirs = batch_for()
    config = peft.LoraConfig(
        r=4,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, tau=0.999),
    )
    model = peft.get_peft_model(reference.torch_base(llama), config)
    peft.initialize_lora_eva_weights(model, [theirs], show_progress_bar=False)
    method = jp.lora(4, init="eva", targets=TARGETS)
    base, params = reference.load(llama)
    adapted, trainable, rest = jp.setup(method, base, params, jax.random.key(0), batches=lambda: [ours])
    for name, parent in MODULES.items():
        for layer in range(2):
            module = model.get_submodule(f"base_model.model.model.layers.{layer}.{parent}.{name}")
            a = np.asarray(trainable[f"layers/{parent}/{name}/lora/a"][layer])
            expected = module.lora_A["default"].weight.detach().numpy().T
            # PEFT's decomposition is randomised, and stops where its directions hardly turn.
            assert np.abs((a * expected).sum(0)).min() > 0.95
    reference.assert_close(reference.logits(adapted, jp.combine(trainable, rest)), reference.logits(base, params))


@pytest.mark.slow
def test_eva_of_several_batches_is_that_of_all_rows():
    """Against the decomposition of all inputs at once, less their mean; of rank n / 2 the increments lose nothing."""
    base, params = tiny.model()
    batches = [tiny.batch(rows, seed=rows) for rows in (2, 4, 3)]
    embedded = [np.asarray(base.stack.embed(params, batch, None)[0]) for batch in batches]
    norm = np.asarray(params["layers"]["input_layernorm"]["scale"][0])
    first = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
    rows = np.concatenate([first(x)[b["loss_weights"] > 0] for x, b in zip(embedded, batches, strict=True)])
    _, s, vt = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for rank in (16, 4):
        method = jp.lora(rank, init="eva", targets=["q_proj"])
        _, trainable, _ = jp.setup(method, base, params, KEY, batches=lambda: iter(batches))
        a = np.asarray(trainable["layers/self_attn/q_proj/lora/a"][0])
        np.testing.assert_allclose(a.T @ a, np.eye(rank), atol=1e-4)
        found = ((rows - rows.mean(0)) @ a) ** 2
        np.testing.assert_allclose(found.sum(), (s[:rank] ** 2).sum(), rtol=1e-4 if rank == 16 else 0.02)
        if rank == 16:
            assert_same_directions(a[:, :4], vt[:4].T, 0.02)
            white = jp.lora(rank, init="eva", init_options={"whiten": True}, targets=["q_proj"])
            _, other, _ = jp.setup(white, base, params, KEY, batches=lambda: iter(batches))
            np.testing.assert_allclose(other["layers/self_attn/q_proj/lora/a"][0], a / np.sqrt(s[:16]), atol=1e-4)


class Block(nn.Module):
    """A layer that JAX computes again."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(32, name="up")(x)))


def mean_square(model, params, batch, key=None):
    """A loss that is no language model's."""
    return jnp.mean((model.apply(params, {"x": batch["x"]}, key) - batch["y"]) ** 2), {"weight": jnp.ones(())}


def test_eva_of_a_module_of_one_s_own_that_is_computed_again():
    x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.arange(8)
    base = jp.from_linen(nn.remat(Block)(), {"x": x})
    method = jp.lora(2, init="eva", targets=["up"])
    params, (_, _, vt) = base.init(KEY, {}), np.linalg.svd(x - x.mean(0), full_matrices=False)
    _, trainable, _ = jp.setup(method, base, params, KEY, batches=lambda: [{"x": x}])
    assert_same_directions(np.asarray(trainable["up/lora/a"]), vt[:2].T)
    # Of batches that hold what the module does not read, through the loss.
    _, trainable, _ = jp.setup(method, base, params, KEY, lambda: [{"x": x, "y": jnp.ones(())}], mean_square)
    assert_same_directions(np.asarray(trainable["up/lora/a"]), vt[:2].T)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "A2rBr", "scale": "unit"},
        pytest.param({"direction": "ArBr", "scale": "gd_scale"}, marks=pytest.mark.slow),
        pytest.param({"scale": "weight_svd"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lora_ga_starts_where_peft_s_does(llama, options, tmp_path):
    """Of rank 8 both sketches hold the whole gradient of these kernels; the kernels keep what is left."""
    found = [batch_for(seed=seed) for seed in (4, 5)]
    if options:
        found = found[:1]
    shifted = [{**t, "labels": torch.nn.functional.pad(t["labels"], (1, 0), value=-100)[:, :-1]} for _, t in found]
    ours = [{**o, "loss_weights": o["loss_weights"] * (np.arange(30) < 29)} for o, _ in found]
    config = peft.LoraConfig(
        r=8,
        lora_alpha=12,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(**{"stable_gamma": 16, **options}),
    )
    model = reference.torch_base(llama)

    def step():
        for batch in shifted:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, step)
    theirs = peft.get_peft_model(model, config)
    base, params = reference.load(llama)
    method = jp.lora(8, alpha=12, init="lora_ga", init_options=options, targets=TARGETS)
    adapted, trainable, rest = jp.setup(method, base, params, KEY, batches=lambda: iter(ours))
    for name, parent in MODULES.items():
        for layer in range(2):
            module = theirs.get_submodule(f"base_model.model.model.layers.{layer}.{parent}.{name}")
            a, b = (np.asarray(trainable[f"layers/{parent}/{name}/lora/{leaf}"][layer]) for leaf in "ab")
            assert_same_directions(a, module.lora_A["default"].weight.detach().numpy().T)
            near = 5e-3 if options.get("scale") == "weight_svd" else 1e-3  # PEFT finds the largest by a sketch
            assert_same_directions(b.T, module.lora_B["default"].weight.detach().numpy(), near)
            kernel = params["layers"][parent][name]["kernel"][layer]
            np.testing.assert_allclose(rest[f"layers/{parent}/{name}/kernel"][layer], kernel - 1.5 * a @ b, atol=1e-5)
    whole = jp.combine(trainable, rest)
    reference.assert_close(reference.logits(adapted, whole), reference.logits(base, params))
    # For the original base an adapter that starts at nothing; what is trained comes back bit by bit.
    whole = jp.combine(reference.randomise(trainable), rest)
    jp.export_adapter(tmp_path / "adapter", whole, method, base.config, llama)
    reference.assert_close(reference.logits(adapted, whole), reference.with_adapter(llama, tmp_path / "adapter"))
    again, leaves = jp.import_adapter(tmp_path / "adapter", base.config, params)
    assert again.specs == method.specs
    _, *parts = jp.setup(again, base, tree.unflatten({**tree.flatten(params), **leaves}), KEY)
    back = tree.flatten(jp.combine(*parts))
    for path, leaf in tree.flatten(whole).items():
        np.testing.assert_array_equal(back[path], leaf)


@pytest.mark.slow
def test_lora_ga_s_sketch_of_a_smaller_rank():
    """The first singular vectors of the mean gradient, which is never made, also over packed kernels."""
    base, params = tiny.model()
    batches = [tiny.batch(seed=1), tiny.batch(seed=2)]
    path = "layers/mlp/gate_proj/kernel"
    flat = tree.flatten(params)
    of = lambda kernel, batch: completion_loss(base, tree.unflatten({**flat, path: kernel}), batch)[0]
    gradient = sum(jax.jit(jax.grad(of))(flat[path], batch) for batch in batches) / 2
    _, s, vt = np.linalg.svd(gradient, full_matrices=False)
    method = jp.lora(2, init="lora_ga", init_options={"direction": "A2rBr", "scale": "unit"}, targets=["gate_proj"])
    _, trainable, _ = jp.setup(method, base, params, KEY, batches=lambda: iter(batches))
    b = np.asarray(trainable["layers/mlp/gate_proj/lora/b"])
    np.testing.assert_allclose(np.linalg.norm(b, axis=-1), s[:, :2], rtol=0.05)
    for layer in range(3):
        assert abs(b[layer, 0] @ vt[layer, 0]) / s[layer, 0] > 0.97
    packed, trainable, rest = jp.setup(
        jp.chain(jp.quantize("int8"), method), base, params, KEY, batches=lambda: iter(batches)
    )
    assert quant.is_packed(rest[path])
    near = packed.apply(jp.combine(trainable, rest), BATCH) - base.apply(params, BATCH)
    assert np.abs(near).max() < 0.5


@pytest.mark.slow
def test_without_data_there_are_shapes_alone():
    base, params = tiny.model()
    for init in ("eva", "lora_ga"):
        method = jp.lora(2, init=init)
        with pytest.raises(jp.InputError, match=f"init '{init}' starts from data: setup"):
            jp.setup(method, base, params, KEY)
        shapes = jax.eval_shape(lambda p, m=method: jp.setup(m, base, p, KEY, batches=lambda: ())[1:], params)
        _, *made = jp.setup(method, base, params, KEY, batches=lambda: [BATCH])
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
            lambda x: (x.shape, x.dtype), (*made,)
        )


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (
            lambda: [jp.lora(4, init="loftq")],
            "init 'loftq' starts from what quantization loses of layers/mlp/down_proj",
        ),
        (lambda: [jp.quantize(), jp.lora(4, init="loftq")], "needs the kernel as it was, .*, as lora[+]quantize"),
        (
            lambda: [jp.lora(4, init="loftq", targets="mlp"), jp.quantize(targets="attention")],
            "starts from what quantization loses of layers/mlp/down_proj",
        ),
        (lambda: [jp.lora(4, init="loftq", init_options={"iterations": 0})], "iterations 0 must be at least 1"),
        (lambda: [jp.lora(4, init="loftq", init_options={"rounds": 2})], "no option 'rounds'; it has iterations"),
        (lambda: [jp.lora(4, init="pissa", init_options={"rounds": 2})], "no option 'rounds'; it has none"),
        (lambda: [jp.lora(4, init_options={"rounds": 2})], "init 'kaiming' has no options; leave init_options rounds"),
        (lambda: [jp.lora(4, init="lora_ga", init_options={"direction": "random"})], "'random' is not one of ArB2r"),
        (lambda: [jp.lora(4, init="lora_ga", init_options={"scale": "gd"})], "scale 'gd' is not one of stable"),
        (lambda: [jp.lora(4, init="lora_ga", init_options={"gamma": 0})], "gamma 0 must be a finite number above 0"),
        (lambda: [jp.lora(4, init="lora_ga", init_options={"iterations": -1})], "iterations -1 must be at least 0"),
        (
            lambda: [jp.lora(9, init="lora_ga")],
            "takes 18 singular vectors for rank 9, .*k_proj has, a kernel of 32 x 16",
        ),
        (
            lambda: [jp.lora(4, init="loftq", init_options={"iterations": "two"})],
            "lora, init 'loftq': iterations 'two' should be a whole number",
        ),
    ],
)
def test_bad_starts_say_what_would_be_right(members, says):
    with pytest.raises(jp.InputError, match=says):
        jp.setup(jp.chain(*members()), *tiny.model(), KEY)


OF_A_LOSS = (
    jp.lora(2, init="lora_ga", targets=["up"]),
    jp.speft(0.1, metric="gradient", targets=["up"]),
    jp.spt_lora(0.1, rank=2, targets=["up"]),
    jp.sparsegrad(0.1, targets=["up"]),
    jp.lq_lora(2, format="nf3", fisher=True, targets=["up"]),
)


@pytest.mark.parametrize("method", OF_A_LOSS, ids=lambda method: method.name)
def test_a_start_of_a_module_of_one_s_own_reads_its_own_loss(method):
    x, y = jax.random.normal(jax.random.key(0), (2, 64, 8))
    base = jp.from_linen(Block(), {"x": x})
    params, batch = base.init(KEY, {}), {"x": x, "y": y}
    start = functools.partial(jp.setup, method, base, params, KEY, lambda: [batch])
    with pytest.raises(jp.InputError, match=r"batches with targets or labels, not of x, y alone; setup\(\.\.\., loss="):
        start()
    _, trainable, rest = start(loss=mean_square)
    g = np.asarray(jax.grad(lambda params: mean_square(base, params, batch)[0])(params)["up"]["kernel"])
    if method.name == "lora":
        u, _, vt = np.linalg.svd(g)
        assert_same_directions(
            np.asarray(trainable["up/lora/a"]) / np.linalg.norm(trainable["up/lora/a"], axis=0), u[:, :2]
        )
        rows = np.asarray(trainable["up/lora/b"])
        assert_same_directions((rows / np.linalg.norm(rows, axis=1, keepdims=True)).T, vt[2:4].T)
    if method.name == "speft":
        assert set(rest["up/speft/index"].tolist()) == set(np.argsort(-np.abs(g).ravel())[: g.size // 10].tolist())
