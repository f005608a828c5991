"""What measures committed figures anew: it knows all that can be, and says what differs."""

import importlib
import json

import jax
import pytest

from experiments import again
from experiments.memory import common

TRAINED_OR_TIMED = {
    "backprop_free/one_table",
    "compare/pruned_base",
    "compare/quality",
    "compressed_loss/runs",
    "coresets/quality",
    "cpu_step/cpu_step",
    "long_data/long_data",
    "lora_fa_quality/summary",
    "memory/meft_quality",
    "memory/meft_step_time",
    "start/start",
    "traffic/causes",
    "traffic/decode_speed",
    "traffic/decoding",
    "traffic/planned_cpu",
}


def test_every_figure_can_be_measured_anew_or_takes_training_or_time() -> None:
    results = common.RESULTS.parent
    found = {str(path.relative_to(results).with_suffix("")) for path in results.glob("*/*.json")}
    assert found == again.MEASURED.keys() | TRAINED_OR_TIMED
    assert not again.MEASURED.keys() & TRAINED_OR_TIMED
    for module in again.MEASURED.values():
        assert callable(importlib.import_module(f"experiments.{module}").measure)


def test_only_figures_of_the_jax_that_runs_are_drawn() -> None:
    rows = [{"x": x, "jax": jax.__version__ if x % 2 else "0.1.0"} for x in range(20)]
    assert [len(again.drawn(rows, count, seed=0)) for count in (3, 100)] == [3, 10]
    assert {row["x"] for row in again.drawn(rows, 10, seed=1)} == set(range(1, 20, 2))
    assert again.drawn(rows, 3, seed=0) == again.drawn(rows, 3, seed=0) != again.drawn(rows, 3, seed=1)


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Writes the rows of an experiment whose step has 100 bytes, 20 of them in a list."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "memory")
    made = {
        "bytes": {"total": 100, "layers": [10, 10]},
        "save": "matmuls",
        "fits": True,
        "seconds": 3.0,
        "cpu_seconds": 2.0,
    }
    monkeypatch.setattr(importlib.import_module("experiments.memory.methods_1b"), "measure", lambda key: made)

    def write(**changed) -> None:
        (tmp_path / "memory").mkdir(exist_ok=True)
        row = {"method": "lora", **made, "seconds": 5.0, "jax": jax.__version__, **changed}
        (tmp_path / "memory/methods_1b.json").write_text(json.dumps([row]))

    return write


def test_the_same_figure_is_the_same(figures, capsys) -> None:
    figures(bytes={"total": 100.4, "layers": [10, 10]}, cpu_seconds=9.0)  # half a percent
    assert again.again("memory/methods_1b", 1, 0)
    assert capsys.readouterr().out.startswith("memory/methods_1b: the same: method lora: ")


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"bytes": {"total": 101, "layers": [10, 10]}}, "bytes.total: 101 -> 100"),
        ({"bytes": {"total": 100, "layers": [10, 0]}}, "bytes.layers.1: 0 -> 10"),
        ({"bytes": {"total": 100, "layers": [10]}}, "bytes.layers.1 is 10, no figure before"),
        ({"bytes": {"total": 100, "layers": [10, 10, 10]}}, "bytes.layers.2 was 10, no figure now"),
        ({"fits": False}, "fits: False -> True"),
        ({"save": "blocks"}, "save: blocks -> matmuls"),
    ],
)
def test_what_differs_is_named(figures, capsys, changed, line) -> None:
    figures(**changed)
    assert not again.again("memory/methods_1b", 1, 0)
    head, said = capsys.readouterr().out.splitlines()
    assert head.startswith("memory/methods_1b: differs: method lora: ") and said == f"  {line}"


def test_a_step_that_is_refused_by_now_differs(figures, monkeypatch, capsys) -> None:
    figures()
    module = importlib.import_module("experiments.memory.methods_1b")
    monkeypatch.setattr(module, "measure", lambda key: {"refused": "no such plan"})
    assert not again.again("memory/methods_1b", 1, 0)
    assert "refused is no such plan, no figure before" in capsys.readouterr().out


def test_without_a_figure_of_this_jax_it_says_so(figures, capsys) -> None:
    figures(jax="0.1.0")
    again.again("memory/methods_1b", 1, 0)
    assert "none measured: no figure of JAX" in capsys.readouterr().out


def test_a_name_without_such_figures_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["again", "memory/abacus"])
    with pytest.raises(SystemExit) as ended:
        again.main()
    assert ended.value.code == 2 and "no figures 'memory/abacus' to be measured anew" in capsys.readouterr().err
