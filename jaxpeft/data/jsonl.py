"""JSON Lines: one JSON object a line, UTF-8; every fault is reported as `file:line`.

The file is read in binary and decoded line by line, so that a line that is not UTF-8 is located
exactly and a large file never has to fit in memory.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxpeft.errors import InputError


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    r"""Yields (line number from 1, raw line without its end); a `\n` that ends the file opens none.

    Raises:
      InputError: there is no such file, it is a directory, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give a JSONL file")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:  # Windows editors put a byte order mark before the first line.
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                yield number, raw.rstrip(b"\r\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_line(raw: bytes, where: str) -> dict[str, Any]:
    """Decodes one line into a JSON object.

    Args:
      raw: the line's bytes.
      where: "file:line", which opens every message.

    Raises:
      InputError: the line is empty, not UTF-8, not JSON, or not an object.
    """
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
    except (RecursionError, ValueError) as error:  # nested too deeply; a number too long
        raise InputError(f"{where}: JSON that cannot be read ({error}): {_excerpt(text)}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be a JSON object, found {json_type(record)}: {_excerpt(text)}")
    return record


def json_type(value: object) -> str:
    """The JSON name of a parsed value's type, for messages."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _excerpt(text: str, width: int = 60) -> str:
    return ascii(text if len(text) <= width else text[:width] + "...")
