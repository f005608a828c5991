"""`jaxpeft methods`: what each method file says of itself, as JSON and as a table."""

import json
from types import SimpleNamespace

import pytest

from jaxpeft import cli
from jaxpeft.cli import methods

CONSTANTS = {"SUMMARY": "does [x]", "KIND": "site", "SAVES": "optimizer state", "REFERENCE": "z"}
ROW = {
    "name": "alpha",
    "summary": "does [x]",
    "kind": "site",
    "saves": "optimizer state",
    "reference": "z",
}


def test_a_method_is_described_by_its_four_constants():
    assert methods.describe("alpha", SimpleNamespace(**CONSTANTS)) == ROW


@pytest.mark.parametrize("absent", CONSTANTS)
def test_a_file_that_does_not_say_what_it_is_fails(absent):
    rest = {name: text for name, text in CONSTANTS.items() if name != absent}
    with pytest.raises(AttributeError, match=absent):
        methods.describe("alpha", SimpleNamespace(**rest))


def test_the_table_holds_every_cell(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    methods.show({"methods": [ROW]})
    shown = capsys.readouterr().out
    for cell in (*ROW.values(), "--method meft+lora"):
        assert cell in shown


def test_the_real_methods_say_what_they_are(capsys):
    assert cli.main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert {"full", "lora", "lora_fa"} <= {row["name"] for row in rows}
    for row in rows:
        assert row.keys() == ROW.keys()
        assert all(text and "\n" not in text for text in row.values())
