"""What a run ends with: its report as a dict and as a table, its loss curve, and the overlap score.

The report is a plain dict that JSON can hold; the table is made from it alone, so both always say
the same. Keys that a run has no value for are None and are left out of the table.
"""

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpeft.train import metrics

# The owners of a step's memory, in the order of the table; docs and tests use these names.
MEMORY = ("weights", "adapters", "optimizer", "gradients", "activations", "workspace")

# What a model is judged by, before the first step and after the last -> how the table calls it.
SCORES = {
    "eval_loss": "validation loss",
    "overlap": "overlap (ROUGE-L)",
    "exact": "exact match",
    "accuracy": "accuracy",
    "f1": "F1 (macro)",
    "mse": "mean squared error",
    "pearson": "correlation (Pearson)",
    "spearman": "rank correlation (Spearman)",
}


def build_report(
    *,
    out: Path,
    method: str,
    steps: int,
    tokens: int,
    seconds: float,
    train_loss: float,
    eval_loss: tuple[float | None, float | None],
    overlap: tuple[float | None, float | None],
    sample: Mapping[str, str] | None,
    trainable_parameters: int,
    frozen_parameters: int,
    memory: Mapping[str, int],
    scores: Mapping[str, tuple[float | None, float | None]] = types.MappingProxyType({}),
    **further: Any,
) -> dict[str, Any]:
    """The report of a finished run.

    Args:
        out: the run's folder.
        method: the method's name.
        steps: optimizer steps taken, those before a resume included.
        tokens: tokens trained on, padding left out.
        seconds: wall time of this process's part of the run.
        train_loss: mean loss of the last step.
        eval_loss: validation loss before the first step and after the last; None without validation data.
        overlap: mean `rouge_l` of generated validation answers before and after.
        sample: one validation example as {"prompt", "reference", "before", "after"}.
        trainable_parameters: numbers of the model and its adapters that training changes.
        frozen_parameters: their other ones.
        memory: bytes of one compiled step for each name in `MEMORY`; further names are kept.
        scores: further scores of the validation data before and after, by their names in `SCORES`.
        further: counts to hand on, for instance skipped_lines=3; must be JSON-able.

    Raises:
        ValueError: for a memory figure that is missing.
    """
    missing = [name for name in MEMORY if name not in memory]
    if missing:
        raise ValueError(f"memory lacks {', '.join(missing)}; it has {', '.join(memory)}")
    return {
        "out": str(out),
        "method": method,
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "train_loss": train_loss,
        "eval_loss_before": eval_loss[0],
        "eval_loss_after": eval_loss[1],
        "overlap_before": overlap[0],
        "overlap_after": overlap[1],
        **{f"{name}_before": before for name, (before, _) in scores.items()},
        **{f"{name}_after": after for name, (_, after) in scores.items()},
        "sample": dict(sample) if sample else None,
        "trainable_parameters": trainable_parameters,
        "frozen_parameters": frozen_parameters,
        "total_parameters": trainable_parameters + frozen_parameters,
        "memory_bytes": dict(memory),
        **further,
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the report as short tables on stdout."""
    import rich.console
    import rich.table

    console = rich.console.Console(highlight=False, markup=False)

    def table(*columns: str) -> rich.table.Table:
        made = rich.table.Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left")
        return made

    in_context = report.get("in_context")
    scores = table("", "before", *([f"{in_context['shots']} in context"] if in_context else []), "after")
    said = lambda value: "-" if value is None else f"{value:.4f}"
    for key, label in SCORES.items():
        shown = [
            report.get(f"{key}_before"),
            *([in_context.get(key)] if in_context else []),
            report.get(f"{key}_after"),
        ]
        if shown[-1] is not None and (key != "exact" or any(shown)):
            scores.add_row(label, *map(said, shown))
    for name, own in report.get("adapters", {}).items():
        if own["eval_loss_after"] is not None:
            before, after = own["eval_loss_before"], own["eval_loss_after"]
            scores.add_row(f"{SCORES['eval_loss']}, {name}", said(before), said(after))
    if scores.row_count:
        console.print(scores, "")

    counts = table("parameters", "number", "share")
    total = report["total_parameters"]
    for kind in ("trainable", "frozen", "total"):
        number = report[f"{kind}_parameters"]
        counts.add_row(kind, f"{number:,}", f"{number / total:.2%}" if total else "-")
    console.print(counts, "")

    owners = table("memory of one step", "bytes")
    for name, size in report["memory_bytes"].items():
        owners.add_row(name.replace("_", " "), human_bytes(size))
    console.print(owners, "")

    if report["sample"]:
        for part in ("prompt", "reference", "before", "after"):
            console.print(f"{part}:\n{_indented(report['sample'][part])}")
        console.print()
    console.print(
        f"{report['method']}: {report['steps']:,} steps, {report['tokens']:,} tokens{_computed(report)}, "
        f"last training loss {report['train_loss']:.4f}\nwritten to {report['out']}{_kept(report)}",
        soft_wrap=True,
    )


def _computed(report: Mapping[str, Any]) -> str:
    form = " under jax.checkpoint" if report.get("remat") == "policy" else ""
    by = f" by {report['optimizer']}" if report.get("optimizer") else ""
    return (f" in {report['dtype']}" if report.get("dtype") else "") + by + form


def _kept(report: Mapping[str, Any]) -> str:
    folder = report.get("compile_cache")
    return f"\ncompiled programs kept in {folder} (--no-compile-cache keeps none)" if folder else ""


def human_bytes(size: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1.

    >>> human_bytes(1536), human_bytes(3 * 2**30)
    ('1.50 KiB', '3.00 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def write_curve(metrics_path: Path, picture_path: Path, unit: str = "nats per token") -> None:
    """Draws the training and validation loss of a metrics.jsonl as a PNG; `unit` is that of the loss.

    Raises:
        InputError: for a file that is not a metrics.jsonl.
    """
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    rows = [row for row in metrics.read(metrics_path) if row.get("loss") is not None]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for split, name, style in (("train", "training", "-"), ("eval", "validation", "o-")):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.2, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture_path, format="png")


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 (Lin, 2004): the longest common subsequence of words, 0 to 1.

    Words are runs of letters, digits and underscores, lower case, of any script. With P and R the
    share of the prediction's and the reference's words in that subsequence, F1 = 2 P R / (P + R).
    Written here because the rouge-score package brings nltk and absl along for these lines. Two
    texts without words score 1.
    """
    said, wanted = (re.findall(r"\w+", text.lower()) for text in (prediction, reference))
    if not said or not wanted:
        return float(said == wanted)
    lengths = [0] * (len(wanted) + 1)  # of common subsequences with each beginning of `wanted`
    for word in said:
        diagonal = 0
        for column, other in enumerate(wanted, start=1):
            diagonal, lengths[column] = (
                lengths[column],
                diagonal + 1 if word == other else max(lengths[column], lengths[column - 1]),
            )
    return 2 * lengths[-1] / (len(said) + len(wanted))


def _indented(text: str, most: int = 12) -> str:
    """The text's first lines, indented; "..." stands for more than `most`."""
    lines = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.splitlines()] or [""]
    shown = lines if len(lines) <= most else [*lines[: most - 1], "..."]
    return "\n".join(f"    {line}" for line in shown)
