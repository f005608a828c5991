"""One table of methods without a backward pass, with a part of it, or with less beside it.

Memory and FLOPs are those of a step of Llama-2-7B, 4 x 512 tokens, bfloat16, compiled for an H200. Quality is that of
`experiments.compare.quality`, on stories260K and E2E NLG at the best rate of its grid, three seeds: after as many steps
as everybody (120), of its figures, or measured here for what it has no place for; and after as many FLOPs as LoRA's 120
steps have, counted as `jaxpeft plan` counts them, at the rate that was best after equal steps. The search for a rate of
what is measured here is the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from experiments.compare import contestants, quality, table
from experiments.memory import common
from experiments.memory.common import GIB
from experiments.tuning import place, rate, search
from jaxpeft import hf, recipe
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries
from jaxpeft.train.optimizer import defaults, direction_of

NAME = "one_table"
GEOMETRY, BATCH, LENGTH, TARGET = "llama2-7b", 4, 512, "h200"
TASK, MEASURE = "e2e_nlg", "lora"
PROTOCOL = quality.DATA[TASK]
COMPARED = common.RESULTS.parent / "compare"


class Entry(NamedTuple):
    """A line of the table.

    words, options: the recipe at 7B.  small: its options on stories260K, None where they are the contestants'.
    optimizer: None: the method's own.  in_backward: whether layers are updated in the backward pass.
    said: what it comes to.
    """

    words: str
    options: tuple[str, ...] = ()
    small: tuple[str, ...] | None = None
    optimizer: str | None = None
    in_backward: bool = False
    said: str = ""

    @property
    def title(self) -> str:
        """What the table calls it."""
        extra = [self.optimizer] if self.optimizer else []
        extra += ["updates in the backward pass"] if self.in_backward else []
        return ", ".join([" ".join([self.words, *self.options]), *extra])

    @property
    def compared(self) -> bool:
        """Whether its runs of equally many steps are those of `experiments.compare`."""
        return self.small is None and self.optimizer is None and self.words in contestants.names()


def variant(name: str, said: str, words: str = "mezo") -> Entry:
    """A variant of MeZO."""
    return Entry(words, (f"variant={name}",), (f"variant={name}",), said=said)


ENTRIES = (
    Entry("full", said="the measure: masters, gradients and moments are most of it"),
    Entry("full", optimizer="adam8bit", small=(), said="moments in a quarter of the bytes; masters and gradients stay"),
    Entry("full", in_backward=True, said="the same steps without the gradients of all layers"),
    Entry("lora", said="weights and activations are left; a plan takes most of the latter"),
    Entry(
        "lora+ist",
        said="LoRA in a quarter of the layers at a time: little is left to save; FLOPs with the trials",
    ),
    Entry("half", said="half of the matrices train: half of masters, gradients and moments"),
    Entry("lisa", said="two layers, embeddings and head train: the latter are most of what trains"),
    Entry("owlore", said="five layers in projected form: embeddings and head, in full, are most of what trains"),
    Entry("galore", said="state and gradients of a few directions of each kernel"),
    Entry("natural_galore", said="GaLore's, and ten times its moments for the past of gradients"),
    Entry(
        "welore",
        said="factors in place of the dense kernels; a plan has no spectra, and takes every kernel as low-rank",
    ),
    Entry(
        "hybrid",
        ("which=last:4",),
        ("which=last:1",),
        said="gradients for four layers, which are most of what it needs beside the weights, and MeZO for the rest",
    ),
    Entry("hybrid+lora", ("which=last:4",), ("which=last:1",), said="the same of LoRA's factors"),
    Entry("mezo", said="the memory of a forward pass; many steps for little"),
    variant("one_sided", "one of the two passes is at the weights themselves: the same memory, a coarser slope"),
    variant("sign", "only the slope's sign counts"),
    variant("conservative", "five passes, of three candidates the best"),
    variant("blockwise", "a slope for each layer: two passes for each of them"),
    variant("forward", "the exact slope by a tangent, beside each value"),
    variant("momentum", "masters and one moment of what trains, which is all", "mezo+full"),
    variant("adam", "masters and two moments: the memory of full fine-tuning's state", "mezo+full"),
    Entry("sparse_mezo", said="MeZO on small weights, at its memory"),
    Entry("mezo+lora", said="MeZO on LoRA's factors: nothing of the weights moves"),
    Entry("quantize+qzo", ("format=int4",), ("format=int4", "group=4"), said="MeZO on the scales of int4 kernels"),
    Entry("zo2", said="MeZO with the layers' kernels in the host's memory"),
)


# What is measured.


def measure(key: common.Row) -> common.Row:
    """A figure: bytes and FLOPs of a step at 7B, FLOPs of a small one, or the losses of a run."""
    try:
        return {"memory": _memory, "flops": _flops, "run": _run}[key["what"]](key)
    except InputError as error:
        return {"refused": str(error)}


def _memory(key: common.Row) -> common.Row:
    method = recipe.parse(key["method"], key["options"])
    options = {"optimizer": key["optimizer"], "update_in_backward": key["in_backward"]}
    step = planner.make_step(
        geometries.load(GEOMETRY), method, BATCH, LENGTH, key["save"], "bfloat16", packed=False, **options
    )
    made = planner.row(step, targets.target(TARGET))
    return {name: made[name] for name in ("bytes", "host_bytes", "fits", "flops", "recompute_flops")}


def _flops(key: common.Row) -> common.Row:
    config = hf.load_config(str(quality.place_of(PROTOCOL.model)))
    method = recipe.parse(key["method"], key["options"])
    step = planner.make_step(config, method, PROTOCOL.batch, PROTOCOL.tokens, "everything", "float32")
    return {"flops": planner.cost(step).flops}


@functools.lru_cache(maxsize=1)
def _runner(words: str, options: tuple[str, ...], optimizer: str | None) -> quality.Runner:
    method = recipe.parse(words, options)
    return quality.Runner(TASK, words, method, direction_of(method.specs, optimizer))


def _run(key: common.Row) -> common.Row:
    runner = _runner(key["method"], tuple(key["options"]), key["optimizer"])
    return runner(key["lr"], key["seed"], key["steps"])


# What is asked for. Where nothing may be measured, what is missing is None.


def _asked(figures: common.Figures, **key: Any) -> common.Row | None:
    try:
        return figures(**key)
    except KeyError:
        if figures.measure is not None:
            raise
        return None


def _small(entry: Entry) -> list[str]:
    """Its options on stories260K."""
    return list(contestants.options(entry.words, PROTOCOL.model) if entry.small is None else entry.small)


def memory_of(figures: common.Figures, entry: Entry, save: str) -> common.Row | None:
    """A step at 7B under a plan; None where it is missing or refused."""
    own = {"method": entry.words, "options": list(entry.options), "optimizer": entry.optimizer}
    found = _asked(figures, what="memory", **own, in_backward=entry.in_backward, save=save)
    return None if found is None or "refused" in found else found


def equal_steps(figures: common.Figures, entry: Entry, compared: Sequence[common.Row]) -> list[common.Row]:
    """The runs of 120 steps at the best rate, one for each seed; [] where some are missing."""
    if entry.in_backward:  # what it computes is its neighbour's
        return []
    if entry.compared:
        return quality.at_best(compared, TASK, entry.words)
    key: dict[str, Any] = {"what": "run", "method": entry.words, "options": _small(entry)}
    key |= {"optimizer": entry.optimizer}
    key |= {"steps": PROTOCOL.steps}
    if figures.measure is not None:
        _tune(figures, entry, key)
    ran = [row for row in figures.rows if all(row.get(name) == x for name, x in key.items()) and "loss" in row]
    tried = [row for row in ran if row["seed"] == 0 and math.isfinite(row["tune_loss"])]
    if not tried:
        return []
    lr = min(tried, key=lambda row: (row["tune_loss"], row["lr"]))["lr"]
    runs = [_asked(figures, **key, lr=lr, seed=seed) for seed in PROTOCOL.seeds]
    return [run for run in runs if run is not None] if all(runs) else []


def _tune(figures: common.Figures, entry: Entry, key: common.Row) -> None:
    """Runs of seed 0, until both neighbours of the best rate are worse."""
    start = place(defaults(recipe.parse(entry.words, _small(entry)).specs).lr or quality.FIRST)
    if "refused" not in figures(**key, lr=rate(start), seed=0):
        for stride in PROTOCOL.strides:
            start = search(lambda index: figures(**key, lr=rate(index), seed=0)["tune_loss"], start, stride)


def equal_flops(figures: common.Figures, entry: Entry, best: Sequence[common.Row]) -> list[common.Row]:
    """The runs of as many FLOPs as LoRA's; they say in "steps" how many those are."""
    if not best:
        return []
    counts = [
        _asked(figures, what="flops", method=words, options=options)
        for words, options in ((MEASURE, []), (entry.words, _small(entry)))
    ]
    if not all(counts):
        return []
    lora, own = (count["flops"] for count in counts if count)
    steps = round(PROTOCOL.steps * lora / own)
    key = {"what": "run", "method": entry.words, "options": _small(entry), "optimizer": entry.optimizer}
    runs = [_asked(figures, **key, steps=steps, lr=best[0]["lr"], seed=seed) for seed in PROTOCOL.seeds]
    return [run for run in runs if run is not None] if all(runs) else []


