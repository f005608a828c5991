"""Figures that are compiled one by one into a data file, and what is drawn from it.

A figure is a flat key (what was compiled: geometry, batch, sequence, dtype, method, plan, target, ...) and what the
compiler said, with the version of JAX. A file holds one figure per line, so a change of one is a change of one line.
Every script runs as a module from the repository's root:

    python -m experiments.memory.NAME              # compiles what the data lacks, then draws
    python -m experiments.memory.NAME --draw       # draws from the data alone

The compilers of the described devices come with the extras `cuda` and `tpu`; nothing runs on a device.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpeft.memory import planner, targets
from jaxpeft.method import Method
from jaxpeft.models import geometries

RESULTS = Path(__file__).resolve().parent.parent / "results/memory"
GIB = 2**30

Key = Mapping[str, Any]
Row = dict[str, Any]


def arguments(doc: str | None, targets: str = "h200") -> argparse.Namespace:
    """The command line that all scripts share: .draw, .targets."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the committed data; compile nothing")
    parser.add_argument("--targets", default=targets, help="devices to compile for, with commas")
    args = parser.parse_args()
    args.targets = args.targets.split(",")
    return args


def load(name: str, folder: Path | None = None) -> list[Row]:
    """The figures of NAME.json in a folder (results/memory); none where there is no such file."""
    path = (folder or RESULTS) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def save(name: str, rows: Sequence[Row], folder: Path | None = None) -> None:
    """Writes them, one per line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    part = (folder or RESULTS) / f"{name}.json.part"
    part.write_text(f"[\n{lines}\n]\n")
    part.replace(part.with_suffix(""))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process is in here, for this folder of results."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


class Figures:
    """Figures by key: out of the data file, or else measured and written there at once.

    Several processes may fill one file: each adds its figures to those that it finds there.
    """

    def __init__(
        self, name: str, measure: Callable[[Row], Mapping[str, Any]] | None = None, folder: Path | None = None
    ):
        """Of `name`.json in a folder (results/memory); without `measure`, a figure that it lacks is an error."""
        self.name, self.folder, self.measure = name, folder or RESULTS, measure
        self.rows = load(name, self.folder)
        if measure is not None:
            jax.config.update("jax_platforms", "cpu")  # targets are described; an attached device is left alone

    def __call__(self, **key: Any) -> Row:
        """The figure with these values.

        Raises:
          KeyError: if there is none and nothing may be measured.
        """
        if found := self._find(key):
            return found
        self.rows = load(self.name, self.folder)  # another process may have it
        if found := self._find(key):
            return found
        words = ", ".join(f"{name} {value}" for name, value in key.items())
        if self.measure is None:
            file = f"results/{self.folder.name}/{self.name}.json"
            raise KeyError(f"{file} has no figure with {words}; run without --draw")
        start = time.time()
        row = {**key, **self.measure(key), "jax": jax.__version__}
        with _alone(self.folder):
            self.rows = [*load(self.name, self.folder), row]
            save(self.name, self.rows, self.folder)
        print(f"{words}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
        return row

    def _find(self, key: Key) -> Row | None:
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)


def train_step(key: Row, method: Method) -> dict[str, Any]:
    """Compiles the train step of a key (geometry, batch_size, seq_len, dtype, save, target) under a method.

    Returns:
      {"bytes": by owner, "kept": what the trace keeps for the backward pass, "flops", "recompute_flops", "fits"}.
    """
    config = geometries.load(key["geometry"])
    step = planner.make_step(config, method, key["batch_size"], key["seq_len"], key["save"], key["dtype"], packed=False)
    traced = planner.cost(step)
    made = planner.row(step, targets.target(key["target"]), traced)
    kept = {name: made[name] for name in ("bytes", "flops", "recompute_flops", "fits")}
    return {**kept, "kept": traced.activations}


def table(header: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; figures with one decimal, aligned right."""

    def cell(x):
        return "" if x is None else f"{x:,.1f}" if isinstance(x, float) else str(x)

    rows = [list(header), ["---", *["---:"] * (len(header) - 1)], *([cell(x) for x in row] for row in body)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def write(name: str, text: str, folder: Path | None = None) -> None:
    """Writes NAME in a folder (results/memory)."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def bullets(sentences: Iterable[str]) -> str:
    """Sentences as a Markdown list, wrapped as in a docstring."""
    return (
        "\n".join(
            textwrap.fill(s, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
            for s in sentences
        )
        + "\n"
    )


def main(
    doc: str | None,
    name: str,
    measure: Callable[[Row], Mapping[str, Any]],
    collect: Callable[[Figures, list[str]], list[Row]],
    document: Callable[[list[Row]], str],
    verdicts: Callable[[list[Row]], list[str]] | None = None,
    targets: str = "h200",
    folder: Path | None = None,
) -> None:
    """A script: measures what NAME.json in a folder (results/memory) lacks, writes NAME.md, and prints the verdicts."""
    args = arguments(doc, targets)
    found = collect(Figures(name, None if args.draw else measure, folder), args.targets)
    write(f"{name}.md", document(found), folder)
    if verdicts is not None:
        print(bullets(verdicts(found)))
