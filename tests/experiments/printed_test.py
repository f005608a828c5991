"""Which commands of a document are run anew, and when a line of it counts as printed."""

import sys

import pytest

from experiments import printed

TEXT = """
Words first.

    jaxpeft plan --model a --target h200

    method  target  total
    lora    h200     1.00

    a second table, GiB

Words between.

    jaxpeft plan --model b
    jaxpeft train --model b

    no output of a block of two commands

    jaxpeft plan --model ...

    no output of a command that is not whole
"""


def test_a_command_and_what_stands_below_it():
    (found,) = printed.examples(TEXT)
    assert found.command == "jaxpeft plan --model a --target h200"
    assert found.lines == ("method  target  total", "lora    h200     1.00", "a second table, GiB")


def test_a_line_stands_where_its_words_are_in_one_line_in_order():
    output = "method  target  weights  total\nlora    h200       0.50   1.00\n"
    assert printed.stands("method target  total", output)
    assert printed.stands("lora h200 ... 1.00", output)
    assert not printed.stands("lora h200 1.01", output)
    assert not printed.stands("h200 lora", output)
    assert not printed.stands("method 1.00", output)


@pytest.mark.parametrize(("total", "status"), [("1.00", 0), ("1.01", 1)])
def test_what_differs_is_named(total, status, tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(TEXT)
    monkeypatch.setattr(printed, "ROOT", tmp_path)
    monkeypatch.setattr(
        printed, "run", lambda command: f"method target total\nlora h200 {total}\na second table, GiB\n"
    )
    monkeypatch.setattr(sys, "argv", ["printed", "README.md"])
    with pytest.raises(SystemExit) as ended:
        printed.main()
    said = capsys.readouterr().out
    assert ended.value.code == status
    assert ("  - lora    h200     1.00\nmethod target total\nlora h200 1.01" in said) == bool(status)


def test_the_documents_tables_are_found():
    found = {path.name: len(list(printed.examples(path.read_text()))) for path in printed.documents([])}
    assert {name for name, count in found.items() if count} >= {"README.md", "plans.md", "pods.md"}
