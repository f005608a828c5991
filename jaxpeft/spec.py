"""What a method was made from: a name and arguments that survive JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpeft.errors import InputError, shown

MOST = 2**31 - 1  # of int32
LEAST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32, above 0 (what is smaller a device may take for 0)


class Spec(NamedTuple("Spec", [("name", str), ("config", dict[str, Any])])):
    """What a factory was called with: enough to make the method again, and to write its adapter_config.json.

    `config` is the arguments in JSON's own types, so that a Spec is equal after a round trip through a file: tuples
    become lists, numpy's scalars numbers.

    Raises:
      InputError: for an argument that JSON cannot hold, or a number that a step cannot: numbers are its int32 and
        float32.
    """

    __slots__ = ()

    def __new__(cls, name: str, config: Mapping[str, Any]) -> Spec:
        return super().__new__(cls, name, {key: _as_json(f"{name}: {key}", x) for key, x in config.items()})


def _as_json(where: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "dtype") and hasattr(value, "item") and value.ndim == 0:
        return _as_json(where, value.item())
    if isinstance(value, int):
        if abs(value) > MOST:
            raise InputError(f"{where} {shown(value)}: is too large; whole numbers are at most {MOST}")
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        if value and not LEAST <= abs(value) <= LARGEST:
            raise InputError(f"{where} {value}: is none of float32's numbers, {LEAST:.2g} to {LARGEST:.2g}")
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _as_json(f"{where}: {key}", item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_as_json(where, item) for item in value]
    what = "a mapping whose keys are no text" if isinstance(value, Mapping) else repr(value)
    raise InputError(
        f"{where}: JSON cannot hold {what}; a method's arguments are text, finite numbers, true, false, null, "
        "and lists and mappings of these"
    )
