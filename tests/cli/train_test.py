"""What the train command hands on, from flags and from a file."""

import sys
import types
from pathlib import Path

import pytest

from jaxpeft import cli
from jaxpeft.cli.train import Train
from jaxpeft.train.run import Run


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """The runs that reach the loop, which does nothing; the working directory is empty."""
    found = []
    begin = types.ModuleType("jaxpeft.train.begin")
    begin.train = lambda run: found.append(run) or {"steps": run.steps}
    monkeypatch.setitem(sys.modules, "jaxpeft.train.begin", begin)
    monkeypatch.chdir(tmp_path)
    return found


def test_run_hands_the_loop_a_run_with_an_output_folder(seen, capsys):
    assert cli.main(["train", "--steps", "3", "--json"]) == 0
    assert cli.main(["train", "--steps", "3", "--out", "here", "--json"]) == 0
    settled = {"steps": 3, "seq_len": 256, "lr": 2e-3, "weight_decay": 0.0}
    assert seen == [Run(out=Path("out/run-1"), **settled), Run(out=Path("here"), **settled)]
    assert all(type(run) is Run for run in seen)
    assert capsys.readouterr().out == '{\n  "steps": 3\n}\n' * 2


CHAINS = {
    "nested": "method: meft+lora\nmethod_options:\n"
    "  meft: {width: 16, lam: 1/8}\n  lora: {rank: 4, rank_pattern: {v: 2, q: 1}}",
    "flat": "method: meft+lora\nmethod-options: {meft.width: 16, lam: 1/8, lora.rank: 4, rank_pattern: {v: 2, q: 1}}",
    "list": "method: meft+lora\nmethod_options: [width=16, lam=1/8, lora.rank=4, 'rank_pattern={v: 2, q: 1}']",
}


@pytest.mark.parametrize("text", CHAINS.values(), ids=CHAINS)
def test_a_chain_in_a_file_is_that_of_the_flags(text, seen, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert cli.main(["train", "--config", "run.yaml", "--json"]) == 0
    flags = ["meft.width=16", "meft.lam=1/8", "lora.rank=4", "lora.rank_pattern={v: 2, q: 1}"]
    assert cli.main(["train", "--method", "meft+lora", "--method-options", *flags, "--json"]) == 0
    from_file, from_flags = (run.make_method().specs for run in seen)
    assert from_file == from_flags
    assert list(from_file[1].config["rank_pattern"]) == ["v", "q"]  # the first match wins
    capsys.readouterr()


def test_a_quoted_value_is_text_and_a_number_without_a_dot_is_one(seen, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("lr: 1e-4\nmethod_options: {alpha: 2e1, targets: '8'}")
    assert cli.main(["train", "--config", "run.yaml", "--json"]) == 0
    (run,) = seen
    (spec,) = run.make_method().specs
    assert (run.lr, spec.config["alpha"], spec.config["targets"]) == (1e-4, 20.0, "8")
    capsys.readouterr()


def test_a_list_of_targets_is_the_same_run_in_a_file_as_names_with_commas(seen, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("targets: [q_proj, v_proj]")
    assert cli.main(["train", "--config", "run.yaml", "--json"]) == 0
    assert cli.main(["train", "--targets", "q_proj,v_proj", "--json"]) == 0
    assert [run.targets for run in seen] == ["q_proj,v_proj"] * 2
    assert Run(targets=["q_proj", "v_proj"]) == Run(targets="q_proj,v_proj")
    capsys.readouterr()


def test_the_command_has_every_field_of_a_run():
    names = [name for name in vars(Train()) if name not in ("config", "json")]
    assert names == list(vars(Run()))
