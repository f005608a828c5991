"""Values against the types of a run's fields."""

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_LISTED = ("targets",)  # fields of text that YAML and Python may give as a list of names


def one_word(name: str, value: Any) -> Any:
    """A field's list of names as the text that its flag takes; any other value as it is.

    >>> one_word("targets", ["q_proj", "v_proj"]), one_word("targets", ["q_proj"])
    ('q_proj,v_proj', 'q_proj,')
    """
    if name not in _LISTED or not isinstance(value, list | tuple) or not value:
        return value
    if not all(isinstance(item, str) and re.fullmatch(r"[\w./]+", item) for item in value):
        return value
    return ",".join(value) + ("," if len(value) == 1 else "")  # without a comma it would be a regular expression


def wanted(name: str, hint: Any) -> str:
    """What a field takes, as an error about it says it."""
    return f"a list of names, or {in_words(hint)}" if name in _LISTED else in_words(hint)


def in_words(hint: Any) -> str:
    """A field's type as an error says it: "a number or None"."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    wanted = []
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            wanted.append(f"one of {', '.join(map(str, typing.get_args(kind)))}")
        elif typing.get_origin(kind) is tuple:
            wanted.append(f"a list, each {_KINDS[typing.get_args(kind)[0]]}")
        else:
            wanted.append(_KINDS.get(kind, "None"))
    return " or ".join(wanted)


def is_of_form(value: Any, hint: Any) -> bool:
    """Whether YAML's value is a list, true or false, or a single word where a flag of this type is; a mapping's items
    are a list's.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, list | dict):
        return any(typing.get_origin(kind) is tuple for kind in kinds)
    return value is None or isinstance(value, bool) == (bool in kinds)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; whole numbers are numbers, and neither is true or false."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, kind) for kind in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)
