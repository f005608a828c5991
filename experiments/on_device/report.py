"""Tables from the figures alone: DIR/report.md of every device, and docs/device.md's section between its two marks.

Ratios are of functions that took turns, or of steps of one machine; absolute times stand beside the device's name.
Where a step has no figures the text says so.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.memory.common import table
from experiments.on_device.record import RESULTS, ROOT, Record, Row, measured
from experiments.on_device.worker import STEPS, module

GIB = 2**30
NOT_YET = "not measured yet"
PAGE = ROOT / "docs" / "device.md"
BEGIN, END = "<!-- drawn by python -m experiments.on_device --draw -->", "<!-- end of what is drawn -->"


def main(folder: Path | None) -> int:
    """Draws the reports of the folders and, of the project's own results, the page's section."""
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--out {folder}: there is no such folder")
    folders = [folder] if folder is not None else devices()
    for each in folders:
        (each / "report.md").write_text(report(each))
    if folder is None:
        PAGE.write_text(with_section(PAGE.read_text(), section(folders)))
    print(f"{len(folders)} reports drawn", file=sys.stderr)
    return 0


def devices() -> list[Path]:
    """Folders of the project's own figures."""
    return sorted({file.parent for step in STEPS for file in RESULTS.glob(f"*/{step}.json")})


def with_section(page: str, text: str) -> str:
    """The page with this between its marks.

    Raises:
      ValueError: if it does not have both, once.
    """
    if (page.count(BEGIN), page.count(END)) != (1, 1) or page.index(BEGIN) > page.index(END):
        raise ValueError(f"docs/device.md: the marks {BEGIN!r} and {END!r} must be there, once, in this order")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}"


def records(folder: Path) -> dict[str, Record]:
    """Of all steps."""
    return {step: Record(folder, step) for step in STEPS}


def good(record: Record) -> list[Row]:
    """Its rows that were measured."""
    return [row for row in record.rows if measured(row)]


def where(found: dict[str, Record]) -> str:
    """The device, its driver, and versions."""
    header = next((record.header for record in found.values() if record.header), {})
    versions = header.get("versions", {})
    names = [f"{label} {versions[name]}" for name, label in _LABELS.items() if name in versions]
    driver = f"driver {header['driver'].split(',')[0]}" if header.get("driver") else None
    return ", ".join(filter(None, [header.get("device", "unknown device"), driver, *names]))


_LABELS = {"jax": "JAX", "torch": "PyTorch", "peft": "peft", "transformers": "transformers"}


# Sentences: what the page says.


def section(folders: Sequence[Path]) -> str:
    """The section's text."""
    if not folders:
        return f"Speed and peak memory on a device: {NOT_YET}.\n"
    return "\n".join(_of_device(records(folder), folder) for folder in folders)


def _of_device(found: dict[str, Record], folder: Path) -> str:
    lines = [
        f"- **Measured so far**: {_so_far(found)}",
        f"- **Right**: {_right(good(found['kernels']))}",
        f"- **A layer**: {_layer(good(found['layers']))}",
        f"- **The plan**: {_plan(good(found['plans']))}",
        f"- **What fits**: {_fit(good(found['fits']))}",
        "- **A step** of Llama-3.1-8B's geometry, LoRA on all linear maps beside peft with transformers:",
    ]
    link = f"[all figures](../{folder.relative_to(ROOT)}/report.md)" if folder.is_relative_to(ROOT) else ""
    steps = _steps_table([row for row in good(found["steps"]) if row["key"]["geometry"] == "llama3.1-8b"], brief=True)
    return f"{where(found)} ({link}):\n\n" + "\n".join(lines) + f"\n\n{steps or NOT_YET}\n"


def _so_far(found: dict[str, Record]) -> str:
    """How much of the command's rows the figures are, and of which state of the code."""
    if not _commits(found):
        return NOT_YET
    counts = [f"{step} {len(good(record))} of {len(list(module(step).keys(False)))}" for step, record in found.items()]
    return f"rows of {', '.join(counts)}, at commits {', '.join(_commits(found))}; each row in the files has its own."