def collect(figures: common.Figures, compared: Sequence[common.Row] | None = None) -> list[common.Row]:
    """A row for each entry: {"entry", "plans": {plan: figure}, "steps": runs, "flops": runs, "rates": tried here}.

    compared: the figures of `experiments.compare`.
    """
    compared = common.load("quality", COMPARED) if compared is None else compared
    plans = {entry: {"default": memory_of(figures, entry, plan_of(entry))} for entry in ENTRIES}
    rows = []
    for entry in ENTRIES:
        steps = equal_steps(figures, entry, compared)
        rows.append({"entry": entry, "plans": plans[entry], "steps": steps})
        rows[-1]["flops"] = equal_flops(figures, entry, steps)
        own = {"what": "run", "method": entry.words, "options": _small(entry), "steps": PROTOCOL.steps}
        ran = [row for row in figures.rows if all(row.get(name) == x for name, x in own.items())]
        rows[-1]["rates"] = sorted({row["lr"] for row in ran if row["optimizer"] == entry.optimizer})
    for entry in ENTRIES:
        if plan_of(entry) != "blocks":
            plans[entry]["blocks"] = memory_of(figures, entry, "blocks")
    return rows


def plan_of(entry: Entry) -> str:
    """The plan that a run has of itself."""
    backward = all(name not in ("mezo", "sparse_mezo", "qzo", "zo2") for name in entry.words.split("+"))
    return "matmuls" if backward else "blocks"


