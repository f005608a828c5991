"""`jaxpeft methods` on a package made here and on the real one."""

import json
import sys

import pytest

from jaxpeft import cli
from jaxpeft.cli import methods

FILE = """
SUMMARY = "trains two small factors"
KIND = "site"
SAVES = "optimizer state"
REFERENCE = "Somebody et al., 2021"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder of methods importable under the name given."""
    folder = tmp_path / "some_methods"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


def test_every_public_file_is_listed_by_name(package):
    for name in ("zeta", "alpha", "_private"):
        (package / f"{name}.py").write_text(FILE)
    rows = methods.list_methods([str(package)], "some_methods")
    assert [row["name"] for row in rows] == ["alpha", "zeta"]
    assert rows[0] == {
        "name": "alpha",
        "summary": "trains two small factors",
        "kind": "site",
        "saves": "optimizer state",
        "reference": "Somebody et al., 2021",
    }


def test_a_file_that_does_not_say_what_it_is_fails(package):
    (package / "beta.py").write_text(FILE.replace("SAVES", "SAVED"))
    with pytest.raises(AttributeError, match="SAVES"):
        methods.list_methods([str(package)], "some_methods")


def test_the_table_holds_every_cell(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    row = {"name": "m", "summary": "does [x]", "kind": "site", "saves": "y", "reference": "z 2020"}
    methods.show({"methods": [row]})
    shown = capsys.readouterr().out
    for cell in row.values():
        assert cell in shown


def test_the_first_methods_are_listed(capsys):
    assert cli.main(["methods", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["methods"]]
    assert {"full", "lora", "lora_fa"} <= set(names)
