"""Documents that others may have written, each read through one schema: JSON in, checked values out.

A schema is a type as pydantic takes it, mostly a `TypedDict` of the kinds below, whose scalars are strict: 1 is no text
and "1" no number. What a document holds beyond its schema is not looked at. What is wrong becomes one line:

    run/config.json: arguments.rank -4 should be at least 1

Nothing is made in memory that a document merely announces: a file is read up to a bound, and sizes have bounds too.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le, MinLen
from pydantic import AllowInfNan, Strict, StrictBool, StrictStr, TypeAdapter, ValidationError

from jaxpeft.errors import InputError, is_utf8, shown
from jaxpeft.files import read_text

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Whole = Annotated[int, Strict(), Ge(-(2**63)), Le(2**63 - 1)]
Count = Annotated[int, Strict(), Ge(1), Le(2**31 - 1)]  # of something that there is
Index = Annotated[int, Strict(), Ge(0), Le(2**31 - 1)]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Text = StrictStr
Flag = StrictBool
# [name, arguments] of each method of a chain, as `Method.specs` records them.
Specs = Annotated[list[tuple[Text, dict[Text, Any]]], MinLen(1)]


def from_json(where: str, text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: for anything else; the line begins with `where`.
    """
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: is not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{where}: is JSON nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where}: is JSON that cannot be read: {error}") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{where}: should hold a JSON object, not a {type(parsed).__name__}")
    if _SURROGATE.search(text) and not is_utf8(json.dumps(parsed, ensure_ascii=False)):
        raise InputError(f"{where}: holds half of a character (\\ud800 to \\udfff alone), which is no text")
    return parsed


def read_json(file: Path, missing: str, schema: Any = dict) -> Any:
    """A JSON object that fits a schema.

    Raises:
      InputError: `missing` if there is no such file; what is wrong, and where, with any other.
    """
    return checked(str(file), schema, from_json(str(file), read_text(file, missing)))


def checked(where: str, schema: Any, value: Any, field: str = "", as_json: bool = False) -> Any:
    """The value, which fits a schema.

    Args:
      where: opens the line that says what is wrong.  field: of the document there, that the value is.
      schema: a type.
      value: that should be of it.
      as_json: it is JSON's form of the type, which has text for paths and lists for tuples; all scalars are strict.

    Raises:
      InputError: if it does not: `where`, the field, its value and what it should be.
    """
    try:
        if as_json:
            _adapter(schema).validate_json(json.dumps(value), strict=True)
        else:
            _adapter(schema).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{where}: {_in_words(error, value, field)}") from None
    except RecursionError:
        raise InputError(f"{where}: is nested too deeply") from None
    return value


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


# pydantic's types of errors -> what would have been right.
_SHOULD_BE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 63 bits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "path_type": "a path",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "none_required": "null",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
}


def _in_words(error: ValidationError, value: Any, field: str) -> str:
    """The first thing that is wrong: `field value should be this or that`."""
    problems = error.errors(include_url=False)
    place, found = _place(problems[0]["loc"], value)
    if problems[0]["type"] == "missing":
        return f"lacks {'.'.join(map(str, (*([field] if field else []), *problems[0]['loc'])))}"
    same = [problem for problem in problems if _place(problem["loc"], value)[0] == place]
    wanted = list(dict.fromkeys(_wanted(problem) for problem in same))
    name = ".".join((*([field] if field else []), *place))
    return f"{name} {shown(found)} should be {' or '.join(wanted)}".lstrip()


def _wanted(problem: Any) -> str:
    if (form := _SHOULD_BE.get(problem["type"])) is not None:
        return form.format(**problem.get("ctx", {}))
    return str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")


def _place(path: Iterable[int | str], value: Any) -> tuple[tuple[str, ...], Any]:
    """Where an error's path leads in the document, and what is there."""
    found: list[str] = []
    for step in path:
        at_index = isinstance(value, list | tuple) and isinstance(step, int) and step < len(value)
        if at_index or (isinstance(value, Mapping) and step in value):
            value = value[step]
        elif step != "[key]":  # the member of a union, which is no place
            continue
        found.append(shown(step).strip('"') if isinstance(step, str) else str(step))
    return tuple(found), value
