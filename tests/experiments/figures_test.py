"""A data file of figures: what is there is not measured again, whoever measured it."""

import pytest

from experiments.memory import common


def test_two_that_fill_one_file_keep_each_others_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    calls = []

    def measure(key):
        calls.append(key)
        return {"bytes": key["n"] * 10}

    first, second = common.Figures("name", measure), common.Figures("name", measure)
    assert first(n=1)["bytes"] == 10
    assert second(n=2)["bytes"] == 20
    assert [row["n"] for row in common.load("name")] == [1, 2]
    assert first(n=1)["bytes"] == 10 and first(n=2)["bytes"] == 20
    assert [key["n"] for key in calls] == [1, 2]
    assert [row["n"] for row in common.load("name")] == [1, 2]
    with pytest.raises(KeyError, match="n 3"):
        common.Figures("name")(n=3)
