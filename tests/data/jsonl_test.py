"""Every fault of a line is one line of text that names the file and the line."""

import pytest

from jaxpeft.data.jsonl import parse_line
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
