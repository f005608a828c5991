"""A method's factory called with arguments that come from words or a file, whose types are compared with its own."""

from __future__ import annotations

import numbers
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from jaxpeft.errors import InputError


def call(name: str, factory: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """What the factory of a method makes of the settings.

    Raises:
      InputError: for an argument that it does not take, or one of another type than its annotation says.
    """
    hints = get_type_hints(factory)
    for key, value in settings.items():
        if key in hints and not _fits(value, hints[key]):
            raise InputError(f"method {name}: {key} {value!r} should be {_called(hints[key])}")
    try:
        return factory(**settings)
    except (TypeError, AttributeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise InputError(f"method {name}: {error} (given {given})") from error


_CALLED = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an argument's annotation says; what it says in other words than those here fits."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind in (int, float):
        whole = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, whole) and not isinstance(value, bool)
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(x, inner[0]) for x in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(x, inner[1]) for k, x in value.items())
    return not isinstance(kind, type) or isinstance(value, kind)


def _called(hint: Any) -> str:
    """An annotation in words."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        words = [_called(one) for one in inner]
        return (", or " if any(", " in one for one in words[:-1]) else " or ").join(words)
    if kind is Sequence:
        return f"a list, each of it {_called(inner[0])}"
    if kind is Mapping:
        return f"a mapping, each name in it {_called(inner[0])} and each value {_called(inner[1])}"
    return _CALLED.get(kind, str(kind))