def _commits(found: dict[str, Record]) -> list[str]:
    """In the order of their runs."""
    rows = [row for record in found.values() for row in good(record)]
    return list(dict.fromkeys(row["commit"] for row in sorted(rows, key=lambda row: row["run"])))


def _right(rows: list[Row]) -> str:
    if not rows:
        return NOT_YET
    worst = max(row["worst"] for row in rows)
    return (
        f"{sum(row['right'] for row in rows)} of {len(rows)} groups of the kernels' cases, in both directions, against "
        f"float64, most of it into poisoned memory; the largest relative error is {worst:.1e}."
    )


def _layer(rows: list[Row]) -> str:
    rows = [row for row in rows if row["key"]["kind"] == "layer"]
    chosen = [row for row in rows if _is(row, model="llama3-8b", rank=16, rows=8192)]
    if not chosen:
        return NOT_YET
    low, high = _range(chosen, "ours", "frozen", "both")
    first, last = _range(chosen, "ours", "frozen", "forward")
    less, more = _range(chosen, "peft", "ours", "both")
    return (
        f"Llama-3-8B's maps at rank 16 and 8,192 tokens take {first:.2f} to {last:.2f} times the frozen products' time "
        f"forward, {low:.2f} to {high:.2f} with the backward pass; peft's layer takes {less:.2f} to {more:.2f} times "
        "as long as ours."
    )


def _range(rows: Iterable[Row], name: str, to: str, of: str) -> tuple[float, float]:
    ratios = [found for row in rows if (found := ratio(row["seconds"].get(of, {}), name, to)) is not None]
    return (min(ratios), max(ratios)) if ratios else (float("nan"), float("nan"))


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float | None:
    """The median of the ratios within the rounds; None where one of the two failed."""
    if name not in seconds or to not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def _plan(rows: list[Row]) -> str:
    rows = [row for row in rows if row.get("measured") and row.get("predicted")]
    if not rows:
        return NOT_YET
    more = [(row["measured"] - row["predicted"]) / 2**20 for row in rows]
    large = [row["measured"] / row["predicted"] - 1 for row in rows if row["predicted"] >= 10 * GIB]
    methods = sorted({row["key"]["method"] for row in rows})
    share = f", {min(large):.1%} to {max(large):.1%} for those above 10 GiB" if large else ""
    return (
        f"the peaks of {len(rows)} steps ({', '.join(methods)}, under their plans) were {min(more):,.0f} to "
        f"{max(more):,.0f} MiB above what was predicted{share} (the allocator leaves up to 128 MiB of a large piece "
        "unused)."
    )


def _fit(rows: list[Row]) -> str:
    if not rows:
        return NOT_YET
    once, twice = sum(row["once"]["runs"] for row in rows), sum(not row["twice"]["runs"] for row in rows)
    return (
        f"{once} of the {len(rows)} largest batches and longest sequences that `jaxpeft plan --largest` named ran; "
        f"twice that failed in {twice}."
    )


# Tables.


