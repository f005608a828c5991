"""Which tiles a kernel uses: measured on a device, stored in a table, or a rule where nothing was measured.

A table is JSON, {device kind: {operation: {"n m r dtype": [[rows, {field: value}], ...]}}}. A call takes the entry of
its device, operation and key with the nearest number of rows (by ratio); without one it takes the kernel's own
`default_config`. Tables are read from `tuned.json` beside this file, then, over it, from the file that
PALLAS_KERNELS_TUNED names. `python -m pallas_kernels.tune` measures on the attached device and writes such a file.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.platform import Implementation

VARIABLE = "PALLAS_KERNELS_TUNED"
STORED = Path(__file__).with_name("tuned.json")

# JAX's name of a platform -> the file that holds its kernels, and the devices that these are for.
_FILES = {"cuda": "gpu", "tpu": "tpu"}
_CAPABILITY = {"cuda": "9.", "tpu": ""}  # wgmma is Hopper's


class Sizes(NamedTuple):
    """What tiles depend on: rows T, inputs n, outputs m (0 where there is one long axis only), rank r."""

    rows: int
    n: int
    m: int
    r: int
    dtype: Any

    @property
    def key(self) -> str:
        """The table's."""
        return f"{self.n} {self.m} {self.r} {jnp.dtype(self.dtype).name}"


def kernels(package: str, function: str, sizes: Callable[..., Sizes], like: str | None = None) -> dict[str, Any]:
    """{platform: implementation} of an operation whose kernels are `function` in <package>.gpu and <package>.tpu.

    A file of kernels has, beside the functions, `supports_<function>` and a NamedTuple `Config`; the functions take
    `config`. It is imported when a program for its platform is lowered, no sooner. `sizes` takes the operation's
    arguments; `like` is the function whose tuned tiles serve, if it is another.
    """

    def of(platform: str) -> Implementation:
        def file():
            return importlib.import_module(f"{package}.{_FILES[platform]}")

        def run(*args, device: str, **static):
            config = find(f"{package.rpartition('.')[2]}.{like or function}", device, sizes(*args))
            if config is not None:
                static["config"] = file().Config(**config)
            return getattr(file(), function)(*args, **static)

        def supports(*args, **static):
            return getattr(file(), f"supports_{function}")(*args, **static)

        return Implementation(run, supports, announces=True, kinds=True, capability=_CAPABILITY[platform])

    return {platform: of(platform) for platform in _FILES}


def find(operation: str, device: str, sizes: Sizes) -> dict[str, Any] | None:
    """The stored configuration for a call of these sizes on this kind of device, if there is one."""
    entries = table().get(device, {}).get(operation, {}).get(sizes.key, [])
    if not entries:
        return None
    return min(entries, key=lambda entry: abs(math.log(entry[0] / sizes.rows)))[1]


def table() -> dict[str, Any]:
    """The stored table, with that of PALLAS_KERNELS_TUNED over it."""
    return _table(os.environ.get(VARIABLE, ""))


@functools.cache
def _table(extra: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in (STORED, Path(extra) if extra else None):
        if file is None or (file == STORED and not file.exists()):
            continue
        for device, operations in read(file).items():
            for operation, keys in operations.items():
                found.setdefault(device, {}).setdefault(operation, {}).update(keys)
    return found


def read(file: Path) -> dict[str, Any]:
    """A table from its file.

    Raises:
      ValueError: if the file cannot be read, or is no such table.
    """
    try:
        written = json.loads(file.read_text())
        for operations in written.values():
            for keys in operations.values():
                for entries in keys.values():
                    for rows, config in entries:
                        if not rows > 0 or not isinstance(config, dict):
                            raise ValueError(f"{[rows, config]} is not [rows, {{field: value}}]")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: not a table of tuned kernels: {error}") from None
    return written
