"""The rows of a plan as a picture: one stacked bar each, bytes by owner, the device's memory as a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxpeft.train.memory import CATEGORIES

# Arguments cold, what the step adds warm.
COLORS = dict(zip(CATEGORIES, ("#4c6a92", "#6fa3c7", "#a9c7de", "#f2cf66", "#e07b39", "#b9b3a9"), strict=True))


def unit_of(rows: Iterable[Mapping[str, Any]]) -> tuple[str, int]:
    """The unit, and its bytes, in which the rows of a plan are read best."""
    return ("GiB", 2**30) if max(row["bytes"]["total"] for row in rows) >= 2**30 else ("MiB", 2**20)


def write_bars(document: Mapping[str, Any], path: Path) -> None:
    """Draws `jaxpeft plan`'s document; the file's ending says the format."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    rows = document["rows"]
    unit, size = unit_of(rows)
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(rows)), dpi=140, layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['method']}\n{row['target']}, {row['save'] if len(row['save']) < 24 else 'table'}" for row in rows]
    left = [0.0] * len(rows)
    for category in CATEGORIES:
        widths = [row["bytes"][category] / size for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=COLORS[category], label=category, height=0.62)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, row in enumerate(rows):
        axes.text(left[i], i, f" {label(row, unit, size)}", va="center", fontsize=8)
        if row["device_bytes"] / size < 1.6 * max(left):
            axes.plot([row["device_bytes"] / size] * 2, [i - 0.42, i + 0.42], color="#b3261e", linewidth=1.5)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} of one device; red: the device's memory")
    axes.set_xlim(right=1.1 * max(*left, *(axes.get_xlim()[1:])))
    axes.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    axes.set_title(
        f"{document['model']}, batch {first['batch_size']} x {first['seq_len']}, {first['dtype']}, JAX {first['jax']}",
        fontsize=9,
        loc="left",
    )
    figure.legend(loc="outside lower center", ncols=len(CATEGORIES), fontsize=8, frameon=False)
    figure.savefig(path)


def label(row: Mapping[str, Any], unit: str, size: int) -> str:
    """A row's total in a unit of so many bytes; of one with its traffic, what it moves and its least time, if known."""
    total = f"{row['bytes']['total'] / size:.1f}"
    if "traffic" not in row:
        return total
    found = row["traffic"]
    least = f", {1e3 * found['bound_s']:.1f} ms at least" if "bound_s" in found else ""
    return f"{total}; moves {found['bytes'] / size:.1f} {unit}{least}"
