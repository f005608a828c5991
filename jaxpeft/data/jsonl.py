"""JSON Lines: one JSON object a line, UTF-8; every fault is reported as `file:line`.

Lines are read in binary and decoded one by one, so that one that is not UTF-8 is located exactly and a large file never
has to fit in memory. A line of more than MOST_BYTES is a fault, and never in memory whole; one of more than MOST_PASSED
is not even passed over, so that a device or an archive without line ends is not read for ever.
"""

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from jaxpeft.errors import InputError, first_line

MOST_BYTES = 2**23  # of a line; text of so many letters, one token each, takes 3 GiB
MOST_PASSED = 2**28  # bytes of a line that are read


def number_lines(file: IO[bytes], where: str) -> Iterator[tuple[int, bytes]]:
    r"""(line number from 1, the line with its end) of a binary file; a `\n` that ends the file opens no line.

    Of a line that is too long, the beginning is given (see `check_length`).

    Raises:
      InputError: for a line whose end is too far away to go on behind it; it begins with `where`.
    """
    number = 0
    while raw := file.readline(MOST_BYTES + 1):
        number += 1
        # Windows editors put a byte order mark before the first line.
        yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        passed = len(raw) if len(raw) > MOST_BYTES else 0
        while passed and not raw.endswith(b"\n") and (raw := file.readline(MOST_BYTES)):
            passed += len(raw)
            if passed > MOST_PASSED:
                raise InputError(f"{where}:{number}: longer than {_mib(MOST_PASSED)}; is it a text of lines?")


def check_length(raw: bytes, where: str) -> None:
    """Raises InputError for a line, or another part of a file, of more than MOST_BYTES; it begins with `where`."""
    if len(raw) > MOST_BYTES:
        raise InputError(f"{where}: longer than {_mib(MOST_BYTES)}, the most that a row may have")


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def parse_line(raw: bytes, where: str) -> dict[str, Any]:
    """Decodes one line into a JSON object.

    Args:
      raw: the line's bytes.
      where: "file:line", which opens every message.

    Raises:
      InputError: the line is too long, empty, not UTF-8, not JSON, or not an object.
    """
    check_length(raw, where)
    if not raw.strip():
        raise InputError(f"{where}: empty line; every line must hold one JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from error
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}: {_excerpt(text)}") from error
    except (RecursionError, ValueError, MemoryError) as error:  # nested too deeply; a number too long
        raise InputError(f"{where}: JSON that cannot be read ({first_line(error)}): {_excerpt(text)}") from error
    return as_object(record, where, text)


def as_object(value: object, where: str, text: str | None = None) -> dict[str, Any]:
    """A parsed value that must be a JSON object; `text` is what it was parsed from.

    Raises:
      InputError: it is something else.
    """
    if not isinstance(value, dict):
        shown = json.dumps(value) if text is None else text
        raise InputError(f"{where}: must be a JSON object, found {json_type(value)}: {_excerpt(shown)}")
    return value


def json_type(value: object) -> str:
    """The JSON name of a value's type, for messages; Python's where JSON has none."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null", int: "number"}
    return {**names, float: "number"}.get(type(value), type(value).__name__)  # columns hold more than JSON


def _excerpt(text: str, width: int = 60) -> str:
    return ascii(text if len(text) <= width else text[:width] + "...")
