"""The tables and the pictures of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.compare import contestants, memory, quality
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft.memory.bars import write_bars

Rows = Sequence[common.Row]
TITLE = "# What each method saves, and what it learns\n"
UNITS = {"loss": "nats per token", "exact": "answers, per cent", "accuracy": "accuracy, per cent"}
FORM = {"loss": ".3f", "exact": ".1f", "accuracy": ".1f"}  # of a score's figures
SHORT = {"llama3.2-3b": "3B", "llama2-7b": "7B"}


def find(rows: Rows, geometry: str, words: str, save: str) -> common.Row | None:
    """The figure of a method with its defaults; None where it was not measured or the method refuses the plan."""
    key = memory.key_of(geometry, words, save)
    found = next((row for row in rows if all(row[name] == value for name, value in key.items())), None)
    return None if found is None or "refused" in found else found


def shown(rows: Rows, geometry: str, words: str) -> common.Row | None:
    """The figure under `matmuls`; of a method that refuses it under `blocks`, or `everything`."""
    found = (find(rows, geometry, words, plan) for plan in ("matmuls", "blocks", "everything"))
    return next(filter(None, found), None)


def reading(row: common.Row, full: common.Row, base: float) -> str:
    """In words, what a step does without that full fine-tuning needs under the same plan.

    Args:
      row, full: figures.
      base: bytes of the frozen weights as they were loaded. What a step holds beyond them are masters, four bytes for
        each number that trains, and what is frozen beside the base.
    """
    ours, theirs, parts = row["bytes"], full["bytes"], []
    beyond = lambda of: of["adapters"] + max(of["weights"] - base, 0)
    fixed = max(beyond(ours) - 4 * row["trained"], 0)
    if not row["backward"]:
        parts.append("no backward pass: saves gradients, masters, optimizer state and all activations")
    else:
        own, rest = (of["gradients"] + of["optimizer"] + beyond(of) for of in (ours, theirs))
        saved = 1 - (own - fixed) / rest
        said = "over 99.9% of" if saved > 0.9995 else f"{saved:.1%} of"
        some = f"saves {said} gradients, masters and optimizer state"
        parts.append(some if saved >= 0.0005 else "saves no gradients, masters or optimizer state")
        kept = ours["activations"] / theirs["activations"]
        if abs(1 - kept) < 0.005:
            parts.append("no activations")
        elif kept < 1:
            parts.append(f"{1 - kept:.0%} of the activations")
        else:
            parts.append(f"keeps {kept - 1:.0%} more activations")
    held = (min(ours["weights"], base) + fixed) / base
    if held < 0.9:
        parts.append(f"holds the base in {held:.0%} of its bytes")
    elif held > 1.05:
        parts.append(f"holds {held - 1:.0%} more frozen weights")
    return "; ".join(parts)


def unmeasured(rows: Rows, geometry: str, words: str) -> str:
    """What is said of a method that has no figure on the model: why, where that is known."""
    if words == contestants.BASE:
        return "the model as it was"
    if words == contestants.ICL:
        return f"the same with {quality.SHOTS} examples in context"
    if not contestants.is_for(words, classifies=False):
        return "for models that classify rows"
    own = (geometry, words, list(contestants.options(words, geometry)))
    of_method = [row for row in rows if (row["geometry"], row["method"], row["options"]) == own]
    return next((row["refused"].replace("|", "/") for row in of_method if "refused" in row), "")


def refusals(qualities: Rows, tasks: Sequence[str]) -> str:
    """Which methods the models of tasks have no place for, and why, in brackets."""
    said = [
        f"{task}: {row['refused'].replace('|', '/')}"
        for task in tasks
        for row in qualities
        if row["task"] == task and "refused" in row and not quality.at_best(qualities, task, row["method"])
    ]
    return f" ({'; '.join(said)})" if said else ""


def titles(task: str) -> list[str]:
    """Of the columns of a task."""
    scores = quality.DATA[task].scores
    return [task] if len(scores) == 1 else [f"{task}, {score}" for score in scores]


def plus_minus(runs: Rows, name: str, form: str) -> str:
    """Mean ± standard deviation over the seeds, of one run its own; "" without runs."""
    values = [run[name] for run in runs]
    if len(values) < 2:
        return "".join(f"{value:{form}}" for value in values)
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def _row(words: str, memories: Rows, qualities: Rows, models: Sequence[str], tasks: Sequence[str]) -> list[str]:
    first = models[0]
    own, full, lora = (shown(memories, first, name) for name in (words, "full", "lora"))
    cells = [words]
    if own is None:
        cells += ["", ""]
    else:
        trained = own["trained"] + (own["moved"] if not own["backward"] else 0)
        cells += [f"{trained / 1e6:.2f}", "" if own["file"] is None else f"{own['file'] / 2**20:.1f}"]
    for geometry in models:
        for save in memory.PLANS:
            found = find(memories, geometry, words, save)
            cells.append(f"{found['bytes']['total'] / GIB:.1f}" if found else "")
    cells.append(f"{own['flops'] / lora['flops']:.2f}" if own and lora else "")
    for task in tasks:
        runs = quality.at_best(qualities, task, words)
        cells += [plus_minus(runs, score, FORM[score]) for score in quality.DATA[task].scores]
    if own is None or full is None or lora is None:
        said = unmeasured(memories, first, words)
    elif words == "full":
        said = "the measure"
    else:
        said = reading(own, find(memories, first, "full", own["save"]) or full, lora["bytes"]["weights"])
    return [*cells, said]


def document(memories: Rows, qualities: Rows) -> str:
    """The table of all methods, and that of PEFT's own benchmark."""
    measured = {row["geometry"] for row in memories}
    models = [name for name in memory.MODELS if name in measured]
    tasks = [task for task in quality.DATA if any(row["task"] == task for row in qualities)]
    header = ["method", "trained, millions", "file, MiB"]
    header += [f"{SHORT[name]}, {save}" for name in models for save in memory.PLANS]
    header += ["FLOPs / LoRA's", *(title for task in tasks for title in titles(task)), "reading"]
    body = [_row(words, memories, qualities, models, tasks) for words in contestants.everybody()]
    body = [cells for cells in body if any(cells[1:])]
    jax = ", ".join(sorted({row["jax"] for row in memories}))
    text = (
        f"{TITLE}\nPeak of a step of {', '.join(models)} by plan, GiB on an {memory.TARGET}, batch {memory.BATCH} x "
        f"{memory.LENGTH}, bfloat16 base; JAX {jax}. Empty: the method refuses the plan, or was not "
        "measured. Trained numbers, files, FLOPs and readings are those of the first model. "
    )
    if tasks:
        text += (
            "Quality at each method's best rate, mean ± standard deviation over seeds ("
            f"{', '.join(f'{task}: {len(quality.DATA[task].seeds)}' for task in tasks)}): loss in nats per token "
            "(e2e_nlg too; less is better), others in per cent of the test rows. Empty: refused"
            f"{refusals(qualities, tasks)}, or not among those that are trained on a task. "
        )
    return f"{text}\n\n{common.table(header, body)}\n{peft_table(memories)}"


