"""Light-PEFT: masks and their rates, what matters by NumPy, and what is left of a LoRA and its base."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import assets, cli, early, hf, tree
from jaxpeft.method import Spec
from jaxpeft.train.optimizer import make_direction
from tests import tiny

KEY, BATCH, LR = jax.random.key(0), tiny.batch(), 1e-3
O, DOWN, Q = "layers/self_attn/o_proj", "layers/mlp/down_proj", "layers/self_attn/q_proj"


@pytest.fixture(scope="module")
def start():
    """(method, model, trainable, rest) with B and masks away from where they start."""
    method = jp.chain(jp.light_peft(l1=0.01), jp.lora(rank=4, alpha=8.0))
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    noise = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape)
    return method, model, {path: noise(path, x) for path, x in trainable.items()}, rest


def test_masks_scale_what_o_and_down_read_and_have_rates_of_their_own(start):
    """The loss is that of kernels whose rows are scaled, plus the masks' sum; Adam's first step is a rate long."""
    method, model, trainable, rest = start
    optimizer = make_direction()
    state = jp.init_state(method, optimizer, trainable, rest, KEY, model)
    after, metrics = jax.jit(jp.make_train_step(model, method, optimizer, rate=LR))(state, BATCH)
    kernels = dict(tree.flatten(state.params))
    masks = {path: kernels.pop(f"{path}/light_peft/m") for path in (O, DOWN)}
    for path, mask in masks.items():
        each = np.repeat(np.asarray(mask), kernels[f"{path}/kernel"].shape[1] // mask.shape[1], axis=1)[..., None]
        kernels[f"{path}/kernel"] = kernels[f"{path}/kernel"] * each
        kernels[f"{path}/lora/a"] = kernels[f"{path}/lora/a"] * each
    plain = jp.setup(jp.lora(rank=4, alpha=8.0), *tiny.model(), KEY)[0]
    wanted = jp.completion_loss(plain, tree.unflatten(kernels), BATCH)[0]
    wanted += 0.01 * sum(jnp.abs(mask).sum() for mask in masks.values())
    assert metrics["loss"] == pytest.approx(float(wanted), rel=1e-5)
    for path, rate in ((O, 100), (DOWN, 50)):
        step = np.abs(after.trainable[f"{path}/light_peft/m"] - masks[path])
        np.testing.assert_allclose(step, rate * LR, rtol=1e-2)
    step = np.abs(after.trainable[f"{Q}/lora/b"] - trainable[f"{Q}/lora/b"])
    np.testing.assert_allclose(np.median(step), LR, rtol=1e-2)


def test_what_matters_of_a_lora(start):
    """Modules: of the first layer's q, by NumPy; ranks: by the gradients of the model without probes. Masks are off."""
    method, model, trainable, rest = start
    base, params = tiny.model()[0], tree.combine(trainable, rest)
    found = early.importance(base, method, params, [BATCH, tiny.batch(seed=1)])
    assert {x.shape for x in found.modules.values()} == {(3,)}
    flat = {path: np.asarray(x) for path, x in {**rest, **trainable}.items()}
    scale, kernel = flat["layers/input_layernorm/scale"][0], flat[f"{Q}/kernel"][0]
    a, b = (flat[f"{Q}/lora/{name}"][0] for name in "ab")
    shares = []
    for batch in (BATCH, tiny.batch(seed=1)):
        x = flat["embed_tokens/embedding"][np.asarray(batch["tokens"])]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.rms_norm_eps) * scale
        shares.append((np.linalg.norm(2.0 * x @ a @ b, axis=-1) / np.linalg.norm(x @ kernel, axis=-1)).mean())
    assert found.modules[Q][0] == pytest.approx(np.mean(shares), rel=1e-4)

    off = {path: jnp.ones_like(x) if "/light_peft/" in path else x for path, x in trainable.items()}
    loss = lambda own, batch: jp.completion_loss(model, tree.combine(own, rest), batch)[0]
    gradient = jax.jit(jax.grad(loss))
    of = lambda batch, name: np.abs(
        np.asarray(off[f"{DOWN}/lora/{name}"] * gradient(off, batch)[f"{DOWN}/lora/{name}"])
    )
    wanted = [of(batch, "a").sum(1) + of(batch, "b").sum(2) for batch in (BATCH, tiny.batch(seed=1))]
    np.testing.assert_allclose(found.ranks[DOWN], np.mean(wanted, 0), rtol=1e-3)
    with pytest.raises(jp.InputError, match="needs batches of data"):
        early.importance(base, method, params, [])


