"""Does LoRA-FA lose to LoRA, and by how much?

    python -m experiments.lora_fa_quality          # what results/lora_fa_quality lacks; half an hour on one CPU core
    python -m experiments.lora_fa_quality --methods lora_fa_orthonormal --ranks 8
    python -m experiments.lora_fa_quality --quick  # a minute: is the script sound?

Yes, at equal rank, by a little; at equal trainable parameters hardly. Loss of LoRA-FA minus LoRA of the same rank, in
nats per completion token, mean ± standard deviation of the differences over three seeds:

    rank                          4                 8                 16
    dolly, test               +0.122 ± 0.012    +0.084 ± 0.007    +0.074 ± 0.013
    dolly, held-out prompts   +0.116 ± 0.007    +0.089 ± 0.022    +0.082 ± 0.005
    e2e_nlg, test             +0.136 ± 0.104    +0.036 ± 0.077    +0.035 ± 0.046
    e2e_nlg, held-out         +0.097 ± 0.011    +0.067 ± 0.004    +0.031 ± 0.008

On dolly that is 5 to 9 % of what LoRA gains over the base. The projected form is hardly better than plain at ranks
4 and 8, and closes a sixth of the gap at rank 16 (dolly: 0.012 ± 0.003 below plain); orthonormal A, tried at rank 8,
does no better than either beyond the spread. LoRA-FA of twice the rank, which trains 1.04 times as many parameters as
LoRA, is 0.03 to 0.05 worse on dolly (projected 0.02 to 0.05), and not told apart from LoRA on e2e_nlg (within two
standard deviations). Plain LoRA-FA forgives a rate that is too high: with 0.03 at rank 8 its tuning loss is 0.05
(e2e_nlg) and 0.25 (dolly) above its best, LoRA's 0.44 and 0.83. Full fine-tuning is ahead of all (dolly's test 2.93,
LoRA of rank 16 3.11). All numbers are in results/lora_fa_quality/table.md, drawn in quality.png.

Limits: one small model, 120 steps of 1,024 tokens, test spread on e2e_nlg as large as the differences. Measured when a
completion was tokenized by itself; it now is with its prompt, which changes every row of these files by a token, for
all methods alike, and was not measured again.

Model: stories260K, a pretrained Llama of 260 thousand parameters with a vocabulary of 512. Data: e2e_nlg and dolly as
instruction rows, those of at most 256 tokens (1,419 of 2,500 and 1,463 of 2,685 to train and tune on, 224 of 630 and
162 of 296 to test), packed. Every tenth prompt of the training file, with all its rows, is held out and tunes the
learning rate. The test file of e2e_nlg is mostly about restaurants that the training file does not name (14 of its 18),
and losses there are far above those of the held-out prompts, for every method.

Learning rates come from one grid, 1, 2, 3 and 6 times powers of ten. For each data set and method the search starts at
0.01 and walks downhill in the tuning loss of seed 0, first two grid points at a time, then one, until both neighbours
of the best are worse, so no best rate is at an edge; a further rank starts at the best of the rank before. Seeds 0, 1,
2 at the best rate differ in the order of the data and in the adapter's start; methods see the same batches at the same
seed, so they are compared seed by seed. AdamW without weight decay, clipped at norm 1, 10 % warm-up, then linearly to
zero; float32; adapters on all linear maps, alpha = 2 rank, A uniform as in PEFT.
"""

import csv
import dataclasses
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxpeft as jp
from experiments.tuning import place, rate, search
from jaxpeft.data import Example, eval_batches, load_examples, make_batches
from jaxpeft.hf import load_tokenizer
from jaxpeft.train.optimizer import make_direction, make_schedule

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "experiments/results/lora_fa_quality"
CHECKPOINT = Path("checkpoints/stories260K")
DATASETS = ("e2e_nlg", "dolly")
PARTS = ("tune", "test")
METHODS: dict[str, Callable[[int], jp.Method]] = {
    "full": lambda rank: jp.full(),
    "lora": lambda rank: jp.lora(rank, alpha=2 * rank),
    "lora_fa": lambda rank: jp.lora_fa(rank, alpha=2 * rank),
    "lora_fa_projected": lambda rank: jp.lora_fa(rank, alpha=2 * rank, projected=True),
    "lora_fa_orthonormal": lambda rank: jp.lora_fa(rank, alpha=2 * rank, init="orthonormal"),
}
START = -8  # where on the grid the search begins: 0.01
TUNE_EVERY = 10  # one prompt in so many tunes the learning rate
EVAL_BATCH = 8
KEY = ("dataset", "method", "rank", "lr", "seed", "steps", "batch_size", "seq_len")  # what makes a run the same run

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Quality:
    """Compare full fine-tuning, LoRA and LoRA-FA on real data."""

    data_root: Path = Path(os.environ.get("JAXPEFT_DATA") or REPOSITORY.parent / "shared" / "data")
    """Folder with checkpoints/stories260K and instruct/."""
    out: Path | None = None
    """Folder of the results; runs that its runs.jsonl holds are not done again. By default beside this file, with
    --quick in out/."""
    methods: tuple[str, ...] = ("full", "lora", "lora_fa", "lora_fa_projected")
    """Methods to run, by name."""
    ranks: tuple[int, ...] = (8, 4, 16)
    """Ranks, in the order of running."""
    steps: int = 120
    """Optimizer steps of each run."""
    batch_size: int = 4
    """Packed rows in a batch."""
    seq_len: int = 256
    """Tokens in a row; longer examples are left out."""
    seeds: int = 3
    """Runs at the best learning rate."""
    quick: bool = False
    """Two steps, one rank, one seed, few examples."""


