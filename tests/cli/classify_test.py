"""`plan` and `profile` of steps that classify rows or images."""

import json

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import cli
from jaxpeft.memory import planner
from jaxpeft.models import family, for_classification
from jaxpeft.train.loss import classification_loss
from tests import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "decoder": tiny.CONFIG,
    "encoder": {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 97, **SIZES},
    "images": {"model_type": "vit", "architectures": ["ViTModel"], "image_size": 16, "patch_size": 4, **SIZES},
}
SMALL = ["--batch-size", "4", "--seq-len", "32", "--dtype", "float32"]


@pytest.fixture(scope="module", params=["decoder", "encoder", pytest.param("images", marks=pytest.mark.slow)])
def config(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / f"{request.param}.json"
    path.write_text(json.dumps(CONFIGS[request.param]))
    return path


def test_plan_and_profile_agree(config, capsys):
    flags = ["--model", str(config), "--task", "classify", "--num-labels", "5", "--rank", "2", *SMALL, "--json"]
    assert cli.main(["plan", *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    tokens = 17 if config.stem == "images" else 32
    assert (document["task"], row["batch_size"], row["seq_len"]) == ("classify", 4, tokens)
    assert row["recompute_flops"] == 0  # no product is computed twice, the head's neither
    assert cli.main(["profile", *flags]) == 0
    profiled = json.loads(capsys.readouterr().out)
    assert profiled["bytes"] == row["bytes"]
    assert profiled["profile"]["total_bytes"] == pytest.approx(row["bytes"]["total"], rel=1e-3)  # and constants


def test_the_planned_step_is_the_one_that_trains(config):
    raw = CONFIGS[config.stem]
    step = planner.make_step(raw, jp.lora(rank=2), 4, 32, dtype=jnp.float32, task="classify", num_labels=5)
    base = family(raw).from_hf(for_classification(raw, "abcde"))
    method = jp.chain(jp.lora(rank=2), jp.full("^classifier/"))
    model, trainable, frozen = jp.setup(method, base, base.init(jax.random.key(0), {}), jax.random.key(1))
    assert {path: x.shape for path, x in step.state.trainable.items()} == {p: x.shape for p, x in trainable.items()}
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), step.state._replace(key=None))
    state = state._replace(key=jax.random.key(0), trainable=trainable, frozen=frozen)
    batch = {name: jnp.ones(x.shape, x.dtype) for name, x in step.batch.items()}
    _, metrics = jax.jit(step.function)(state, batch)
    loss, _ = classification_loss(model, jp.combine(trainable, frozen), batch)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model", "vit-l-16"], "vit: continues no text; add --task classify"),
        (["--model", "bert-base"], "bert: continues no text; add --task classify"),
        (["--num-labels", "3"], "--num-labels 3: belongs to --task classify"),
        (["--task", "classify", "--num-labels", "0"], "--num-labels 0: must be at least 1"),
        (["--task", "classify", "--model", "bert-base", "--seq-len", "1024"], "--seq-len 1024: bert has 512 positions"),
        (["--task", "clasify"], "clasify"),
    ],
)
def test_one_line_for_a_mistake(capsys, flags, said):
    for command in ("plan", "profile"):
        assert cli.main([command, *flags]) == 2
        out, err = capsys.readouterr()
        line = err.strip().splitlines()[-1]
        assert out == "" and line.startswith("jaxpeft: error: ") and said in line
