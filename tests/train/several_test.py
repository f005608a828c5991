"""`train --adapters`: each adapter learns of its own rows as in a run of its own, and leaves in PEFT's form."""

import json
import shutil

import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import cli, data
from jaxpeft.cli import train as command
from jaxpeft.data import by_adapter
from jaxpeft.data.records import Record
from jaxpeft.errors import InputError
from jaxpeft.hf import load_tokenizer
from jaxpeft.peft.read import specs_of, tensors_of
from jaxpeft.train import report, several
from jaxpeft.train.run import Run
from tests import runs

NAMES = ("tidy", "wide", "wide")  # of the rows, again and again


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and rows that name an adapter; of each alone: NAME.jsonl."""
    folder = runs.make_files(tmp_path_factory.mktemp("files"))
    for part in ("train", "eval"):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        named = [{**row, "adapter": NAMES[i % 3]} for i, row in enumerate(rows)]
        write(folder / f"{part}.jsonl", named)
        if part == "train":
            for name in ("tidy", "wide"):
                write(folder / f"{name}.jsonl", [row for row in named if row["adapter"] == name])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fields(files, **changes):
    common = {"model": str(files / "model"), "data": str(files / "train.jsonl"), "rank": 2, "steps": 4, "batch_size": 6}
    common |= {"seq_len": 32, "lr": 1e-2, "warmup": 0, "schedule": "constant", "dtype": "float32", "samples": 0}
    return {**common, "eval_every": 0, "checkpoint_every": 2, "compile_cache": False, **changes}


def loaded(files, part, names=("tidy", "wide"), **more):
    tokenizer = load_tokenizer(files / "model")
    return data.load_examples(files / f"{part}.jsonl", tokenizer, 32, adapters=names, **more)[0]


@pytest.mark.parametrize("layout", [{"pack": True}, {"buckets": (8, 16)}])
def test_each_batch_has_rows_of_each_adapter(files, layout):
    """As many as its data ask for; they are those that it has alone; a saved position goes on."""
    examples = loaded(files, "train")
    part = lambda some, rows: data.make_batches(some, rows, 32, 5, **layout)
    make = lambda: by_adapter.make(examples, ["tidy", "wide"], 6, "pack" in layout, part, "train.jsonl")
    own, alone = make(), {name: part(loaded_alone(files, name), rows) for name, rows in (("tidy", 2), ("wide", 4))}
    for _ in range(9):
        (batch, lines), parts = next(own), {name: next(batches)[0] for name, batches in alone.items()}
        assert batch["adapter"].tolist() == [0, 0, 1, 1, 1, 1] and len(lines) == 6
        for rows, name in ((slice(2), "tidy"), (slice(2, 6), "wide")):
            for field in ("tokens", "targets", "loss_weights", "positions", "segment_ids"):
                width = parts[name][field].shape[1]
                np.testing.assert_array_equal(batch[field][rows, :width], parts[name][field], err_msg=field)
                assert not batch[field][rows, width:].any()
        numbers = batch["example_ids"]
        assert {(i - 1) % 3 == 0 for i in numbers[:2].ravel() if i} == {True}  # rows 1, 4, 7, ... are tidy's
        assert {(i - 1) % 3 == 0 for i in numbers[2:].ravel() if i} == {False}
    other = make().hold([1, 2])
    other.set_state(json.loads(json.dumps(own.get_state())))
    (batch, _), (held, _) = next(own), next(other)
    assert all(np.array_equal(batch[field][1:3], held[field]) for field in batch) and own.tokens == other.tokens
    assert set(own.used()) == set(np.concatenate([x.ids[:-1] for x in examples])) | {0}


def loaded_alone(files, name):
    return data.load_examples(files / f"{name}.jsonl", load_tokenizer(files / "model"), 32)[0]


def test_every_row_is_evaluated_once(files):
    batches = list(by_adapter.evaluation(loaded(files, "eval"), 4, 32, pack=False))
    assert [batch["adapter"].tolist() for batch, _ in batches] == [[0] * 4, [1] * 4, [1] * 4]
    assert sorted(i for batch, _ in batches for i in np.unique(batch["example_ids"]) if i) == [*range(1, 13)]


@pytest.mark.slow
def test_a_run_that_is_continued_is_the_same_run(files, tmp_path, capsys):
    """Bit for bit; each adapter at its own rank, with its own validation loss; `export` writes a checkpoint of all.

    `plan` has said before what its report says of memory.
    """
    own = fields(files, adapters=["tidy", "wide"], method_options={"wide": {"rank": 5}, "dropout": 0.1})
    own |= {"eval_data": str(files / "eval.jsonl")}
    whole = jp.run(**own, out=tmp_path / "whole")
    jp.run(**{**own, "steps": 2}, out=tmp_path / "parts")
    parts = jp.run(**own, out=tmp_path / "parts", resume=True)
    assert parts["resumed_from"] == 2 and parts["adapters"] == whole["adapters"]
    assert whole["method"] == "tidy (lora), wide (lora)" and not (tmp_path / "whole" / "adapter").exists()
    losses = [whole["adapters"][name]["eval_loss_after"] for name in ("tidy", "wide")]
    assert min(losses) < whole["eval_loss_after"] < max(losses)
    capsys.readouterr()
    step = ["--model", own["model"], "--batch-size", "6", "--seq-len", "32", "--dtype", "float32", "--target", "cpu"]
    options = ["--adapters", "tidy", "wide", "--rank", "2", "--method-options", "wide.rank=5", "dropout=0.1"]
    assert cli.main(["plan", *step, *options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["method"] == whole["method"]
    assert {name: row["bytes"][name] for name in report.MEMORY} == {
        name: whole["memory_bytes"][name] for name in report.MEMORY
    }
    out = ["--run", str(tmp_path / "whole"), "--step", "4", "--out", str(tmp_path / "exported")]
    assert cli.main(["export", *out]) == 0
    for name, rank in (("tidy", 2), ("wide", 5)):
        folders = [tmp_path / "whole/adapters" / name, tmp_path / "parts/adapters" / name, tmp_path / "exported" / name]
        one, *others = (tensors_of(folder) for folder in folders)
        assert {min(x.shape) for x in one.values()} == {rank} and any(x.any() for key, x in one.items() if "_B" in key)
        assert all(np.array_equal(x, other[key]) for other in others for key, x in one.items())
        assert specs_of(folders[0])[0].config["dropout"] == 0.1
    # One that went on is finished for those that it went on from, and for no others.
    start = {"tidy": tmp_path / "whole/adapters/tidy", "wide": None}
    asked = {**fields(files, steps=1, lr=1e-2), "out": tmp_path / "on"}
    once = jp.run(**asked, adapters=start)
    assert jp.run(**asked, adapters=start, resume=True) == json.loads(json.dumps(once, default=str))
    shutil.copytree(start["tidy"], tmp_path / "moved")
    assert jp.run(**asked, adapters={**start, "tidy": tmp_path / "moved"}, resume=True)["steps"] == 1
    with pytest.raises(
        InputError, match=r"begun otherwise: --adapters tidy=.*tidy wide -> tidy=.*on.* \(other content"
    ):
        jp.run(**asked, adapters={**start, "tidy": tmp_path / "on/adapters/tidy"}, resume=True)


@pytest.mark.slow
def test_each_learns_as_in_a_run_of_its_own(files, tmp_path):
    """Of those that go on from folders: Adam sees the same gradients, of the same rows, whoever else is there."""
    begun = fields(
        files, adapters={"tidy": None, "wide": None}, method_options={"tidy": {"method": "lora_fa"}}, steps=1
    )
    jp.run(**begun, out=tmp_path / "begun")
    start = {name: tmp_path / "begun/adapters" / name for name in ("tidy", "wide")}
    own = fields(files, clip=None, rank=None)
    both = {**own, "adapters": start, "out": tmp_path / "both", "eval_data": str(files / "eval.jsonl"), "samples": 3}
    report = jp.run(**both)
    assert report["overlap_after"] is not None and report["sample"]["prompt"] == "4+0="
    for name, rows in (("tidy", 2), ("wide", 4)):
        alone = {**own, "data": str(files / f"{name}.jsonl"), "batch_size": rows, "adapter": start[name]}
        jp.run(**alone, out=tmp_path / name)
        expected, found = (tensors_of(tmp_path / at) for at in (f"{name}/adapter", f"both/adapters/{name}"))
        before = tensors_of(start[name])
        assert any(not np.array_equal(x, before[key]) for key, x in found.items())
        for key, x in expected.items():
            np.testing.assert_allclose(found[key], x, rtol=1e-4, atol=1e-5, err_msg=key)
    assert specs_of(tmp_path / "both/adapters/tidy")[0].name == "lora_fa"


def test_the_command_line_and_yaml_say_what_python_says(files, tmp_path, monkeypatch):
    """--adapter NAME=FOLDER, as `generate` has it, and --adapters; in YAML lists or mappings."""
    seen = []
    monkeypatch.setattr(command.of_train, "run", lambda run: seen.append(run) or {})
    monkeypatch.setattr(command, "show", lambda report: None)
    (tmp_path / "one.yaml").write_text("adapter: {a: x, b: y}\n")
    (tmp_path / "two.yaml").write_text("adapters: {a: x, b: null}\nmethod_options: {b: {rank: 3}}\n")
    for flags, adapters in (
        (["--adapter", "a=x", "--adapter", "b=y"], {"a": "x", "b": "y"}),
        (["--config", str(tmp_path / "one.yaml")], {"a": "x", "b": "y"}),
        (["--adapters", "a=x", "b"], {"a": "x", "b": None}),
        (["--adapters", "a,b"], {"a": None, "b": None}),
        (["--adapter", "a=x", "--adapters", "b"], {"a": "x", "b": None}),
        (["--config", str(tmp_path / "two.yaml")], {"a": "x", "b": None}),
    ):
        assert cli.main(["train", *flags]) == 0
        assert several.read(seen[-1].adapters) == several.read(Run(adapters=adapters).adapters) and not seen[-1].adapter
    found = several._options(seen[-1].method_options, ["a", "b"])
    assert found == several._options(("b.rank=3",), ["a", "b"]) == ({}, {"a": {}, "b": {"rank": 3}})
    assert cli.main(["train", "--adapter", str(tmp_path)]) == 0 and seen[-1].adapter == tmp_path
    assert cli.main(["train", "--adapter", "a=x", "--adapter", "y"]) == 2 and len(seen) == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapters": ["a", "b", "a"]}, "the name 'a' stands twice"),
        ({"adapters": ["a", "b="]}, "'b=': must be NAME or NAME=FOLDER"),
        ({"adapters": ["a=nowhere"]}, "--adapters a=nowhere: no such directory"),
        ({"adapters": ["none"]}, "the adapter's name 'none' should be"),
        ({"adapters": ["a"], "adapter": "run"}, "has no name beside --adapters"),
        ({"adapters": ["a"], "task": "classify", "data": "x"}, "rows that are classified have one classifier"),
        ({"adapters": ["a"], "rounds": 2}, "--rounds 2: has no effect with --adapters"),
        ({"adapters": ["a", "b"], "batch_size": 1}, "each of 2 adapters has a row in each step"),
        ({"adapters": ["a"], "method": "dora"}, "adapter 'a': dora is more than a pair of factors"),
        ({"adapters": ["a"], "method": "meft+lora"}, r"adapter 'a': is of meft\+lora; several at once are lora"),
        ({"adapters": ["a"], "method_options": ["a.rnk=3"]}, "adapter 'a': method lora takes no rnk"),
        ({"adapters": ["a"], "method_options": ["a=3"]}, "method option a: should be a mapping of its options"),
        ({"adapters": ["a", "b"], "method_options": ["a.method=quantize+lora"]}, "by quantize and by nothing"),
        ({"adapters": ["lora", "b"], "method_options": ["lora.rank=3"]}, "of the method lora or of the adapter"),
        ({"adapters": ["a={files}"], "rank": 3}, "--adapters: each brings its own rank"),
        ({"adapters": ["a={files}", "b"], "method_options": ["a.rank=3"]}, "brings its own rank; leave these out"),
    ],
)
def test_what_makes_no_sense_is_refused(files, changes, reason):
    named = {
        key: [x.format(files=files) for x in value] if key == "adapters" else value for key, value in changes.items()
    }
    with pytest.raises(InputError, match=reason):
        Run(**named).settled().check()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["tidy=run"], "--adapters tidy=run: a plan reads no adapter; give tidy, and tidy.rank=... of it"),
        (["a", "b", "--batch-size", "1"], "each of 2 adapters has a row in each step"),
        (["a", "--task", "classify"], "rows that are classified have one classifier"),
    ],
)
def test_a_plan_refuses_what_it_cannot_see(asked, said, capsys):
    assert cli.main(["plan", "--adapters", *asked]) == 2
    assert said in capsys.readouterr().err


def test_rows_name_their_adapter(files, tmp_path):
    for row, reason in (
        ({}, "file:3: field adapter is missing: of several, each row names one of tidy, wide"),
        ({"adapter": None}, "field adapter is missing"),
        ({"adapter": ["tidy", "wide"]}, "field adapter must be a name, a string, found array"),
        ({"adapter": "tydy"}, "file:3: no adapter is called 'tydy'; did you mean tidy"),
    ):
        with pytest.raises(InputError, match=reason):
            Record(3, "file:3", {}).source(row, ("tidy", "wide"))
    with pytest.raises(InputError, match=r"train.jsonl: no row is left to train adapter 'x' on"):
        examples = loaded(files, "train", ("tidy", "wide", "x"))
        by_adapter.make(examples, ["tidy", "wide", "x"], 6, False, lambda *_: None, "train.jsonl")
    with pytest.raises(InputError, match="no adapter is called 'wide'"):
        loaded(files, "train", ("tidy",))
    assert len(loaded(files, "train", ("tidy",), skip_bad_lines=True)) == 20