# Data.


def hold_out(examples: Sequence[Example], every: int) -> tuple[list[Example], list[Example]]:
    """(train, tune): every `every`-th distinct prompt goes to tune, with all its rows, so that no prompt is in both."""
    prompts: dict[bytes, int] = {}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        number = prompts.setdefault(example.ids[~example.completion].tobytes(), len(prompts))
        parts[number % every == every - 1].append(example)
    return parts


def read_data(name: str, args: Quality) -> dict[str, list[Example]]:
    """The examples for train, tune and test."""
    tokenizer = load_tokenizer(args.data_root / CHECKPOINT)
    found = {}
    for part in ("train", "test"):
        file = args.data_root / "instruct" / f"{name}.{part}.jsonl"
        found[part], report = load_examples(file, tokenizer, args.seq_len, too_long="drop")
        print(f"{name} {part}: {report.examples} examples, {report.dropped_too_long} too long", flush=True)
    train, tune = hold_out(found["train"], TUNE_EVERY)
    few = 8 if args.quick else None
    return {"train": train[:few], "tune": tune[:few], "test": found["test"][:few]}


# Runs.


def runner(
    method: jp.Method, base: jp.Model, params: Mapping[str, Any], args: Quality
) -> Callable[[float, int, Mapping[str, list[Example]]], Row]:
    """run(lr, seed, data) -> its losses. Everything is compiled once, the learning rate being an argument."""
    prepared = {}
    schedule = make_schedule("linear", 1.0, args.steps, warmup=args.steps // 10)

    def adapted(seed: int) -> tuple[jp.Model, Any, Any]:
        if seed not in prepared:
            prepared[seed] = jp.setup(method, base, params, jax.random.key(seed))
        return prepared[seed]

    model = adapted(0)[0]

    @jax.jit
    def train(lr, trainable, frozen, batches):
        optimizer = optax.chain(make_direction(), optax.scale_by_learning_rate(lambda count: lr * schedule(count)))
        step = jp.make_train_step(model, method, optimizer)
        state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(0))
        state, metrics = jax.lax.scan(step, state, batches)
        return state.trainable, metrics["loss"]

    @jax.jit
    def evaluate(trainable, frozen, batch):
        value, aux = jp.completion_loss(model, jp.combine(trainable, frozen), batch)
        return value * aux["weight"], aux["weight"]

    def mean_loss(trainable, frozen, examples):
        batches = eval_batches(examples, EVAL_BATCH, args.seq_len, pack=True)
        sums = [evaluate(trainable, frozen, batch) for batch, _ in batches]
        return float(sum(loss for loss, _ in sums) / sum(weight for _, weight in sums))

    def run(lr, seed, data):
        began = time.perf_counter()
        _, trainable, frozen = adapted(seed)
        count = sum(leaf.size for leaf in trainable.values())
        losses = np.zeros(0)
        if lr:
            endless = make_batches(data["train"], args.batch_size, args.seq_len, seed, pack=True)
            batches = [next(endless)[0] for _ in range(args.steps)]
            stacked = {name: jnp.asarray(np.stack([batch[name] for batch in batches])) for name in batches[0]}
            trainable, losses = train(jnp.float32(lr), trainable, frozen, stacked)
        return {
            "trainable": count,
            "train_loss": float(np.mean(losses[-10:])) if len(losses) else None,
            "tune_loss": mean_loss(trainable, frozen, data["tune"]),
            "test_loss": mean_loss(trainable, frozen, data["test"]),
            "seconds": round(time.perf_counter() - began, 1),
        }

    return run


