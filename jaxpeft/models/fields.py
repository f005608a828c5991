"""Fields of a parsed config.json; what is missing or cannot be used is one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from annotated_types import Gt, Le

from jaxpeft import documents
from jaxpeft.errors import InputError

# The largest sizes that are taken for real; what a file merely announces is not allocated.
_MOST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "ffn_dim": 2**22,
    "vocab_size": 2**26,
    "image_size": 2**14,
    "num_labels": 2**24,
}
_Positive = Annotated[documents.Number, Gt(0)]
_Token = documents.Index


def _read(config: Mapping[str, Any], name: str, schema: Any, default: Any = None) -> Any:
    """A field that fits a schema, or its default where it is missing or null."""
    value = config.get(name)
    return default if value is None else documents.checked("config.json", schema, value, name)


def _needed(config: Mapping[str, Any], name: str, schema: Any, default: Any) -> Any:
    """`_read` of a field that must be there where there is no default."""
    if (value := _read(config, name, schema, default)) is None:
        raise InputError(f"config.json: the field {name!r} is missing")
    return value


def count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of at least 1 and, of a size, at most what a model may have.

    Raises:
      InputError: if it is another, or missing where there is no default.
    """
    return _needed(config, name, Annotated[documents.Count, Le(_MOST.get(name, 2**31 - 1))], default)


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number above 0.

    Raises:
      InputError: if it is another, or missing where there is no default.
    """
    return _needed(config, name, _Positive, default)


def switch(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """true or false; null is the default.

    Raises:
      InputError: for another value.
    """
    return _read(config, name, documents.Flag, default)


def mapping(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object; missing or null is an empty one.

    Raises:
      InputError: for another value.
    """
    return dict(_read(config, name, dict[documents.Text, Any], {}))


def dtype(config: Mapping[str, Any]) -> str | None:
    """The type that the checkpoint's weights are in, as it says itself; None where it does not.

    Raises:
      InputError: for a value that is no text.
    """
    for name in ("dtype", "torch_dtype"):
        if (value := _read(config, name, documents.Text)) is not None:
            return value.removeprefix("torch.")
    return None


def names(config: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts; missing or null is an empty one.

    Raises:
      InputError: for another value.
    """
    return _read(config, name, list[documents.Text], [])


def token(config: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A token's id; null is none.

    Raises:
      InputError: for another value.
    """
    return _read(config, name, _Token, default if name not in config else None)


def tokens(config: Mapping[str, Any], name: str, default: int | None = None) -> tuple[int, ...]:
    """Token ids, of which one may stand alone; null is none.

    Raises:
      InputError: for another value.
    """
    value = _read(config, name, _Token | list[_Token], default if name not in config else None)
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


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
