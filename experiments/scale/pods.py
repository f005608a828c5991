"""What does a step need on 8 to 1024 chips, and what do they send each other?

    python -m experiments.scale.pods           # compiles what the data lacks, a point a minute on two idle cores
    python -m experiments.scale.pods --draw    # tables and picture from the data

Steps of Llama-3.1-8B's, -70B's and -405B's geometry on slices of TPU v5p, compiled without one: rows of 4096 tokens,
bfloat16, rank 16 on all linear maps, layers recomputed but for their inputs (`blocks`). Weak scaling: a row per chip;
weights over all chips of a slice of up to 64 (`fsdp`), beyond that over 64, and rows over the rest (`data`). Strong
scaling: 1024 rows, 4 Mi tokens, on ever more chips. The smallest slice: with a row per chip. Long rows: one row of
128 Ki or 1 Mi tokens (more positions than Llama 3.1 is made for), divided over the chips (`seq`), the weights of 70B
over eight of them (`tensor`). Data in results/scale/pods.json, tables in pods.md, picture in pods.png.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe, sharding
from jaxpeft.memory import planner, pods, targets
from jaxpeft.memory.collectives import KINDS
from jaxpeft.models import geometries

NAME, FOLDER = "pods", common.RESULTS.parent / "scale"
LENGTH, RANK, PLAN, MOST_FSDP = 4096, 16, "blocks", 64
SLICES = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}
GEOMETRIES = ("llama3.1-8b", "llama3.1-70b", "llama3.1-405b")
METHODS = ("lora", "lora_fa", "full")
WEAK = (8, 64, 1024)
STRONG = (64, 256, 1024)
STRONG_ROWS = 1024


def key(geometry: str, method: str, chips: int, rows: int) -> dict[str, Any]:
    """What is compiled."""
    fsdp = min(chips, MOST_FSDP)
    mesh = f"data={chips // fsdp},fsdp={fsdp}" if chips > fsdp else f"fsdp={fsdp}"
    return {
        "geometry": geometry,
        "method": method,
        "target": f"v5p:{SLICES[chips]}",
        "mesh": mesh,
        "batch_size": rows,
        "seq_len": LENGTH,
        "dtype": "bfloat16",
        "save": PLAN,
    }


def weak() -> list[dict[str, Any]]:
    """A row per chip."""
    return [key(geometry, method, n, n) for method in METHODS for geometry in GEOMETRIES for n in WEAK]


def strong() -> list[dict[str, Any]]:
    """As many rows on all slices."""
    return [key("llama3.1-70b", "lora", n, STRONG_ROWS) for n in STRONG]


def smallest() -> list[dict[str, Any]]:
    """Slices between those of the weak scaling, where a geometry begins to fit."""
    between = [("llama3.1-405b", method, n) for method in ("lora", "lora_fa") for n in (16, 32)]
    return [key(*of, of[-1]) for of in [*between, ("llama3.1-70b", "full", 16), ("llama3.1-70b", "full", 32)]]


def long() -> list[dict[str, Any]]:
    """One row of 128 Ki or 1 Mi tokens."""
    tokens = (1 << 17, 1 << 20)
    small = [("llama3.1-8b", n, length, f"seq={n}") for length in tokens for n in (8, 64)]
    meshes = {8: "tensor=8", 64: "tensor=8,seq=8", 256: "tensor=8,seq=32"}
    large = [("llama3.1-70b", n, length, mesh) for length in tokens for n, mesh in meshes.items()]
    return [
        {**key(geometry, "lora", n, 1), "seq_len": length, "mesh": mesh}
        for geometry, n, length, mesh in [*small, *large]
    ]


def measure(of: common.Row) -> common.Row:
    """A point's bytes of a chip, FLOPs, collectives and bound, as `jaxpeft plan --mesh` gives them."""
    begun, target = time.process_time(), targets.target(of["target"])
    mesh = sharding.make_mesh(of["mesh"], targets.devices(target))
    options: dict[str, Any] = {} if of["method"] == "full" else {"rank": RANK, "targets": "all-linear"}
    method = recipe.parse(of["method"], **options)
    config = geometries.load(of["geometry"])
    config |= {"max_position_embeddings": max(config["max_position_embeddings"], of["seq_len"])}
    step = planner.make_step(config, method, of["batch_size"], of["seq_len"], of["save"], of["dtype"], mesh=mesh)
    made = pods.row(step, target)
    names = ("chips", "bytes", "device_bytes", "fits", "flops", "recompute_flops", "flops_per_chip", "collectives")
    found = {name: made.get(name) for name in (*names, "bound", "rematerialised")}
    return {**found, "cpu_seconds": round(time.process_time() - begun, 1)}


def known(figures: common.Figures, keys: Iterable[dict[str, Any]]) -> list[common.Row]:
    """The points of these that there are; all of them where they may be compiled."""
    found = []
    for of in keys:
        try:
            found.append(figures(**of))
        except KeyError:
            continue
    return found


HEAD = ["geometry", "method", "chips", "mesh", "arguments", "temporaries", "total", "fits", "TFLOP"]
HEAD += [*KINDS, "compute", "memory", "interconnect", "utilisation"]


