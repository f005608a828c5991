"""Whole runs that classify rows, and what they leave."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import jaxpeft as jp
from jaxpeft import cli, hf
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.peft import adapter_labels, import_adapter
from jaxpeft.train import begin, loop
from jaxpeft.train.metrics import read
from jaxpeft.train.prepare import prepare
from tests import runs

pytestmark = pytest.mark.usefixtures("cache")

NAMES = ("ends with a", "ends with b", "ends with c")


@pytest.fixture(scope="module")
def rows(files, tmp_path_factory):
    """A folder with train.jsonl and eval.jsonl, whose labels a model can read off the last letter."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for name, count in (("train", 64), ("eval", 24)):
        lines = []
        for label in rng.integers(0, 3, count):
            text = "".join(rng.choice(list("defgh"), rng.integers(1, 8)))
            fields = {"text": text, "text2": text[:2] + "abc"[label], "label_name": NAMES[label], "label": int(label)}
            lines.append(json.dumps(fields))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(files, rows, out, **changes):
    settings = {
        "task": "classify",
        "data": str(rows / "train.jsonl"),
        "eval_data": str(rows / "eval.jsonl"),
        "steps": 12,
        "batch_size": 8,
        "lr": 5e-2,
        "eval_every": 6,
        "checkpoint_every": 4,
    }
    return runs.arguments(files, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def trained(files, rows, cache, tmp_path_factory):
    """(arguments, report) of a run."""
    args = arguments(files, rows, tmp_path_factory.mktemp("run") / "run", steps=40, eval_every=20, checkpoint_every=20)
    return args, begin.train(args)


def test_a_run_learns_its_labels_and_says_so(trained, capsys):
    args, report = trained
    assert report["accuracy_after"] > max(report["accuracy_before"], 0.8)
    assert report["eval_loss_after"] < report["eval_loss_before"]
    assert report["examples"]["data"]["labels"] == 3
    assert report["overlap_after"] is None and report["sample"] is None
    log = read(args.out / "metrics.jsonl")
    first, last = ([row for row in log if row["split"] == "eval"][i] for i in (0, -1))
    for row, when in ((first, "before"), (last, "after")):
        assert (row["loss"], row["accuracy"], row["f1"]) == tuple(
            report[f"{name}_{when}"] for name in ("eval_loss", "accuracy", "f1")
        )
    train = [row for row in log if row["split"] == "train"]
    assert all(row["rows"] == 8 and 0 <= row["accuracy"] <= 1 for row in train)
    from jaxpeft.train.report import print_report

    capsys.readouterr()
    print_report(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["accuracy", *(f"{report[f'accuracy_{when}']:.4f}" for when in ("before", "after"))] in lines
    assert any(line[:2] == ["F1", "(macro)"] for line in lines)


def test_the_adapter_keeps_the_classifier_and_its_labels(trained, files):
    args, _ = trained
    assert adapter_labels(args.out / "adapter") == NAMES
    config = json.loads((args.out / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    base, params = hf.load_pretrained(files / "model", jnp.float32, NAMES, jax.random.key(9))
    method, leaves = import_adapter(args.out / "adapter", base.config, params)
    assert [spec.name for spec in method.specs] == ["lora", "full"]
    with Checkpoints(args.out / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(prepare(args).state)
    assert leaves.keys() == state.trainable.keys()
    for path, leaf in state.trainable.items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)


def test_an_adapter_trains_on_and_asks_for_its_labels(trained, files, rows, tmp_path, capsys):
    args, report = trained
    changes = {"adapter": args.out / "adapter", "rank": None, "steps": 1, "seed": 5}
    further = begin.train(arguments(files, rows, tmp_path / "on", **changes))
    assert further["eval_loss_before"] == pytest.approx(report["eval_loss_after"], rel=1e-6)
    assert further["accuracy_before"] == report["accuracy_after"]
    other = tmp_path / "other.jsonl"
    other.write_text((rows / "train.jsonl").read_text().replace("with a", "with z"))
    changes |= {"data": str(other), "eval_data": None}
    assert cli.main(["train", *runs.flags(arguments(files, rows, tmp_path / "x", **changes))]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has the labels ends with a, ends with b, ends with c; " in line and "ends with z" in line


def test_export_writes_what_the_run_left_and_generate_refuses_it(trained, files, tmp_path, capsys):
    out = trained[0].out
    assert cli.main(["export", "--run", str(out), "--out", str(tmp_path / "adapter")]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "jaxpeft.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (out / "adapter" / name).read_bytes()
    flags = ["--model", str(files / "model"), "--adapter", str(out / "adapter"), "--prompt", "a"]
    assert cli.main(["generate", *flags]) == 2
    assert "adapter: classifies rows and continues no text" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_ended_early_ends_with_the_same_bits(files, rows, tmp_path, monkeypatch):
    changes = {"method_options": ("dropout=0.1",)}
    whole = begin.train(arguments(files, rows, tmp_path / "whole", **changes))
    account = loop.Loop._account

    def fails(run, pending):
        if pending.step == 7:
            raise KeyboardInterrupt
        account(run, pending)

    monkeypatch.setattr(loop.Loop, "_account", fails)
    with pytest.raises(KeyboardInterrupt):
        begin.train(arguments(files, rows, tmp_path / "cut", **changes))
    monkeypatch.undo()
    again = begin.train(arguments(files, rows, tmp_path / "cut", resume=True, **changes))
    assert again["resumed_from"] == 6
    for name in ("accuracy_before", "accuracy_after", "f1_after", "eval_loss_before", "eval_loss_after", "train_loss"):
        assert again[name] == whole[name], name
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_full_leaves_a_model_that_transformers_reads(files, rows, tmp_path):
    torch = pytest.importorskip("torch")
    begin.train(arguments(files, rows, tmp_path, method="full", rank=None, steps=3))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert theirs.config.id2label == dict(enumerate(NAMES))
    model, params = hf.load_pretrained(tmp_path / "model", jnp.float32)
    batch = next(prepare(arguments(files, rows, tmp_path / "x")).data.train)[0]
    theirs.config.pad_token_id = 0
    with torch.no_grad():
        expected = theirs(
            torch.tensor(np.where(batch["segment_ids"], batch["tokens"], 0)).long(),
            attention_mask=torch.tensor(batch["segment_ids"]).long(),
        ).logits
    np.testing.assert_allclose(model.classify(params, batch), expected, rtol=1e-4, atol=1e-5)
    # It has a classifier of its own now, with labels in its order.
    report = begin.train(arguments(files, rows, tmp_path.with_name("on"), model=str(tmp_path / "model"), steps=1))
    first = [row for row in read(tmp_path / "metrics.jsonl") if row["split"] == "eval"][-1]
    assert report["eval_loss_before"] == pytest.approx(first["loss"], rel=1e-5)


def test_a_regression(files, rows, tmp_path):
    for name in ("train", "eval"):
        lines = [json.loads(line) for line in (rows / f"{name}.jsonl").read_text().splitlines()]
        made = [{"text": row["text2"], "label": row["label"] - 0.5} for row in lines]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    report = begin.train(arguments(files, tmp_path, tmp_path / "run", steps=40, eval_every=20, checkpoint_every=0))
    assert report["mse_after"] == report["eval_loss_after"] < report["mse_before"]
    assert report["pearson_after"] > 0.7 and report["spearman_after"] > 0.7
    assert "accuracy_after" not in report


def test_a_method_without_a_peft_form_leaves_an_adapter_of_our_own(files, rows, tmp_path):
    """A linear probe: nothing but the classifier trains."""
    probe = {"method": "full", "rank": None, "method_options": ("which=^classifier/",), "steps": 3}
    report = begin.train(arguments(files, rows, tmp_path / "run", **probe))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "JAXPEFT"
    further = {"adapter": tmp_path / "run" / "adapter", "rank": None, "steps": 1}
    again = begin.train(arguments(files, rows, tmp_path / "on", **further))
    assert again["eval_loss_before"] == pytest.approx(report["eval_loss_after"], rel=1e-6)
    assert again["trainable_parameters"] == report["trainable_parameters"] == 3 * 16


def test_minilm_begins_and_trains(rows, tmp_path):
    """An encoder, with its own tokenizer and token types."""
    from jaxpeft import assets

    try:
        folder = assets.minilm()
    except jp.InputError:
        pytest.skip("all-MiniLM-L6-v2 is not installed")
    report = begin.train(arguments(tmp_path, rows, tmp_path / "run", model=str(folder), steps=4, lr=1e-3, warmup=0))
    assert report["eval_loss_after"] < report["eval_loss_before"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]


@pytest.mark.slow
def test_a_run_from_a_file_without_validation(files, rows, tmp_path, capsys):
    settings = {"task": "classify", "model": files / "model", "data": rows / "train.jsonl", "steps": 2, "seq-len": 16}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    flags = ["--config", str(tmp_path / "run.yaml"), "--dtype", "float32", "--out", str(tmp_path / "run"), "--json"]
    assert cli.main(["train", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["eval_loss_after"], report["examples"]["data"]["labels"]) == (2, None, 3)
    assert "accuracy_after" not in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "--task classify: needs --data"),
        ({"task": "lm", "model": "labelled"}, "continues no text; add --task classify"),
        ({"eval_data": "odd"}, "odd.jsonl:1: label 'ends with x' is not one of those trained on: ends with a"),
        ({"seq_len": 65}, "--seq-len 65: "),
        ({"targets": "classifer"}, "targets 'classifer': matches no linear site"),
    ],
)
def test_one_line_for_a_mistake(files, rows, tmp_path, capsys, changes, message):
    if changes.get("eval_data") == "odd":
        changes = {"eval_data": str(tmp_path / "odd.jsonl")}
        (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "a", "label": "ends with x"}) + "\n")
    if "model" in changes:
        changes = {**changes, "model": str(labelled(files, tmp_path))}
    assert cli.main(["train", *runs.flags(arguments(files, rows, tmp_path / "run", **changes))]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def labelled(files, folder):
    """The small model with a classifier, and its tokenizer."""
    _, params = hf.load_pretrained(files / "model", jnp.float32, NAMES, jax.random.key(0))
    hf.save_pretrained(folder / "labelled", files / "model", params, labels=NAMES)
    return folder / "labelled"
