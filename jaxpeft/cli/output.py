"""What every command shares in talking to its user: JSON and error lines."""

import contextlib
import json
import math
import os
import sys
from typing import Any

from jaxpeft.errors import printable


def print_json(document: Any) -> None:
    """Prints one strict JSON document on stdout: no NaN or Infinity, which become null."""
    print(json.dumps(jsonable(document), indent=2, ensure_ascii=False, allow_nan=False))


def jsonable(value: Any) -> Any:
    """The value in JSON's own types: paths as text, tuples as lists, array scalars as numbers.

    Raises:
        TypeError: for a value that has no JSON form.
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and JAX scalars and arrays
        return jsonable(value.tolist())
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


def print_error(message: str) -> None:
    """Prints a user's mistake as one line on stderr, in which nothing of a file's text can move the cursor."""
    with contextlib.suppress(OSError):  # a stderr that is full or closed: the status tells it, too
        print(f"jaxpeft: error: {printable(message)}", file=sys.stderr)