def peft_table(memories: Rows) -> str:
    """Our steps in the setting of PEFT's benchmark beside its figures."""
    body = []
    for title, name, options, gib, accuracy in memory.PEFT:
        key = memory.key_of(memory.MODELS[0], name, "everything", options)
        found = next((row for row in memories if all(row[field] == value for field, value in key.items())), None)
        if found is None or "refused" in found:
            continue
        ours = f"{found['bytes']['total'] / GIB:.2f}"
        body.append([title, f"{found['trained'] / 1e6:.2f}", ours, f"{gib:.2f}", f"{accuracy:.3f}"])
    if not body:
        return ""
    head = (
        "## In the setting of PEFT's benchmark\n\nLlama-3.2-3B, batch 4, 768 tokens, without checkpointing "
        "(`everything`). PEFT's figures: method_comparison/MetaMathQA, `accelerator_memory_max`, what torch's "
        "allocator reserved at most, with rows of at most 768 tokens; ours is what one step of full rows needs. "
        "Full fine-tuning there holds weights, gradients and moments in bfloat16, here masters and moments in "
        "float32."
    )
    whole = [find(memories, memory.MODELS[0], name, "everything") for name in ("lora_fa", "lora")]
    totals = [f"{found['bytes']['total'] / GIB:.1f}" for found in whole if found is not None]
    if len(totals) == 2:
        ours, theirs = totals
        head += (
            f" LoRA-FA's A is frozen throughout: on all linear maps a step takes {ours} GiB in place of LoRA's "
            f"{theirs}; q and v alone, as in this table, keep little to begin with. PEFT 0.21 freezes A by a flag, "
            "which the end of `disable_adapter` undoes."
        )
    columns = ["method", "trained, millions", "ours, GiB", "PEFT's, GiB", "PEFT's accuracy"]
    return f"{head}\n\n{common.table(columns, body)}"


def front_of(points: Sequence[tuple[float, float, str]], sign: int) -> list[tuple[float, float, str]]:
    """Of (x, y, name), less x and less sign * y being better, those that nothing beats in both, by x."""
    return sorted(p for p in points if not any(q[0] <= p[0] and sign * q[1] < sign * p[1] for q in points))


def pareto(memories: Rows, qualities: Rows, path: Path) -> None:
    """Quality against the compiled peak, a panel for each task; a line joins what nothing beats in both.

    Names that would lie on another's are left out, those on the line last.
    """
    from matplotlib.figure import Figure

    tasks = [task for task in quality.DATA if any(quality.at_best(qualities, task, w) for w in contestants.names())]
    if not tasks:
        return
    figure = Figure(figsize=(9, 5.5 * len(tasks)), dpi=110, layout="constrained")
    names = []
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
        score, points = quality.DATA[task].scores[0], []
        for words in contestants.names():
            runs, own = quality.at_best(qualities, task, words), shown(memories, memory.MODELS[0], words)
            if runs and own:
                points.append((own["bytes"]["total"] / GIB, mean(run[score] for run in runs), words))
        front = front_of(points, 1 if quality.BETTER[score] == "less" else -1)
        axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="tab:red", linewidth=1, zorder=1)
        for x, y, words in [*front, *(point for point in points if point not in front)]:
            axes.scatter(x, y, s=14, color="tab:red" if (x, y, words) in front else "#4c6a92")
            names.append(axes.annotate(words, (x, y), (3, 2), textcoords="offset points", fontsize=7))
        axes.set(xscale="log", ylabel=f"{task}: {UNITS[score]}", xlabel=f"GiB of a step of {memory.MODELS[0]}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.draw_without_rendering()
    taken: list[Any] = []
    for name in names:
        box = name.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            name.remove()
        else:
            taken.append(box)
    figure.savefig(path)


def draw(memories: Rows, qualities: Rows, folder: Path) -> None:
    """compare.md, peaks.png, pareto.png."""
    common.write("compare.md", document(memories, qualities), folder)
    bars = [row for words in contestants.names() if (row := shown(memories, memory.MODELS[0], words))]
    if bars:
        bars.sort(key=lambda row: -row["bytes"]["total"])
        write_bars({"model": memory.MODELS[0], "rows": bars}, folder / "peaks.png")
    pareto(memories, qualities, folder / "pareto.png")