def report(folder: Path) -> str:
    """All tables of a device."""
    found = records(folder)
    parts = [
        ("Are the kernels right?", _right_table(good(found["kernels"]))),
        ("How fast is a layer?", _layers_table(good(found["layers"]))),
        ("Eight adapters in one batch", _multi_table(good(found["layers"]))),
        ("Predicted and measured peak", _plans_table(good(found["plans"]))),
        ("A step beside peft with transformers", _steps_table(good(found["steps"]))),
        ("Where a step of ours spends its time", _traces(good(found["steps"]), good(found["layers"]))),
        ("What fits", _fits_table(good(found["fits"]))),
    ]
    failed = [(step, row) for step, record in found.items() for row in record.rows if "failed" in row]
    if failed:
        body = [[step, _words(row["key"]), row["failed"].replace("|", "/")[:160]] for step, row in failed]
        parts.append(("What failed", table(["step", "row", "why"], body)))
    toy = any(record.header.get("figures") is False for record in found.values())
    commits = _commits(found) or [NOT_YET]
    text = f"# {where(found)}\n\nDrawn from the data beside this file by `python -m experiments.on_device --draw`; "
    text += f"commits {', '.join(commits)}.\n\n"
    sections = (f"## {head}\n\n{body or NOT_YET}\n" for head, body in parts)
    text += "Toy sizes on a CPU: these are figures of nothing.\n\n" if toy else ""
    return text + "\n".join(sections)


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _words(key: Row) -> str:
    return " ".join(str(value) for value in key.values())


def _is(row: Row, **wanted: Any) -> bool:
    return all(row["key"].get(name) == value for name, value in wanted.items())


def _right_table(rows: list[Row]) -> str:
    if not rows:
        return ""
    body = []
    for row in rows:
        for case, found in row["cases"].items():
            errors = ", ".join(f"{name} {error:.1e}" for name, error in found["errors"].items())
            body.append([row["key"]["op"], row["key"]["shape"], case, errors, f"{found['poisoned']:.0%}"])
    return table(["operation", "shape", "case", "relative errors", "outputs in poisoned memory"], body)


def _layers_table(rows: list[Row]) -> str:
    layers = [row for row in rows if row["key"]["kind"] == "layer"]
    ceilings = [row for row in rows if row["key"]["kind"] == "ceiling"]
    text = ""
    for row in ceilings:
        rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in row["flops"].items())
        text += f"Ceilings: {rates} (8192 cubed, bfloat16), copies {row['bandwidth'] / 1e12:.2f} TB/s.\n\n"
    if not layers:
        return text
    names = ("ours", "xla", "nf4", "nf4 xla", "peft")
    body = []
    for row in sorted(layers, key=lambda row: [str(row["key"][name]) for name in ("model", "map")]):
        for of, seconds in row["seconds"].items():
            key = row["key"]
            cells = [_digits(ratio(seconds, name, "frozen"), 3) for name in names]
            frozen = f"{1e3 * statistics.median(seconds['frozen']):.3f}" if "frozen" in seconds else ""
            body.append([f"{key['model']} {key['map']}", key["rank"], key["rows"], of, frozen, *cells])
    return text + table(["map", "rank", "rows", "pass", "frozen, ms", *(f"{name}/frozen" for name in names)], body)


def _multi_table(rows: list[Row]) -> str:
    names = ("multi", "multi xla", "ragged_dot")
    body = [
        [
            row["key"]["map"],
            row["key"]["rank"],
            row["key"]["rows"],
            of,
            *(_digits(ratio(s, name, "ours"), 2) for name in names),
        ]
        for row in rows
        if row["key"]["kind"] == "multi"
        for of, s in row["seconds"].items()
    ]
    note = "Over the time of one adapter for all rows; what XLA makes of ragged_dot on a GPU is masked products.\n\n"
    return note + table(["map", "rank", "rows", "pass", *names], body) if body else ""


def _plans_table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        key, predicted, peak = row["key"], row.get("predicted"), row.get("measured")
        off = f"{peak / predicted - 1:+.2%}" if peak and predicted else ""
        off = off if row.get("fits", True) else "does not fit"
        cells = ["" if size is None else f"{size / GIB:.2f}" for size in (predicted, peak)]
        body.append([key["geometry"], f"{key['rows']} x {key['length']}", key["method"], key["save"], *cells, off])
    header = ["geometry", "batch", "method", "plan", "predicted, GiB", "measured, GiB", "off by"]
    return table(header, body) if body else ""


def rate(row: Row) -> float:
    """Tokens per second."""
    return row["key"]["rows"] * row["key"]["length"] / statistics.median(row["seconds"])


