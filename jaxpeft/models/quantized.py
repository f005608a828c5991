"""Checkpoints whose weights are quantized already: what a config.json says of GPTQ's and AWQ's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpeft import documents
from jaxpeft.errors import InputError

FIELDS = ("quantization_config", "compression_config")
METHODS = {"gptq": (2, 3, 4, 8), "awq": (4,)}  # -> bits
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_PLAIN = "give the original checkpoint, which --method quantize+lora packs while it is read"


class Scheme(NamedTuple):
    """How the weights of a checkpoint are quantized.

    method: of METHODS.  bits: of a number.  group: inputs that share a scale and a zero point; 0: all.
    offset: what is added to a stored zero point, 1 in GPTQ's first format.
    ordered: whether inputs belong to groups in the order of their activations (`desc_act`), not in their own.
    left_out: parts of names of modules that are not quantized.
    only: names of modules that alone are; (): all of the layers'.
    """

    method: str
    bits: int
    group: int
    offset: int = 0
    ordered: bool = False
    left_out: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def quantizes(self, module: str) -> bool:
        """Whether it is said of a module of the layers that it is quantized."""
        named = not self.only or any(module.endswith(name) for name in self.only)
        return named and not any(part in module for part in self.left_out)


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a parsed config.json; None where the weights are not quantized.

    Raises:
      InputError: for quantized weights of which no kernel can be made.
    """
    said = next(((name, config[name]) for name in FIELDS if config.get(name) is not None), None)
    if said is None:
        return None
    where, own = said
    method = own.get("quant_method") if isinstance(own, Mapping) else None
    if not isinstance(method, str) or method not in METHODS or where != FIELDS[0]:
        raise InputError(
            f"config.json: the weights are quantized ({where}{f', {method}' if method else ''}), and only "
            f"{' and '.join(METHODS)} are read; {_PLAIN}"
        )
    _check(where, own, method)
    size = _read(own, "group_size", documents.Whole, 128)
    if size == 0 or size < -1:
        raise InputError(f"config.json: group_size {size} should be at least 1, or -1 ({_in(where, method)})")
    blocks = _read(own, "modules_in_block_to_quantize", list[list[documents.Text]], [])
    return Scheme(
        method,
        _read(own, "bits", documents.Count, 4),
        max(size, 0),
        int(method == "gptq" and _format(own, method) == "gptq"),
        method == "gptq" and _read(own, "desc_act", documents.Flag, False),
        tuple(_read(own, "modules_to_not_convert", list[documents.Text], [])),
        tuple(name for block in blocks for name in block),
    )


def _check(where: str, own: Mapping[str, Any], method: str) -> None:
    """Raises InputError for a form of GPTQ or AWQ of which no kernel can be made."""
    bits = _read(own, "bits", documents.Count, 4)
    found: list[tuple[str, Any, str]] = []
    if bits not in METHODS[method]:
        found.append(("bits", bits, f"one of {', '.join(map(str, METHODS[method]))}"))
    if (form := _format(own, method)) not in _FORMATS[method]:
        name = next(name for name in _names(method) if own.get(name) is not None)
        found.append((name, form, f"one of {', '.join(_FORMATS[method])}"))
    for name, right in (("is_marlin_format", False), ("zero_point", True), ("pack_dtype", "int32"), ("dynamic", None)):
        if own.get(name) not in (None, right, {}):
            found.append((name, own[name], "left out" if right is None else str(right).lower()))
    if found:
        name, value, right = found[0]
        raise InputError(f"config.json: {name} {value!r} should be {right} ({_in(where, method)}); {_PLAIN}")


def _names(method: str) -> tuple[str, ...]:
    """The fields that name the form of the tensors, the first that is there being right."""
    return ("checkpoint_format", "format") if method == "gptq" else ("version", "format")


def _format(own: Mapping[str, Any], method: str) -> str:
    said = (_read(own, name, documents.Text) for name in _names(method))
    return next((form for form in said if form), _FORMATS[method][0]).lower()


def _read(own: Mapping[str, Any], name: str, schema: Any, default: Any = None) -> Any:
    value = own.get(name)
    return default if value is None else documents.checked("config.json", schema, value, f"{FIELDS[0]}.{name}")


def _in(where: str, method: str) -> str:
    return f"in {where}, of {method}"


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json of the same model whose weights are not quantized."""
    return {name: value for name, value in config.items() if name not in FIELDS}


__all__ = ["FIELDS", "METHODS", "Scheme", "plain", "scheme_of"]
