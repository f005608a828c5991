"""The train command's own checks, and what it hands on."""

import dataclasses
import sys
import types
from pathlib import Path

import pytest

from jaxpeft import cli
from jaxpeft.cli import train
from jaxpeft.cli.arguments import settled
from jaxpeft.cli.train import Train
from jaxpeft.errors import InputError


def test_no_arguments_are_a_whole_run():
    train.check(settled(Train()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"batch_size": -1}, "--batch-size -1"),
        ({"seq_len": 1}, "--seq-len 1"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"clip": float("inf")}, "--clip inf"),
        ({"weight_decay": float("nan")}, "--weight-decay nan"),
        ({"rank": 0}, "--rank 0: must be at least 1"),
        ({"accumulate": 3}, "--accumulate 3: must divide --batch-size 8"),
        ({"buckets": (64,)}, "--no-pack"),
        ({"buckets": (1024,), "pack": False}, "--buckets 1024"),
        ({"resume": True}, "--resume: needs --out"),
        ({"method_options": ("dropout",)}, "'dropout': must be NAME=VALUE"),
        ({"method_options": ("a=1", "a=2")}, "a is given twice"),
        ({"method_options": ("rank=1",), "rank": 2}, "rank is given twice"),
        ({"method_options": ("a=[",)}, "not YAML"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(InputError) as caught:
        train.check(settled(dataclasses.replace(Train(), **changes)))
    assert message in str(caught.value)


def test_method_settings_are_those_given_with_their_types():
    options = ("dropout=0.1", "init=pissa", "lr_ratio=1e1", "rslora=true", "ranks={q_proj: 4}")
    settings = train.method_settings(Train(rank=8, targets=".*q_proj", method_options=options))
    assert settings == {
        "rank": 8,
        "targets": ".*q_proj",
        "dropout": 0.1,
        "init": "pissa",
        "lr_ratio": 10.0,
        "rslora": True,
        "ranks": {"q_proj": 4},
    }
    assert train.method_settings(Train()) == {}


def test_fresh_directory_is_the_first_free_one(tmp_path):
    assert train.fresh_directory(tmp_path / "out") == tmp_path / "out" / "run-1"
    for name in ("run-1", "run-2", "run-4"):
        (tmp_path / name).mkdir()
    assert train.fresh_directory(tmp_path) == tmp_path / "run-3"
    assert not (tmp_path / "run-3").exists()


def test_run_hands_the_loop_an_output_folder(monkeypatch, tmp_path, capsys):
    seen = []
    loop = types.ModuleType("jaxpeft.train.loop")
    loop.train = lambda args: seen.append(args) or {"steps": args.steps}
    monkeypatch.setitem(sys.modules, "jaxpeft.train.loop", loop)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--steps", "3", "--json"]) == 0
    assert cli.main(["train", "--steps", "3", "--out", "here", "--json"]) == 0
    assert [args.out for args in seen] == [Path("out/run-1"), Path("here")]
    assert capsys.readouterr().out == '{\n  "steps": 3\n}\n' * 2
