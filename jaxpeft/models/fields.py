"""Fields of a parsed config.json; what is missing or cannot be used is one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxpeft.errors import InputError


def _given(config: Mapping[str, Any], name: str, default: float | None) -> Any:
    """The field, or its default where it is missing or null; without one that is an InputError."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise InputError(f"config.json: the field {name!r} is missing")
    return value


def count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of at least 1.

    Raises:
      InputError: if it is another, or missing where there is no default.
    """
    value = _given(config, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {name} {value!r} should be a whole number of at least 1")
    return value


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number above 0.

    Raises:
      InputError: if it is another, or missing where there is no default.
    """
    value = _given(config, name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"config.json: {name} {value!r} should be a number above 0")
    return value


def switch(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """true or false; null is the default.

    Raises:
      InputError: for another value.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"config.json: {name} {value!r} should be true or false")
    return default if value is None else value


def mapping(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object; missing or null is an empty one.

    Raises:
      InputError: for another value.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"config.json: {name} {value!r} should be an object")
    return dict(value or {})


def dtype(config: Mapping[str, Any]) -> str | None:
    """The type that the checkpoint's weights are in, as it says itself; None where it does not.

    Raises:
      InputError: for a value that is no text.
    """
    for name in ("dtype", "torch_dtype"):
        if (value := config.get(name)) is not None:
            if not isinstance(value, str):
                raise InputError(f"config.json: {name} {value!r} should be a text, such as bfloat16")
            return value.removeprefix("torch.")
    return None


def names(config: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts; missing or null is an empty one.

    Raises:
      InputError: for another value.
    """
    value = config.get(name)
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)):
        raise InputError(f"config.json: {name} {value!r} should be a list of texts")
    return list(value or ())


def token(config: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A token's id; null is none.

    Raises:
      InputError: for another value.
    """
    value = config.get(name, default)
    if value is not None and not _is_token(value):
        raise InputError(f"config.json: {name} {value!r} should be a token's id")
    return value


def tokens(config: Mapping[str, Any], name: str, default: int | None = None) -> tuple[int, ...]:
    """Token ids, of which one may stand alone; null is none.

    Raises:
      InputError: for another value.
    """
    value = config.get(name, default)
    several = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(map(_is_token, several)):
        raise InputError(f"config.json: {name} {value!r} should be a token's id, or a list of such")
    return tuple(several)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_plain(config: Mapping[str, Any]) -> None:
    """Raises InputError if the checkpoint's weights are quantized, which no family reads."""
    for name in ("quantization_config", "compression_config"):
        if (found := config.get(name)) is not None:
            kind = found.get("quant_method") if isinstance(found, Mapping) else None
            raise InputError(
                f"config.json: the weights are quantized ({name}{f', {kind}' if kind else ''}); give the original "
                "checkpoint, which --method quantize+lora packs while it is read"
            )


def one_of(config: Mapping[str, Any], name: str, supported: Iterable[Any], default: Any) -> Any:
    """A field of which only some values are supported; null is the default.

    Raises:
      InputError: for another value.
    """
    value, supported = config.get(name), list(supported)
    value = default if value is None else value
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
    name = next(iter(names(config, "architectures") or heads))
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
