"""What `jaxpeft train` refuses: one line, status 2, and nothing written or changed."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxpeft import cli
from jaxpeft.files import write_json
from jaxpeft.train import begin, config
from jaxpeft.train.loop import Loop
from tests import runs


def refused(args, capsys) -> str:
    """The one line on stderr of a train command that is refused."""
    capsys.readouterr()
    assert cli.main(["train", *runs.flags(args)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


@pytest.mark.parametrize("there", [False, True])
def test_what_is_seen_only_in_a_step_leaves_nothing(files, tmp_path, capsys, there):
    """So that the folder takes the run that the line asks for; what was in it stays."""
    out = tmp_path / "run"
    if there:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    args = runs.arguments(files, out, method="hybrid+mezo", rank=None, steps=2, eval_every=0, samples=0, warmup=0)
    assert cli.main(["train", *runs.flags(args)]) == 2
    assert "hybrid: stands in front of what replaces the gradient" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in out.iterdir()] == ["notes.txt"] if there else not out.exists()


def test_a_step_for_which_there_is_not_the_memory_leaves_nothing(files, tmp_path, capsys):
    """A first step that does not fit is refused in one line, and the folder takes the next try."""
    out = tmp_path / "run"
    changes = {"method": "natural_galore", "rank": 2, "method_options": ("history=1000000000",)}
    args = runs.arguments(files, out, **changes, steps=2, eval_every=0, samples=0, warmup=0)
    assert cli.main(["train", *runs.flags(args)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("jaxpeft: error: out of memory: ") and "`jaxpeft plan`" in line
    assert not out.exists()


def test_a_later_step_for_which_there_is_not_the_memory_says_what_is_left(files, tmp_path, capsys, monkeypatch):
    def fails_at_the_third(loop, *args, before=Loop._next_round):
        if loop.done == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand more")
        return before(loop, *args)

    monkeypatch.setattr(Loop, "_next_round", fails_at_the_third)
    args = runs.arguments(files, tmp_path / "run", steps=4, checkpoint_every=1, eval_every=0, samples=0, warmup=0)
    assert cli.main(["train", *runs.flags(args)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes; " in line and "last good checkpoint: step 2" in line
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such/model"}, "no/such/model: no such directory"),
        ({"data": "none.jsonl"}, "none.jsonl: no such file"),
        ({"eval_data": "none.jsonl"}, "none.jsonl: no such file"),
        ({"method": "lorra"}, "unknown method 'lorra'; nearest: lora"),
        ({"targets": "q_prj"}, "targets 'q_prj': matches no linear site; nearest: q_proj"),
        ({"targets": "q_proj("}, "not a regular expression"),
        ({"rank": 0}, "--rank 0: must be at least 1"),
        ({"rank": 9}, "rank 9 is above the smaller side of"),
        ({"method": "full"}, "method full takes no rank; it takes which"),
        ({"method_options": ("dropout=2",)}, "dropout 2 must be at least 0 and below 1"),
        ({"method_options": ("dropout=high",)}, "method lora: "),
        ({"seq_len": 2, "too_long": "drop"}, "no example left of 60 lines"),
        ({"seq_len": 150}, "model has 64 positions; --rope-scaling yarn=3 (or linear, dynamic) makes room"),
        ({"seq_len": 150, "rope_scaling": "yarn=2"}, "model has 128 positions, and scales them already"),
        ({"rope_scaling": "yarn"}, "--rope-scaling 'yarn': should be linear|dynamic|yarn=FACTOR, such as yarn=4"),
        ({"template": "alpaka"}, "--template alpaka: must be auto, chat, alpaca or a file; no such file"),
        ({"template": "chat"}, "--template chat: the tokenizer has no chat template"),
        ({"template_date": "today"}, "--template-date today: must be a day, YYYY-MM-DD"),
        ({"task": "classify", "template": "chat"}, "--template chat: has no effect with --task classify"),
        ({"keep": 0}, "--keep 0: must be at least 1"),
        ({"method": "meft+", "rank": None}, "method 'meft+': a name is missing beside +"),
        ({"method": "lora+lora"}, "lora+lora: lora stands twice"),
        ({"method": "lst+vqt"}, "method lst+vqt takes no rank; known: lst.reduction"),
        ({"method": "meft+lora", "method_options": ("dropout=0.1",)}, "write meft.dropout or lora.dropout"),
        ({"method": "meft+lora", "method_options": ("vqt.queries=1",)}, "the methods are lora, meft, not vqt"),
        ({"method": "sherl+meft", "rank": None}, "meft: another method of the chain runs the layers in its own way"),
        ({"method": "meft+lst", "rank": None}, "lst: another method of the chain runs the layers in its own way"),
        ({"method": "meft+sherl", "rank": None}, "sherl: another method of the chain runs the layers in its own way"),
        ({"method": "meft+unipt", "rank": None}, "unipt: another method of the chain runs the layers in its own way"),
        ({"adapter": Path("none")}, "--adapter none: brings its own rank; leave these out"),
        ({"adapter": Path("none"), "rank": None}, "--adapter none: no such directory"),
    ],
)
def test_refused_before_anything_is_written(files, tmp_path, capsys, changes, message):
    args = runs.arguments(files, tmp_path / "run", **changes)
    assert message in refused(args, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_is_named_by_file_and_line(files, tmp_path, capsys):
    data = tmp_path / "bad.jsonl"
    data.write_text((files / "train.jsonl").read_text() + "{oops\n")
    assert f"{data}:61: not JSON" in refused(runs.arguments(files, tmp_path / "run", data=str(data)), capsys)


def test_an_id_beyond_the_model_is_refused_though_there_are_fewer_tokens(files, tmp_path, capsys):
    shutil.copytree(files / "model", tmp_path / "model")
    rules = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    assert len(vocabulary) == 40 == runs.CONFIG["vocab_size"]
    vocabulary["z"] = 40  # and none has its old one
    write_json(tmp_path / "model" / "tokenizer.json", rules)
    line = refused(runs.arguments(files, tmp_path / "run", model=str(tmp_path / "model")), capsys)
    assert line.endswith("/model: the tokenizer gives 'z' the id 40; the model's vocab_size is 40")


def test_a_folder_with_a_run_is_left_alone(files, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    line = refused(runs.arguments(files, tmp_path), capsys)
    assert "already holds a run (metrics.jsonl)" in line
    assert "--resume" in line
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("metrics.jsonl", "mine\n")]
    assert "is a file" in refused(runs.arguments(files, tmp_path / "metrics.jsonl"), capsys)


def test_nothing_to_resume(files, tmp_path, capsys):
    assert "holds no run (no config.json)" in refused(runs.arguments(files, tmp_path / "no", resume=True), capsys)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: is not JSON: line 1" in refused(runs.arguments(files, tmp_path, resume=True), capsys)


@pytest.fixture
def begun(files, tmp_path):
    """The arguments of a run that was killed before its first checkpoint."""
    own = tmp_path / "files"
    shutil.copytree(files, own)
    args = runs.arguments(own, tmp_path / "run")
    args.out.mkdir()
    write_json(args.out / "config.json", begin.prepare(args).document)
    return args


def test_resume_lists_every_field_that_differs(begun, files, capsys):
    changed = runs.arguments(files, begun.out, resume=True, lr=0.5, steps=9, rank=None, buckets=())
    line = refused(changed, capsys)
    assert "the run was begun otherwise: --rank 2 -> None; --steps 6 -> 9; --lr 0.01 -> 0.5" in line
    assert "(the cosine schedule ends at step 6; a constant one goes on); named otherwise, too: --data " in line
    assert [path.name for path in begun.out.iterdir()] == ["config.json"]


def test_a_run_of_rounds_has_its_steps(begun, capsys):
    args = dataclasses.replace(begun, rounds=2, round_size=20, schedule="constant")
    write_json(args.out / "config.json", begin.prepare(args).document)
    line = refused(dataclasses.replace(args, resume=True, steps=9), capsys)
    assert "--steps 6 -> 9 (the 2 rounds end at step 6; a run of one round goes on)" in line


@pytest.fixture
def chained(files, tmp_path):
    """Makes arguments that continue a run of a chain, which was killed before its first checkpoint."""
    changes = {"method": "meft+lora", "method_options": ("meft.width=2", "lora.dropout=0.1")}
    args = runs.arguments(files, tmp_path / "run", **changes)
    args.out.mkdir()
    write_json(args.out / "config.json", begin.prepare(args).document)
    return lambda **other: runs.arguments(files, args.out, **{**changes, "resume": True, **other})


@pytest.mark.parametrize(
    "spelt",
    [
        {"method_options": ("lora.dropout=0.10", "width=2")},
        {"method_options": ("lora={dropout: 0.1, rank: 2}", "meft={width: 2}"), "rank": None},
        {"method": "meft + lora"},
    ],
)
def test_resume_takes_the_same_method_in_other_words(chained, spelt):
    args = chained(**spelt)
    old = config.read(args.out)
    asked = config.describe(args, begin.asked_method(args).specs, old["content"])
    config.check_arguments(args.out, old, asked)
    config.check_same(args.out, old, asked)


def test_resume_refuses_another_method(chained, capsys):
    line = refused(chained(method_options=("lora.dropout=0.2", "meft.width=2")), capsys)
    assert "otherwise: --method-options meft.width=2 lora.dropout=0.1 -> lora.dropout=0.2 meft.width=2" in line
    line = refused(chained(method="lora+meft"), capsys)
    assert line.endswith("otherwise: --method meft+lora -> lora+meft")
    line = refused(chained(rank=3, method_options=("lora.dropout=0.10", "meft.width=2")), capsys)
    assert line.endswith("otherwise: --rank 2 -> 3")


def test_resume_compares_files_by_what_they_hold(begun, files, capsys):
    own = begun.out.parent / "files"
    rows = (own / "eval.jsonl").read_text().splitlines()
    (own / "eval.jsonl").write_text("\n".join([json.dumps({"prompt": "a", "completion": "b"}), *rows[1:]]) + "\n")
    line = refused(runs.arguments(own, begun.out, resume=True), capsys)
    assert "--eval-data" in line
    assert "(other content)" in line
    assert "--data" not in line.replace("--eval-data", "")
    # The same files in another place are the same run.
    document = begin.prepare(runs.arguments(files, begun.out)).document
    config.check_same(begun.out, config.read(begun.out), document)
