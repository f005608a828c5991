"""A package's names, each imported at its first use (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def imports(package: str, module_of: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
      package: its `__name__`.
      module_of: a name -> the module below the package that has it.
    """
    module = sys.modules[package]

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(module, name, value)  # found without asking from now on
        return value

    return get, lambda: sorted({*vars(module), *module_of})
