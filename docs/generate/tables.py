"""The Markdown tables of experiments/results, and the rows in them that are of a method."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
# What a table's rows are called by: their first so many cells.
_KEYS = 3


class Table(NamedTuple):
    """A table of a results file.

    file: its path below experiments/results.
    title: the heading above it, or in a file without headings the line above it.
    header: its first two lines.
    rows: the others, as they stand there.
    """

    file: str
    title: str
    header: str
    rows: tuple[str, ...]


def tables(results: Path = RESULTS) -> list[Table]:
    """Every table of every Markdown file below `results`, by file."""
    found = []
    for path in sorted(results.rglob("*.md")):
        lines, block = path.read_text(encoding="utf-8").splitlines(), list[str]()
        headed, title = any(line.startswith("#") for line in lines), path.stem
        for line in [*lines, ""]:
            if line.startswith("#") or (not headed and line and not line.startswith("|")):
                title = line.strip("#: ")
            if line.startswith("|"):
                block.append(line)
            elif block:
                found.append(Table(path.relative_to(results).as_posix(), title, "\n".join(block[:2]), tuple(block[2:])))
                block = []
    return found


def rows_of(table: Table, name: str) -> tuple[str, ...]:
    """The rows whose first cells name a method, alone or in a chain."""
    return tuple(row for row in table.rows if name in _words(row))


def _words(row: str) -> set[str]:
    cells = row.strip("| ").split("|")[:_KEYS]
    return {word for cell in cells for word in re.split(r"[\s,+`()]+", cell)}
