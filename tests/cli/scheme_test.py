"""`jaxpeft scheme`: its file trains what the search has found; mistakes in one line."""

import json

import pytest

import jaxpeft as jp
from jaxpeft import recipe
from jaxpeft.cli import main, parse
from jaxpeft.cli.train import Train
from jaxpeft.methods import pockengine

ROWS = [json.dumps({"prompt": "def f():", "completion": f" return {n}"}) for n in range(40)]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(ROWS) + "\n")
    return file


def call(data, *words):
    sizes = ("--batches", "1", "--batch-size", "2", "--seq-len", "32")
    return main(["scheme", "--data", str(data), "--out", str(data.parent / "scheme.yaml"), *sizes, *words])


def test_the_file_trains_what_the_search_has_found(data, monkeypatch, capsys):
    """Read by `train --config`; the search is given the data's batches, the limit and the kernels as they were said."""
    found, asked = {"layers/3/mlp/up_proj$": 0.25, "layers/2/self_attn/o_proj$": 1.0}, []

    def search(base, params, batches, limit, targets, shares, rate):
        asked.append((batches[0]["tokens"].shape, len(batches), limit, targets, shares, rate))
        return found

    monkeypatch.setattr(pockengine, "search", search)
    monkeypatch.setattr(pockengine, "needs", lambda *_: 1000)
    assert call(data, "--limit", "2MiB", "--targets", "mlp", "--shares", "0.5", "1.0", "--json") == 0
    assert asked == [((2, 32), 1, 2 * 2**20, "mlp", (0.5, 1.0), 1e-3)]
    document = json.loads(capsys.readouterr().out)
    assert document["scheme"] == found and document["bytes"] == 1000
    args = parse(Train, "train", ["--config", document["out"]])
    assert recipe.parse(args.method, args.method_options).specs == jp.pockengine(found).specs


@pytest.mark.slow
def test_a_scheme_of_the_embedded_model_is_within_its_limit(data, capsys):
    words = ("--targets", r"layers/mlp/up_proj", "--shares", "0.25", "--limit", "3MiB", "--json")
    assert call(data, *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert 0 < document["bytes"] <= document["limit"] == 3 * 2**20
    assert set(document["scheme"].values()) == {0.25}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--limit", "much"), '--limit "much": should be a size such as 24GiB'),
        (("--limit", "0"), '--limit "0": should be a size such as 24GiB'),
        (("--limit", "1MiB", "--shares", "1.0", "0.5"), "--shares 1.0 0.5: should ascend, each above 0 and at most 1"),
        (("--limit", "1MiB", "--shares", "0.0"), "--shares 0.0: should ascend, each above 0 and at most 1"),
        (("--limit", "1MiB", "--shares", "1.5"), "--shares 1.5: should ascend, each above 0 and at most 1"),
        (("--limit", "1MiB", "--rate", "nan"), "--rate nan: should be a finite number above 0"),
        (("--limit", "1MiB", "--batches", "0"), "--batches 0: should be at least 1"),
    ],
)
def test_mistakes(data, capsys, words, message):
    assert call(data, *words) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_there_stays(data, capsys):
    (data.parent / "scheme.yaml").write_text("mine")
    assert call(data, "--limit", "1MiB") == 2
    assert "exists already; name a file that does not" in capsys.readouterr().err
    assert (data.parent / "scheme.yaml").read_text() == "mine"
