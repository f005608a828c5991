"""Fields of a parsed config.json; what is missing or cannot be used is one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxpeft.errors import InputError


def count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of at least 1.

    Raises:
      InputError: if it is another, or missing where there is no default.
    """
    value = config.get(name, default)
    if value is None:
        raise InputError(f"config.json: the field {name!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {name} {value!r} should be a whole number of at least 1")
    return value


def one_of(config: Mapping[str, Any], name: str, supported: Iterable[Any], default: Any) -> Any:
    """A field of which only some values are supported.

    Raises:
      InputError: for another value.
    """
    value, supported = config.get(name, default), list(supported)
    if value not in supported:
        raise InputError(f"config.json: {name} {value!r} is not supported; supported: {', '.join(map(str, supported))}")
    return value


def head_of(config: Mapping[str, Any], heads: Mapping[str, str]) -> str:
    """Which head an architecture has.

    Args:
      config: parsed.
      heads: architecture -> head. The first is that of a config.json which names none.

    Raises:
      InputError: for an architecture that is not among `heads`.
    """
    name = next(iter(config.get("architectures") or heads))
    if name not in heads:
        raise InputError(f"config.json: architecture {name!r} is not supported; supported: {', '.join(heads)}")
    return heads[name]


def heads_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(num_attention_heads, their size).

    Raises:
      InputError: if hidden_size is no multiple of the number.
    """
    heads, size = count(config, "num_attention_heads"), count(config, "hidden_size")
    if size % heads:
        raise InputError(f"config.json: hidden_size {size} is not a multiple of num_attention_heads {heads}")
    return heads, size // heads
