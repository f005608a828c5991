"""Every fault of a line is one line of text that names the file and the line."""

import json
from pathlib import Path

import pytest

from jaxpeft.data.jsonl import parse_line, read_lines
from jaxpeft.errors import InputError


def message_of(raw: bytes) -> str:
    with pytest.raises(InputError) as caught:
        parse_line(raw, "rows.jsonl:7")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl:7: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty line"),
        (b" \t ", "empty line"),
        (b'{"text": ', "not JSON"),
        (b"{'text': 1}", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"[1, 2]", "must be a JSON object, found array"),
        (b'"text"', "must be a JSON object, found string"),
        (b"3.5", "must be a JSON object, found number"),
        (b"true", "must be a JSON object, found boolean"),
        (b"null", "must be a JSON object, found null"),
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at column 14"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8: byte 0xff at column 1"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"text": ' + b"9" * 5000 + b"}", "cannot be read"),
    ],
)
def test_faulty_line(raw: bytes, says: str) -> None:
    assert says in message_of(raw)


def test_long_and_unprintable_lines_are_excerpted() -> None:
    message = message_of(("\u2028\x1b[31m" + "x" * 5000).encode())
    assert len(message) < 200
    assert message.isprintable()


def test_reads_every_kind_of_line_end(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b\xc3\xa9"}\n\n{"text": "c"}')
    lines = list(read_lines(file))
    assert [number for number, _ in lines] == [1, 2, 3, 4]
    assert lines[2][1] == b""
    texts = [parse_line(raw, "")["text"] for number, raw in lines if number != 3]
    assert texts == ["a", "bé", "c"]


def test_line_end_at_the_end_opens_no_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"{}\n")
    assert list(read_lines(file)) == [(1, b"{}")]
    file.write_bytes(b"")
    assert list(read_lines(file)) == []


def test_line_separators_of_unicode_do_not_cut_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert [parse_line(raw, "") for _, raw in read_lines(file)] == [{"text": "a\u2028b\x85c"}]


def test_no_such_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl: no such file"):
        list(read_lines(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="is a directory"):
        list(read_lines(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"no such file|cannot be read"):
        list(read_lines(tmp_path / "file" / "rows.jsonl"))