def run_all(args: Quality, file: Path) -> list[Row]:
    """Does the runs that `file` (JSON lines) lacks and appends them to it; the rows of all runs of these settings."""
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {tuple(row[name] for name in KEY): row for row in known}
    base, params = jp.load_pretrained(args.data_root / CHECKPOINT, jnp.float32)
    data = {name: read_data(name, args) for name in DATASETS}
    plan = [("base", 0), *(("full", 0) for name in args.methods if name == "full")]
    plan += [(name, rank) for rank in args.ranks for name in args.methods if name != "full"]
    starts: dict[tuple[str, str], int] = {}  # of a data set and method: the best of the rank before

    def tune_and_repeat(name: str, rank: int) -> None:
        method = METHODS["full" if name == "base" else name](rank)
        compiled = functools.cache(lambda: runner(method, base, params, args))

        def row_of(dataset: str, lr: float, seed: int) -> Row:
            what = (dataset, name, rank, lr, seed, args.steps, args.batch_size, args.seq_len)
            if what not in done:
                row = dict(zip(KEY, what, strict=True)) | compiled()(lr, seed, data[dataset])
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print({k: row[k] for k in (*KEY[:5], "tune_loss", "test_loss", "seconds")}, flush=True)
                done[what] = row
            return done[what]

        for dataset in data:
            if name == "base":
                row_of(dataset, 0.0, 0)
                continue
            best = starts.get((dataset, name), START)
            strides = () if args.quick else (1,) if (dataset, name) in starts else (2, 1)

            def tuned(i: int, dataset: str = dataset) -> float:
                return row_of(dataset, rate(i), 0)["tune_loss"]

            for stride in strides:
                best = search(tuned, best, stride)
            starts[dataset, name] = best
            for seed in range(args.seeds):
                row_of(dataset, rate(best), seed)

    for name, rank in plan:
        tune_and_repeat(name, rank)
    settings = (args.steps, args.batch_size, args.seq_len)
    return [row for what, row in done.items() if what[-3:] == settings]


# Summary.


