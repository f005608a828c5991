"""A step's figures in a file: what they were measured on, and one row per line, written the moment it is there."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments/results/device"
DRIVER = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]

# What the library needs for the steps here, and what it needs only elsewhere: said where it is missing.
NEEDED = ("jax", "jaxlib", "flax", "optax", "numpy", "chex")
ELSEWHERE = ("orbax.checkpoint", "grain", "tyro", "tensorboardX", "matplotlib", "safetensors", "tokenizers")
PEERS = ("torch", "peft", "transformers", "bitsandbytes", "flash_attn")
_DISTRIBUTION = {"orbax.checkpoint": "orbax-checkpoint"}

Row = dict[str, Any]


class Prepared(NamedTuple):
    """A row that is ready to be measured.

    measure: () -> what was found.
    need: bytes of the device's memory that it will take, where rows measure at one time.
    """

    measure: Callable[[], Row]
    need: int = 0


class Record:
    """The figures of one step in one file.

    Attributes:
      file: FOLDER/NAME.json.
      header: what they were measured on; {} until `begin`.
      rows: measured so far, of earlier runs too.
    """

    def __init__(self, folder: Path, name: str):
        """Reads what is there.

        Raises:
          ValueError: if the file is not one of these.
        """
        self.file, self.header, self.rows = folder / f"{name}.json", {}, []
        if not self.file.exists():
            return
        try:
            written = json.loads(self.file.read_text())
            self.rows = [{**row, "key": dict(row["key"])} for row in written.pop("rows")]
            self.header = {**written, "device": str(written["device"])}
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise ValueError(f"{self.file}: is not a file of figures: {error!r}; move it away") from None

    def begin(self, header: Mapping[str, Any]) -> None:
        """Says what the next rows are measured on; what was there must have been measured on the same device.

        Raises:
          ValueError: if it was not.
        """
        before = self.header.get("device", header["device"])
        if before != header["device"]:
            raise ValueError(f"{self.file}: figures of a {before}, this is a {header['device']}; use another --out")
        self.header = dict(header)
        self.write()

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """The row with these values."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: Row) -> None:
        """Adds a row, in place of one with the same key, and writes the file.

        A failure takes nothing away: figures that are there stay, with the reason beside them, and so do names.
        """
        before = self.find({"key": row["key"]})
        if before is not None and "failed" in row:
            again = "failed_again" if measured(before) else "failed"
            row = {**before, again: row["failed"]}
        self.rows = [*(other for other in self.rows if other["key"] != row["key"]), row]
        self.write()

    def write(self) -> None:
        """Writes the file whole, in place of the old one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps(self.header, indent=1)[1:-2].strip("\n")
        lines = ",\n".join("  " + json.dumps(row) for row in self.rows)
        part = self.file.with_name(f"{self.file.name}.part")
        part.write_text("{\n" + head + ',\n "rows": [\n' + lines + "\n ]\n}\n")
        os.replace(part, self.file)


def measured(row: Row) -> bool:
    """Whether a row has figures: it was run, and did not fail."""
    return "run" in row and "failed" not in row


def missing(names: Iterable[str]) -> list[str]:
    """Those of the modules that are not installed."""
    return [name for name in names if not _found(name)]


def _found(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def environment() -> dict[str, Any]:
    """What figures are measured on: device, driver, versions. It asks JAX, which takes hold of the device."""
    import jax

    device = jax.devices()[0]
    versions = {}
    for name in (*NEEDED, "jax-cuda13-plugin", "libtpu", *PEERS, "triton", "nvidia-cudnn-cu13", "nvidia-cublas"):
        try:
            versions[name] = importlib.metadata.version(_DISTRIBUTION.get(name, name))
        except importlib.metadata.PackageNotFoundError:
            continue
    statistics = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "figures": device.platform != "cpu",
        "driver": _driver(),
        "bytes_limit": statistics.get("bytes_limit"),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": versions,
        "missing": missing((*NEEDED, *ELSEWHERE, *PEERS)),
    }


def _driver() -> str | None:
    """What nvidia-smi says of the first GPU; None without one."""
    try:
        done = subprocess.run(DRIVER, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def commit() -> str:
    """The commit of the source tree, with a plus if the library differs from it; "unknown" outside a repository."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=30)
    try:
        head = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--", "jaxpeft", "pallas_kernels", "experiments/on_device")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"


def now() -> str:
    """The minute in UTC: what names a run."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ")