def test_what_stays_of_a_lora():
    """The modules and ranks that matter most, the scale as it was; others are zeros or gone."""
    leaves = {
        f"{site}/lora/{name}": np.random.default_rng(0).normal(size=shape)
        for site in ("x/up", "x/down")
        for name, shape in (("a", (2, 6, 4)), ("b", (2, 4, 5)))
    }
    spec = Spec("lora", jp.lora(rank=4, alpha=8.0).specs[0].config)
    ranks = np.array([[0.0, 3, 2, 1], [9, 0, 1, 8]])
    parts = early.Parts(
        {"x/up": np.array([0.1, 0.9]), "x/down": np.array([0.2, 0.3])}, {"x/up": ranks, "x/down": ranks}
    )
    found, arguments = early.chosen(leaves, spec, parts, 0.25, 0.5)
    assert (arguments["rank"], arguments["alpha"], arguments["targets"]) == (2, 4.0, ["up"])
    assert found.keys() == {"x/up/lora/a", "x/up/lora/b"}
    np.testing.assert_array_equal(found["x/up/lora/a"][1], leaves["x/up/lora/a"][1][:, [0, 3]])
    np.testing.assert_array_equal(found["x/up/lora/b"][1], leaves["x/up/lora/b"][1][[0, 3]])
    assert not found["x/up/lora/a"][0].any() and not found["x/up/lora/b"][0].any()
    found, _ = early.chosen(leaves, spec, parts, 1.0, 1.0)
    np.testing.assert_array_equal(found["x/down/lora/a"], leaves["x/down/lora/a"])
    for shares, said in (((0, 0.5), "modules 0: the share that stays"), ((0.5, 2), "ranks 2: the share that stays")):
        with pytest.raises(jp.InputError, match=said):
            early.chosen(leaves, spec, parts, *shares)


def test_refusals(tmp_path):
    with pytest.raises(jp.InputError, match="light_peft: l1 -1 must be a finite number of at least 0"):
        jp.light_peft(l1=-1)
    model, params = tiny.model()
    with pytest.raises(jp.InputError, match=r"lora\+light_peft: .* name it first: light_peft\+lora"):
        jp.setup(jp.chain(jp.lora(), jp.light_peft()), model, params, KEY)
    for words, said in (
        (["--by", "masks", "--data", "x.jsonl"], "--by masks: needs --adapter, of light_peft+lora"),
        (["--adapter", "x"], "--by masks: needs --data, whose loss it asks"),
        (["--adapter", "x", "--by", "magnitude"], "--by magnitude: reads no --adapter; leave it out"),
    ):
        assert cli.main(["prune", "--out", f"{tmp_path}/out", *words]) == 2, said
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_base_whose_heads_do_not_divide_its_width(tmp_path):
    """transformers refuses such a model; its tokenizer is read."""
    for file in assets.MODEL.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_attention_heads": 3, "num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = "def f(x):"
    assert hf.load_tokenizer(tmp_path)(text).input_ids == hf.load_tokenizer(assets.MODEL)(text).input_ids


@pytest.mark.slow
def test_the_road(tmp_path):
    """The commands, one after the other: what is left trains on from where it was."""
    data = ["--data", "jaxpeft/assets/docstrings/train.jsonl", "--batch-size", "2", "--seq-len", "64"]
    step = [*data, "--steps", "2", "--samples", "0", "--eval-every", "0", "--dtype", "float32"]
    for words in (
        ["train", "--method", "light_peft+lora", "--rank", "4", *step, "--out", f"{tmp_path}/early"],
        ["prune", "--adapter", f"{tmp_path}/early/adapter", *data, "--batches", "2", "--out", f"{tmp_path}/small"],
        [
            "train",
            "--model",
            f"{tmp_path}/small",
            "--adapter",
            f"{tmp_path}/small/adapter",
            *step,
            "--out",
            f"{tmp_path}/run",
        ],
    ):
        assert cli.main(words) == 0
    small, left = jp.load_pretrained(tmp_path / "small", jnp.float32)
    method, leaves = jp.import_adapter(tmp_path / "small/adapter", small, left)
    _, whole = jp.import_adapter(tmp_path / "early/adapter", *jp.load_pretrained(assets.MODEL, jnp.float32))
    assert method.specs[0].config["rank"] == 2
    there = sum(int((np.abs(x).sum((1, 2)) > 0).sum()) for path, x in leaves.items() if path.endswith("/b"))
    assert there == round(0.25 * 7 * 4)
    for path, leaf in leaves.items():
        assert set(np.unique(leaf)) <= {0.0, *np.unique(whole[path])}