def summarise(rows: Iterable[Row]) -> list[Row]:
    """One row per data set, method and rank, in the order met.

    lr is the best by tuning loss of seed 0, `interior` says that both its neighbours on the grid were tried; for each
    part of PARTS `{part}_losses` is {seed: loss} at that lr, `{part}_mean` and `{part}_std` (n - 1) are over the seeds;
    `rates` is {lr: tuning loss of seed 0}.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["method"], row["rank"]), []).append(row)
    summary = []
    for (dataset, method, rank), group in groups.items():
        tried = {row["lr"]: row["tune_loss"] for row in group if row["seed"] == 0}
        finite = {lr: loss for lr, loss in sorted(tried.items()) if math.isfinite(loss)}
        best = min(finite, key=lambda lr: finite[lr])
        made = {"dataset": dataset, "method": method, "rank": rank, "lr": best, "rates": finite}
        made["trainable"] = 0 if method == "base" else group[0]["trainable"]
        made["interior"] = method != "base" and {rate(place(best) - 1), rate(place(best) + 1)} <= tried.keys()
        for part in PARTS:
            losses = {row["seed"]: row[f"{part}_loss"] for row in group if row["lr"] == best}
            made |= {f"{part}_{name}": value for name, value in spread(losses.values()).items()}
            made[f"{part}_losses"] = losses
        summary.append(made)
    return summary


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation (None for one value)."""
    values = list(values)
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def gaps(summary: Sequence[Row], rank_factor: int = 1) -> list[Row]:
    """LoRA-FA of rank `rank_factor` * r minus LoRA of rank r, seed by seed: mean and std; positive: LoRA-FA is worse.

    The share is of the gain of LoRA over the base; `parameters` is the quotient of trainable parameters.
    """
    found = {(row["dataset"], row["method"], row["rank"]): row for row in summary}
    result = []
    for (dataset, method, rank), row in found.items():
        lora, base = found.get((dataset, "lora", rank // rank_factor)), found.get((dataset, "base", 0))
        if not method.startswith("lora_fa") or rank % rank_factor or lora is None:
            continue
        made = {"dataset": dataset, "method": method, "rank": rank, "lora_rank": lora["rank"]}
        made["parameters"] = row["trainable"] / lora["trainable"]
        for part in PARTS:
            ours, theirs = row[f"{part}_losses"], lora[f"{part}_losses"]
            differences: dict[str, Any] = spread(
                ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())
            )
            made |= {f"{part}_{name}": value for name, value in differences.items()}
            gain = base[f"{part}_mean"] - lora[f"{part}_mean"] if base else math.nan
            made[f"{part}_share"] = differences["mean"] / gain
        result.append(made)
    return sorted(result, key=lambda row: (DATASETS.index(row["dataset"]), row["rank"]))


def write_tables(summary: Sequence[Row], out: Path) -> None:
    """table.md, table.csv and summary.json."""
    same_rank, same_parameters = gaps(summary), gaps(summary, 2)
    document = {"summary": summary, "gap_at_equal_rank": same_rank, "gap_at_equal_parameters": same_parameters}
    (out / "summary.json").write_text(json.dumps(document, indent=1) + "\n")
    columns = ["dataset", "method", "rank", "trainable", "lr", "interior"]
    columns += [f"{part}_{name}" for part in PARTS for name in ("mean", "std")]
    ordered = sorted(summary, key=lambda row: (DATASETS.index(row["dataset"]), row["rank"]))
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    lines = ["Loss in nats per completion token, mean ± standard deviation over seeds:", ""]
    lines += ["| data | method | rank | trainable | best lr | held-out prompts | test file |", "|---" * 7 + "|"]
    for row in ordered:
        lr = "" if not row["lr"] else f"{row['lr']:g}" + ("" if row["interior"] else " (edge)")
        cells = [row["dataset"], row["method"], row["rank"] or "", f"{row['trainable']:,}", lr]
        lines.append(line(cells + [plus_minus(row, part, "{:.4f}") for part in PARTS]))
    for title, rows in (("equal rank", same_rank), ("twice the rank, about equal parameters", same_parameters)):
        if not rows:
            continue
        lines += ["", f"LoRA-FA minus LoRA at {title} (positive: worse; share: of LoRA's gain over the base):", ""]
        lines += ["| data | method | rank | LoRA rank | parameters | held-out prompts | share | test file | share |"]
        lines += ["|---" * 9 + "|"]
        for row in rows:
            cells = [row["dataset"], row["method"], row["rank"], row["lora_rank"], f"x{row['parameters']:.2f}"]
            for part in PARTS:
                cells += [plus_minus(row, part, "{:+.4f}"), f"{row[f'{part}_share']:+.1%}"]
            lines.append(line(cells))
    (out / "table.md").write_text("\n".join(lines) + "\n")


def line(cells: Iterable[Any]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def plus_minus(row: Row, part: str, form: str) -> str:
    """Mean ± std of a part."""
    std = row[f"{part}_std"]
    return form.format(row[f"{part}_mean"]) + ("" if std is None else f" ± {std:.4f}")


def draw(summary: Sequence[Row], file: Path) -> None:
    """Per data set: loss against trainable parameters, for both parts; tuning loss against learning rate."""
    from matplotlib.figure import Figure

    colors = dict(zip(METHODS, ("black", "tab:blue", "tab:orange", "tab:red", "tab:green"), strict=True))
    datasets = [name for name in DATASETS if any(row["dataset"] == name for row in summary)]
    ranks = sorted({row["rank"] for row in summary if row["rank"]})
    shown = 8 if 8 in ranks else ranks[0]
    figure = Figure(figsize=(15, 4.2 * len(datasets)), dpi=100, layout="constrained")
    axes = figure.subplots(len(datasets), 3, squeeze=False)
    for panels, dataset in zip(axes, datasets, strict=True):
        for method, color in colors.items():
            here = [row for row in summary if (row["dataset"], row["method"]) == (dataset, method)]
            here.sort(key=lambda row: row["rank"])
            style = {"color": color, "label": method, "markersize": 4, "linewidth": 1.2}
            if not here:
                continue
            for axis, part in zip(panels, PARTS, strict=False):
                x, y = [row["trainable"] for row in here], [row[f"{part}_mean"] for row in here]
                axis.errorbar(x, y, [row[f"{part}_std"] or 0 for row in here], fmt="o-", capsize=3, **style)
                for row, at in zip(here, zip(x, y, strict=True), strict=True):
                    if method in ("lora", "lora_fa"):
                        note = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": color}
                        axis.annotate(f"r={row['rank']}", at, (13, 5) if method == "lora_fa" else (-13, -11), **note)
            for row in here:
                if row["rank"] in (0, shown):
                    panels[2].plot(*zip(*row["rates"].items(), strict=True), "o-", **style)
        loss = "loss (nats per token)"
        for axis, part in zip(panels, ("held-out prompts", "test file"), strict=False):
            axis.set(xscale="log", xlabel="trainable parameters", ylabel=loss, title=f"{dataset}: {part}")
            axis.set_xticks([10_000, 20_000, 50_000, 100_000, 200_000], ["10k", "20k", "50k", "100k", "200k"])
            axis.set_xticks([], minor=True)
        panels[2].set(
            xscale="log", xlabel="learning rate", ylabel=loss, title=f"{dataset}: tuning, rank {shown}, seed 0"
        )
        for axis in panels:
            axis.grid(alpha=0.3, which="both")
        panels[1].legend(fontsize=8)
    figure.savefig(file, format="png")


def main(args: Quality) -> None:
    """Runs, tables, picture."""
    if args.quick:
        args = dataclasses.replace(args, ranks=args.ranks[:1], steps=2, batch_size=2, seeds=1)
    out = args.out or (REPOSITORY / "out/lora_fa_quality" if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    summary = summarise(run_all(args, out / "runs.jsonl"))
    write_tables(summary, out)
    draw(summary, out / "quality.png")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Quality, description=__doc__))