# What is drawn.


def found(rows: Sequence[common.Row]) -> Iterator[tuple[Entry, common.Row, float]]:
    """(entry, row, the least bytes of its plans) of what has a figure of memory."""
    for row in rows:
        if totals := [plan["bytes"]["total"] for plan in row["plans"].values() if plan]:
            yield row["entry"], row, min(totals)


def document(rows: Sequence[common.Row]) -> str:
    """The table under its title, and a sentence for each line."""
    lora = next((row["plans"]["default"] for row in rows if row["entry"].words == MEASURE), None)
    header = ["step", "GiB", "`blocks`", "FLOPs / LoRA's", "optimizer, GiB", "gradients, GiB"]
    header += ["loss, equal steps", "loss, equal FLOPs", "in steps"]
    body = [_cells(row, lora) for row in rows]
    jax = ", ".join(sorted({plan["jax"] for row in rows for plan in row["plans"].values() if plan}))
    text = (
        f"{GEOMETRY}, {BATCH} x {LENGTH} tokens, bfloat16, an {TARGET}: bytes under the plan that a run has of itself "
        "(`matmuls`; without a backward pass `blocks`) and under `blocks`; FLOPs are those of matrix products. Loss in "
        f"nats per token of stories260K on E2E NLG, mean ± standard deviation of three seeds: after {PROTOCOL.steps} "
        f"steps, and after the FLOPs that LoRA's {PROTOCOL.steps} have. Empty: not measured. JAX {jax}."
    )
    rates = [f"`{row['entry'].words}` {', '.join(map(str, row['rates']))}" for row in rows if row["rates"]]
    text += f" Rates that were tried here: {'; '.join(rates)}." if rates else ""
    said = [f"`{row['entry'].title}`: {row['entry'].said}." for row in rows if any(row["plans"].values())]
    return f"# One table\n\n{text}\n\n{common.table(header, body)}\n{common.bullets(said)}"


def _cells(row: common.Row, lora: Mapping[str, Any] | None) -> list[str]:
    entry, (default, blocks) = row["entry"], (row["plans"].get(name) for name in ("default", "blocks"))
    gib = lambda plan, name: f"{plan['bytes'][name] / GIB:.2f}" if plan else ""
    runs = row["flops"]
    return [
        entry.title,
        gib(default, "total"),
        gib(default if plan_of(entry) == "blocks" else blocks, "total"),
        f"{default['flops'] / lora['flops']:.2f}" if default and lora else "",
        gib(default, "optimizer"),
        gib(default, "gradients"),
        table.plus_minus(row["steps"], "loss", ".3f"),
        table.plus_minus(runs, "loss", ".3f"),
        str(runs[0]["steps"]) if runs else "",
    ]


def draw(rows: Sequence[common.Row], path: Path) -> None:
    """Quality after equally many steps against the least compiled peak; a line joins what nothing beats in both."""
    from matplotlib.figure import Figure

    points = [
        (least / GIB, mean(run["loss"] for run in row["steps"]), e.title)
        for e, row, least in found(rows)
        if row["steps"]
    ]
    if not points:
        return
    figure = Figure(figsize=(9, 5.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    front = sorted(p for p in points if not any(q[0] <= p[0] and q[1] < p[1] for q in points))
    axes.plot([p[0] for p in front], [p[1] for p in front], color="tab:red", linewidth=1, zorder=1)
    for x, y, title in points:
        axes.scatter(x, y, s=14, color="tab:red" if (x, y, title) in front else "#4c6a92")
        axes.annotate(title, (x, y), (3, 2), textcoords="offset points", fontsize=7)
    what = f"GiB of a step of {GEOMETRY}, {BATCH} x {LENGTH} tokens, under the better of `matmuls` and `blocks`"
    axes.set(xscale="log", ylabel=f"{TASK}: nats per token after {PROTOCOL.steps} steps", xlabel=what)
    axes.grid(alpha=0.3)
    figure.savefig(path)
