"""The report as dict and as tables, the picture, and the overlap score."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies

from jaxpeft.train import report

MEMORY = dict(zip(report.MEMORY, (2**30, 2**20, 2 * 2**20, 2**20, 300 * 2**20, 2**20), strict=True))


def build(**changes):
    arguments = {
        "out": Path("out/run-1"),
        "method": "lora",
        "steps": 200,
        "tokens": 12345,
        "seconds": 12.34567,
        "train_loss": 1.25,
        "eval_loss": (3.5, 1.5),
        "overlap": (0.125, 0.5),
        "sample": {
            "prompt": "def f():",
            "reference": "Return [one].",
            "before": "def def",
            "after": "Return two.",
        },
        "trainable_parameters": 1000,
        "frozen_parameters": 99000,
        "memory": MEMORY,
    }
    return report.build_report(**{**arguments, **changes})


def test_the_dict_is_json_with_the_documented_keys():
    made = build(skipped_lines=3)
    assert json.loads(json.dumps(made)) == made
    assert made["total_parameters"] == 100000
    assert made["out"] == "out/run-1"
    assert made["skipped_lines"] == 3
    assert {"steps", "train_loss", "eval_loss_before", "eval_loss_after"} <= set(made)
    assert made["memory_bytes"]["activations"] == 300 * 2**20


def test_a_missing_memory_figure_is_an_error():
    without = {name: size for name, size in MEMORY.items() if name != "gradients"}
    with pytest.raises(ValueError, match="gradients"):
        build(memory=without)


def test_the_tables_hold_what_the_dict_holds(capsys):
    report.print_report(build())
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    for row in (
        "validation loss 3.5000 1.5000",
        "overlap (ROUGE-L) 0.1250 0.5000",
        "trainable 1,000 1.00%",
        "frozen 99,000 99.00%",
        "total 100,000 100.00%",
        "weights 1.00 GiB",
        "adapters 1.00 MiB",
        "optimizer 2.00 MiB",
        "gradients 1.00 MiB",
        "activations 300.00 MiB",
        "Return [one].",
        "def def",
        "written to out/run-1",
    ):
        assert row.split() in lines


def test_what_a_run_has_no_value_for_is_left_out(capsys):
    report.print_report(build(eval_loss=(None, None), overlap=(None, None), sample=None))
    shown = capsys.readouterr().out
    assert "validation" not in shown and "ROUGE" not in shown and "reference" not in shown
    assert "1,000" in shown


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (3 * 2**30, "3.00 GiB"),
        (5 * 2**40, "5.00 TiB"),
        (5 * 2**50, "5120.00 TiB"),
    ],
)
def test_human_bytes(size, text):
    assert report.human_bytes(size) == text


def test_the_curve_draws_both_losses(tmp_path):
    import matplotlib.image

    def picture(rows):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report.write_curve(path, tmp_path / "loss.png")
        return matplotlib.image.imread(tmp_path / "loss.png")

    train = [{"step": s, "split": "train", "loss": 3.0 / s} for s in range(1, 9)]
    train.append({"step": 9, "split": "train", "loss": None})
    evaluation = [{"step": s, "split": "eval", "loss": 4.0 / s} for s in (1, 8)]
    both, only_train, empty = picture(train + evaluation), picture(train), picture([])
    assert both.shape == only_train.shape == empty.shape
    assert (both != only_train).any() and (only_train != empty).any()


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Return the sum.", "return the sum", 1.0),
        ("", "", 1.0),
        ("", "word", 0.0),
        ("...", "word", 0.0),
        ("a b c d", "x y", 0.0),
        # Lin (2004): common subsequences of 3 and 2 words out of 4 and 4.
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        # Order counts, gaps do not: 2 of 3 and 2 of 5.
        ("b c a", "a x b y c", 0.5),
    ],
)
def test_rouge_l(prediction, reference, score):
    assert report.rouge_l(prediction, reference) == pytest.approx(score)


def longest_by_definition(a: tuple, b: tuple) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_by_definition(a[:-1], b[:-1])
    return max(longest_by_definition(a[:-1], b), longest_by_definition(a, b[:-1]))


WORDS = strategies.lists(strategies.sampled_from("abc"), min_size=1, max_size=6)


@given(WORDS, WORDS)
def test_rouge_l_is_the_recursive_definition(a, b):
    common = longest_by_definition(tuple(a), tuple(b))
    expected = 2 * common / (len(a) + len(b))
    assert report.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)
    assert report.rouge_l(" ".join(b), " ".join(a)) == pytest.approx(expected)
