"""`--shots`: the model as it was with training examples in context, beside what the run makes of it."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import cli, tree
from jaxpeft.errors import InputError
from jaxpeft.models import decoder
from jaxpeft.train import begin
from jaxpeft.train.evaluate import new_tokens
from jaxpeft.train.prepare import prepare
from tests import runs

SHORT = {"shots": 2, "steps": 2, "eval_every": 0}


def by_hand(job, files, shown):
    """Nats per token of each validation row alone, behind the shown rows' text and without their ends."""
    rows = [json.loads(line) for line in (files / "eval.jsonl").read_text().splitlines()]
    encode = lambda text: job.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompts = [[*shown, *encode(row["prompt"])] for row in rows]
    completions = [[*encode(row["completion"]), 1] for row in rows]
    ids = np.zeros((len(rows), 1 + max(len(a) + len(b) for a, b in zip(prompts, completions, strict=True))), np.int32)
    for i, (a, b) in enumerate(zip(prompts, completions, strict=True)):
        ids[i, : len(a) + len(b)] = a + b
    shape = (len(rows), ids.shape[1] - 1)
    batch = {"tokens": ids[:, :-1], "positions": np.broadcast_to(np.arange(shape[1]), shape)}
    batch["segment_ids"] = np.ones(shape, np.int32)
    params = tree.combine(job.state.trainable, job.state.frozen)
    said = jax.jit(lambda params: jax.nn.log_softmax(job.model.apply(params, batch)))(params)
    of_target = np.take_along_axis(np.asarray(said), ids[:, 1:, None], -1)[..., 0]
    lost = [
        of_target[i, len(a) - 1 : len(a) + len(b) - 1]
        for i, (a, b) in enumerate(zip(prompts, completions, strict=True))
    ]
    return -np.concatenate(lost).mean()


def test_the_report_has_what_the_base_does_in_context(files, tmp_path, capsys):
    args = runs.arguments(files, tmp_path / "run", **SHORT)
    report = begin.train(args)
    job = prepare(args)
    given = job.data.in_context(job.model.config.max_position_embeddings)
    questions = [question.prompt for question in given.asked]
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    text = lambda row: job.tokenizer(row["prompt"] + row["completion"] + "\n\n", add_special_tokens=False)["input_ids"]
    pairs = [text(a) + text(b) for a in rows for b in rows if a != b]
    shown = next(pair for pair in pairs if all(question[: len(pair)] == pair for question in questions))

    found = report["in_context"]
    assert found["shots"] == 2 and given.fewer == 0
    assert found["eval_loss"] == pytest.approx(by_hand(job, files, shown), rel=1e-5)
    assert found["eval_loss"] != report["eval_loss_before"]
    assert 0 <= found["exact"] <= 1 and 0 <= found["overlap"] <= 1
    cli.main(["train", "--resume", *runs.flags(args)])
    assert "2 in context" in capsys.readouterr().out
    with pytest.raises(InputError, match="--shots 2 -> 3"):
        begin.train(runs.arguments(files, args.out, **{**SHORT, "shots": 3, "resume": True}))


def test_an_answer_has_room_and_what_stands_between_examples_has_a_row(files, tmp_path):
    """The latter where rows of the table that no data use are left out (--prune-embeddings)."""
    untied = tmp_path / "model"
    config = {**runs.CONFIG, "tie_word_embeddings": False}
    model = decoder.decoder(decoder.DecoderConfig.from_hf(config, jnp.float32))
    jp.save_pretrained(untied, config, model.init(jax.random.key(0), {}))
    others = shutil.ignore_patterns("config.json", "*.safetensors")
    shutil.copytree(files / "model", untied, ignore=others, dirs_exist_ok=True)  # the tokenizer
    changes = {"shots": 60, "model": str(untied), "prune_embeddings": True, "samples": 12}
    job = prepare(runs.arguments(files, tmp_path / "run", **changes))
    blank = job.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert not set(blank) & set(np.unique(np.concatenate([job.data.train.used(), job.data.validation().used()])))

    given = job.data.in_context(64)
    assert len(given.asked) == given.fewer == given.examples == 12
    for question, alone in zip(given.asked, job.data.asked, strict=True):
        assert question.prompt[-len(alone.prompt) :] == alone.prompt != question.prompt
        assert len(question.prompt) + new_tokens(given.asked) <= 64
    batches = (batch for batch, _ in given.batches())
    assert math.isfinite(job.task.scores(jax.jit(job.task.eval_step(job.model)), job.state, batches, 0)["loss"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shots": -1}, "--shots -1: must be at least 0"),
        ({"eval_data": None}, "--shots 2: needs --eval-data"),
        ({"task": "classify"}, "--shots 2: has no effect with --task classify"),
        ({"adapters": ("a", "b")}, "--shots 2: of a run with one adapter"),
    ],
)
def test_refused(files, tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        runs.arguments(files, tmp_path / "run", **{**SHORT, **changes}).check()
