"""The experiment's search and summary on made-up losses, and the whole script at its smallest on real data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import lora_fa_quality as quality
from experiments import tuning
from jaxpeft.data import Example


def row(method: str, rank: int, lr: float, seed: int, test: float, tune: float = 1.0, **further) -> dict:
    own = {"dataset": "dolly", "method": method, "rank": rank, "lr": lr, "seed": seed, "trainable": 100 * rank}
    return own | {"test_loss": test, "tune_loss": tune} | further


def test_grid_has_one_digit_and_is_inverted() -> None:
    rates = [tuning.rate(index) for index in range(-9, 2)]
    assert rates == [0.006, 0.01, 0.02, 0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.0, 2.0]
    assert [tuning.place(lr) for lr in rates] == list(range(-9, 2))


@pytest.mark.parametrize("start", [-12, -6, -5, 0])
@pytest.mark.parametrize("stride", [1, 2])
def test_search_ends_where_both_neighbours_are_worse(start: int, stride: int) -> None:
    tried = {}

    def loss(index: int) -> float:
        tried[index] = math.nan if index > -2 else (index + 6.1) ** 2
        return tried[index]

    best = tuning.search(loss, start, stride)
    assert best == (-6 if (start + 6) % stride == 0 else -7)
    assert {best - stride, best, best + stride} <= tried.keys()


def test_search_stays_on_a_plateau() -> None:
    assert tuning.search(lambda index: 1.0, -4, 1) == -4


def test_hold_out_shares_no_prompt() -> None:
    def example(prompt: int, answer: int) -> Example:
        return Example(np.array([prompt, 50, answer], np.int32), np.array([False, False, True]), answer)

    rows = [example(prompt, answer) for answer in range(2) for prompt in range(7)]
    train, tune = quality.hold_out(rows, 3)
    assert [int(e.ids[0]) for e in tune] == [2, 5, 2, 5]
    assert len(train) + len(tune) == len(rows)
    assert not {int(e.ids[0]) for e in train} & {2, 5}


def test_summary_takes_the_best_rate_and_the_spread_over_its_seeds() -> None:
    rows = [
        row("lora", 8, 2e-3, 0, test=1.0, tune=2.0),  # the lower test loss must not be what decides
        row("lora", 8, 3e-3, 0, test=1.2, tune=1.5),
        row("lora", 8, 6e-3, 0, test=9.0, tune=math.nan),
        row("lora", 8, 3e-3, 1, test=1.3),
        row("lora", 8, 3e-3, 2, test=1.7),
    ]
    (summary,) = quality.summarise(rows)
    assert summary["lr"] == 3e-3
    assert summary["test_losses"] == {0: 1.2, 1: 1.3, 2: 1.7}
    assert summary["test_mean"] == pytest.approx(1.4)
    assert summary["test_std"] == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert summary["tune_mean"] == pytest.approx((1.5 + 1.0 + 1.0) / 3)
    assert summary["interior"]
    assert summary["rates"] == {2e-3: 2.0, 3e-3: 1.5}


def test_summary_tells_a_best_rate_at_the_edge() -> None:
    rows = [row("lora", 8, 2e-3, 0, 1.0, tune=2.0), row("lora", 8, 3e-3, 0, 1.0, tune=1.5)]
    (summary,) = quality.summarise(rows)
    assert (summary["lr"], summary["interior"], summary["test_std"]) == (3e-3, False, None)


def test_gaps_are_taken_seed_by_seed() -> None:
    rows = [row("base", 0, 0.0, 0, test=3.0, tune=5.0)]
    rows += [row("lora", 4, 0.01, seed, test) for seed, test in enumerate((1.0, 2.0, 3.0))]
    rows += [row("lora_fa", 4, 0.03, seed, test, tune=1.4) for seed, test in enumerate((1.1, 2.2, 3.3))]
    rows += [row("lora_fa", 8, 0.03, seed, test) for seed, test in enumerate((0.9, 1.9, 2.9))]
    summary = quality.summarise(rows)
    (same_rank,) = (gap for gap in quality.gaps(summary) if gap["rank"] == 4)
    assert (same_rank["rank"], same_rank["lora_rank"], same_rank["parameters"]) == (4, 4, 1.0)
    assert same_rank["test_mean"] == pytest.approx(0.2)
    assert same_rank["test_std"] == pytest.approx(0.1)
    assert same_rank["test_share"] == pytest.approx(0.2)
    assert same_rank["tune_mean"] == pytest.approx(0.4)
    assert same_rank["tune_share"] == pytest.approx(0.1)
    (twice,) = quality.gaps(summary, 2)
    assert (twice["rank"], twice["lora_rank"], twice["parameters"]) == (8, 4, 2.0)
    assert (twice["test_mean"], twice["test_std"]) == (pytest.approx(-0.1), pytest.approx(0.0))


@pytest.mark.slow
def test_quick_run_on_real_data(shared_data: Path, tmp_path: Path) -> None:
    args = quality.Quality(data_root=shared_data, out=tmp_path, methods=("lora", "lora_fa"), quick=True)
    quality.main(args)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(run["dataset"], run["method"], run["rank"]) for run in runs] == [
        (dataset, method, rank)
        for method, rank in (("base", 0), ("lora", 8), ("lora_fa", 8))
        for dataset in ("e2e_nlg", "dolly")
    ]
    assert all(np.isfinite([run["tune_loss"], run["test_loss"]]).all() for run in runs)
    losses = {(run["dataset"], run["method"]): run["test_loss"] for run in runs}
    for dataset in quality.DATASETS:  # two steps at a high rate already move away from the base
        assert losses[dataset, "lora"] < losses[dataset, "base"]
        assert losses[dataset, "lora_fa"] < losses[dataset, "base"]
    (lora,) = {run["trainable"] for run in runs if run["method"] == "lora"}
    (lora_fa,) = {run["trainable"] for run in runs if run["method"] == "lora_fa"}
    assert lora_fa / lora == pytest.approx(600 / 1156)  # outputs over inputs and outputs of the seven kernels
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "| dolly | lora_fa | 8 | 24,000 | 0.01 (edge) |" in table
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 7
    assert len(json.loads((tmp_path / "summary.json").read_text())["gap_at_equal_rank"]) == 2

    quality.main(args)  # a second call finds every run and does none
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(runs)