def _steps_table(rows: list[Row], brief: bool = False) -> str:
    """Rates over that of peft's fastest of the same geometry, batch and rank, and of its smallest."""
    rows = _as_ours(rows)
    body = []
    order = ("geometry", "rank", "rows", "side")
    for row in sorted(rows, key=lambda row: [*(str(row["key"][name]) for name in order), rate(row)]):
        key = row["key"]
        same = {name: key[name] for name in ("geometry", "rows", "length", "rank")}
        peers = [other for other in rows if _is(other, side="peft", **same)]
        if brief and (key["rank"] != 16 or key.get("products") == "xla" or not peers):
            continue
        how = [key["save"], key.get("products") or key.get("mode"), key.get("adapters"), key.get("attention")]
        own = [f"{rate(row):,.0f}", "" if row.get("peak") is None else f"{row['peak'] / GIB:.1f}"]
        over = ["", ""]
        if peers:
            over = [_over(row, max(peers, key=rate)), _over(row, min(peers, key=lambda r: r.get("peak") or 2**60))]
        words = [f"{key['rows']} x {key['length']}", key["side"], key["base"], ", ".join(filter(None, how))]
        body.append([*([] if brief else [key["geometry"], key["rank"]]), *words, *own, *over])
    header = ["batch", "side", "base", "how", "tokens/s", "peak, GiB", "over peft's fastest", "over peft's smallest"]
    note = "\n~: measured in two runs of the command, perhaps on two cards of one kind.\n"
    text = table(header if brief else ["geometry", "rank", *header], body) if body else ""
    return text + (note if "~" in text else "")


def _as_ours(rows: list[Row]) -> list[Row]:
    """The steps, those that were traced among them where they were not timed apart."""
    found = [row for row in rows if row["key"]["side"] != "trace"]
    for row in rows:
        key = {**row["key"], "side": "ours"}
        if row["key"]["side"] == "trace" and not any(other["key"] == key for other in found):
            found.append({**row, "key": key})
    return found


def _over(row: Row, peer: Row) -> str:
    """How often as fast, with a mark where the two were not measured in one run."""
    return f"{rate(row) / rate(peer):.2f}" + ("" if row.get("run") == peer.get("run") else " ~")


def _traces(rows: list[Row], layers: list[Row]) -> str:
    ceiling = max((max(row["flops"].values()) for row in layers if row["key"]["kind"] == "ceiling"), default=None)
    text = ""
    for row in [row for row in rows if row["key"]["side"] == "trace"]:
        total = sum(row["kinds"].values())
        key = {name: value for name, value in row["key"].items() if name != "side"}
        text += f"{_words(key)}: {total:.3f} s of kernels"
        if ceiling:
            text += f"; its matrix products at this card's ceiling {row['flops'] / ceiling:.3f} s"
        kinds = [[kind, f"{1e3 * seconds:.1f}", f"{seconds / total:.1%}"] for kind, seconds in row["kinds"].items()]
        text += "\n\n" + table(["kind", "ms", "share"], kinds) + "\n"
        top = [[name, f"{1e3 * seconds:.2f}", calls] for name, seconds, calls in row["top"][:12]]
        text += table(["kernel", "ms", "calls"], top) + "\n"
    return text.rstrip("\n")


def _fits_table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        key, named = row["key"], row["named"]
        what = "largest batch" if key["extent"] == "rows" else "longest sequence"
        size = f"{named['rows']} x {named['length']}"
        body.append(
            [key["geometry"], key["method"], key["save"], what, size, _tried(row["once"]), _tried(row["twice"])]
        )
    return table(["geometry", "method", "plan", "what", "named", "tried", "twice that"], body) if body else ""


def _tried(found: Row) -> str:
    if not found["runs"]:
        return "not enough memory"
    return "runs" if found["measured"] is None else f"runs, {found['measured'] / GIB:.2f} GiB"