def cells(row: common.Row) -> list[Any]:
    """A row of a table: GiB of a chip, TFLOP of a chip, GiB that it sends by kind, milliseconds."""
    sizes, bound, sent = row["bytes"], row["bound"], row["collectives"] or {}
    times = (
        [f"{1e3 * bound[f'{name}_s']:,.0f}" for name in ("compute", "memory", "interconnect")] if bound else [""] * 3
    )
    return [
        row["geometry"],
        row["method"],
        row["chips"],
        row["mesh"],
        *(f"{sizes[name] / GIB:.2f}" for name in ("arguments", "temporaries", "total")),
        "yes" if row["fits"] else "no",
        f"{row['flops_per_chip'] / 1e12:,.0f}",
        *(f"{sent[kind]['sent'] / GIB:.2f}" if kind in sent else "" for kind in KINDS),
        *times,
        f"{bound['utilisation']:.0%}" if bound and row["fits"] else "",
    ]


def growth(rows: list[common.Row], of: Any) -> float | None:
    """The largest growth of a figure from a slice to a larger one, as a share of it."""
    values = [of(row) for row in sorted(rows, key=lambda row: row["chips"])]
    return max((b / a - 1 for n, a in enumerate(values) for b in values[n + 1 :]), default=None)


def by(rows: list[common.Row]) -> dict[tuple[str, str], list[common.Row]]:
    """{(geometry, method): points, fewest chips first}."""
    found: dict[tuple[str, str], list[common.Row]] = {}
    for row in sorted(rows, key=lambda row: row["chips"]):
        found.setdefault((row["geometry"], row["method"]), []).append(row)
    return found


def findings(rows: list[common.Row]) -> str:
    """How much a chip's bytes and FLOPs grow with the slice."""
    body = []
    for (geometry, method), points in by(rows).items():
        total, flops = (growth(points, of) for of in (lambda r: r["bytes"]["total"], lambda r: r["flops_per_chip"]))
        if total is not None and flops is not None:
            chips = " to ".join(str(points[n]["chips"]) for n in (0, -1))
            body.append([geometry, method, chips, f"{total:+.1%}", f"{flops:+.1%}"])
    return common.table(["geometry", "method", "chips", "bytes of a chip grow by", "FLOPs of a chip grow by"], body)


def fitting(rows: list[common.Row]) -> str:
    """The smallest slice, of those compiled with a row per chip, that fits each; and the largest that does not."""
    body = []
    for (geometry, method), points in by(rows).items():
        fits = next((row for row in points if row["fits"]), None)
        less = [row for row in points if not row["fits"] and (fits is None or row["chips"] < fits["chips"])]
        show = lambda row: f"{row['target']} ({row['chips']} chips), {row['bytes']['total'] / GIB:.1f} GiB of each"
        body.append([geometry, method, show(fits) if fits else "none", show(less[-1]) if less else ""])
    return common.table(["geometry", "method", "the smallest slice that fits", "the largest that does not"], body)


def document(
    rows: list[common.Row], steps: list[common.Row], others: list[common.Row], longer: list[common.Row]
) -> str:
    """All tables under their titles."""
    jax, slowest = (
        ", ".join(sorted({row["jax"] for row in rows})),
        max(row.get("cpu_seconds", 0) for row in (*rows, *steps, *others, *longer)),
    )
    return f"""# Steps on 8 to 1024 chips

TPU v5p, rows of {LENGTH} tokens, bfloat16, rank {RANK} on all linear maps, `{PLAN}`; JAX {jax}. GiB and TFLOP of one
chip; by kind, GiB that it sends; milliseconds at least. The slowest plan took {slowest:.0f} s of a busy CPU.

## A row per chip

{common.table(HEAD, map(cells, rows))}
{findings(rows)}
## {STRONG_ROWS} rows on ever more chips

{common.table(HEAD, map(cells, steps))}
## The smallest slice that fits

Of the slices compiled, a row per chip.

{fitting([*rows, *others])}
## One long row

{common.table(["tokens", *HEAD], ([f"{row['seq_len']:,}", *cells(row)] for row in longer))}"""


def draw(rows: list[common.Row], steps: list[common.Row], path: Path) -> None:
    """Bytes of a chip and what it sends by its part of the weak scaling; the strong scaling's times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    colors = dict(zip(GEOMETRIES, ("tab:green", "tab:blue", "tab:red"), strict=True))
    styles = dict(zip(METHODS, ("-o", "--s", ":^"), strict=True))
    for (geometry, method), points in by(rows).items():
        chips, label = [row["chips"] for row in points], f"{geometry.removeprefix('llama3.1-')}, {method}"
        look = {"color": colors[geometry], "label": label}
        axes[0].plot(chips, [row["bytes"]["total"] / GIB for row in points], styles[method], **look)
        sent = [sum(kind["sent"] for kind in row["collectives"].values()) / GIB for row in points]
        axes[1].plot(chips, sent, styles[method], **look)
    limit = rows[0]["device_bytes"] / GIB
    axes[0].axhline(limit, color="black", linewidth=1)
    axes[0].annotate("a v5p's memory", (8, limit), textcoords="offset points", xytext=(0, 4))
    titles = (
        "GiB of a chip, a row each",
        "GiB that a chip sends, a row each",
        "seconds at least, 70b, lora, 1024 rows",
    )
    for part in ("compute", "memory", "interconnect"):
        axes[2].plot([row["chips"] for row in steps], [row["bound"][f"{part}_s"] for row in steps], "-o", label=part)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="chips", title=title)
        axis.set_xticks(
            [8, 16, 32, 64, 128, 256, 512, 1024], labels=["8", "16", "32", "64", "128", "256", "512", "1024"]
        )
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    args = common.arguments(__doc__)
    figures = common.Figures(NAME, None if args.draw else measure, FOLDER)
    rows, steps, others, longer = (known(figures, keys()) for keys in (weak, strong, smallest, long))
    common.write(f"{NAME}.md", document(rows, steps, others, longer), FOLDER)
    draw(rows, steps, FOLDER / f"{NAME}.png")
