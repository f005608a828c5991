"""Does keeping activations in 8 or 4 bits change training?

    python -m experiments.memory.compressed_loss          # what runs.json lacks; about ten minutes on two CPU cores
    python -m experiments.memory.compressed_loss --quick  # is the script sound?
    python -m experiments.memory.compressed_loss --draw   # the table from runs.json

Training losses do not, beyond the spread over seeds. Validation, minus that of `matmuls` seed by seed, nats, mean ±
standard deviation over three seeds, beside the deviation of `matmuls` over the same seeds:

    stories260K, compressed     -0.008 ± 0.083      0.084
    stories260K, compressed4    +0.085 ± 0.089      0.084
    embedded, compressed4       +0.003 ± 0.011      0.128

In 4 bits the small model's validation is worse by as much as seeds differ, which three seeds cannot tell from nothing.

Models: stories260K, a pretrained Llama of 260 thousand parameters, 150 steps of 8 x 256 tokens at 0.01; and the
embedded one of 4 million, 40 steps of 2 x 256 at 0.005. Data: e2e_nlg as instruction rows of at most 256, packed;
validation on the first 64 (embedded: 16) packed rows of its test file, which is mostly about restaurants that the
training file does not name. LoRA of rank 8 on all linear maps, alpha 16, AdamW, 10 % warm-up, then linearly to zero,
float32, on a CPU. A seed draws the order of the data, the adapter's start, and the rounding; plans see the same batches
at the same seed. Results are in results/compressed_loss/table.md, all losses in runs.json.
"""

import dataclasses
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxpeft as jp
from jaxpeft import assets
from jaxpeft.backward import residuals
from jaxpeft.data import eval_batches, load_examples, make_batches
from jaxpeft.hf import load_tokenizer
from jaxpeft.method import view_of
from jaxpeft.train.optimizer import make_direction, make_schedule

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = REPOSITORY / "experiments/results/compressed_loss"
PLANS = ("matmuls", "compressed", "compressed4")
SEQ_LEN = 256
Runs = dict[str, dict[str, list[dict]]]  # model -> plan -> of each seed {"train": the losses, "validation": one}


class Task(NamedTuple):
    """A model's training: steps of rows, the highest rate, packed rows of validation, plans."""

    steps: int
    rows: int
    rate: float
    held_out: int
    plans: tuple[str, ...] = PLANS


TASKS = {"stories260K": Task(150, 8, 0.01, 64), "embedded": Task(40, 2, 0.005, 16, ("matmuls", "compressed4"))}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare training under plans that round what is kept with `matmuls`."""

    data_root: Path = Path(os.environ.get("JAXPEFT_DATA") or REPOSITORY.parent / "shared" / "data")
    """Folder with checkpoints/stories260K and instruct/."""
    seeds: int = 3
    """Runs of each plan."""
    quick: bool = False
    """Two steps, two seeds; into out/."""
    draw: bool = False
    """The table from runs.json alone."""


def run_all(args: Settings, out: Path, tasks: dict[str, Task]) -> Runs:
    """Runs what runs.json lacks, and writes it after each run."""
    file = out / "runs.json"
    found: Runs = json.loads(file.read_text()) if file.exists() else {}
    for name, task in tasks.items():
        own = found.setdefault(name, {plan: [] for plan in task.plans})
        missing = {plan: range(len(own[plan]), args.seeds) for plan in task.plans}
        if not any(missing.values()):
            continue
        checkpoint = args.data_root / "checkpoints/stories260K" if name == "stories260K" else assets.MODEL
        base, params = jp.load_pretrained(checkpoint, jnp.float32)
        tokenizer = load_tokenizer(checkpoint)
        examples = {}
        for part in ("train", "test"):
            path = args.data_root / f"instruct/e2e_nlg.{part}.jsonl"
            examples[part], _ = load_examples(path, tokenizer, SEQ_LEN, too_long="drop")
        method = jp.lora(8, alpha=16)
        schedule = make_schedule("linear", task.rate, task.steps, warmup=task.steps // 10)
        optimizer = optax.chain(make_direction(), optax.scale_by_learning_rate(schedule))
        rows = eval_batches(examples["test"], 8, SEQ_LEN, pack=True)
        held_out = [batch for batch, _ in itertools.islice(rows, max(task.held_out // 8, 1))]
        for plan, seeds in missing.items():
            model = residuals.remat(method.forward(base, view_of(base, method, {})), plan)

            @jax.jit
            def train(state, batches, model=model, method=method, optimizer=optimizer):
                state, metrics = jax.lax.scan(jp.make_train_step(model, method, optimizer), state, batches)
                return state, metrics["loss"]

            @jax.jit
            def evaluate(params, batch, model=model):
                value, aux = jp.completion_loss(model, params, batch)
                return value * aux["weight"], aux["weight"]

            for seed in seeds:
                _, trainable, frozen = jp.setup(method, base, params, jax.random.key(seed))
                endless = make_batches(examples["train"], task.rows, SEQ_LEN, seed, pack=True)
                batches = [batch for batch, _ in itertools.islice(endless, task.steps)]
                stacked = {name: jnp.asarray(np.stack([batch[name] for batch in batches])) for name in batches[0]}
                state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(100 + seed))
                state, losses = train(state, stacked)
                sums = np.sum([evaluate(state.params, batch) for batch in held_out], axis=0)
                trained = [round(float(loss), 6) for loss in losses]
                row: dict[str, Any] = {"train": trained, "validation": float(sums[0] / sums[1])}
                own[plan].append(row)
                file.write_text(json.dumps(found, indent=1) + "\n")
                print(name, plan, seed, row["train"][-1], row["validation"], flush=True)
    return found


def curve(row: dict) -> np.ndarray:
    """Means over 10 steps of a run's losses."""
    return np.convolve(row["train"], np.ones(10) / 10, "valid" if len(row["train"]) >= 10 else "same")


def table(found: Runs) -> str:
    """Validation losses, and how far the plans' curves are apart beside how far seeds are.

    Curves are means over 10 steps; their difference is the largest between the plans at one seed, their spread the
    standard deviation over the seeds of `matmuls`, the mean over the curve.
    """
    lines = ["Nats per completion token; mean ± standard deviation over seeds. Curves are means over 10 steps.", ""]
    lines += [
        "| model, plan | validation | minus `matmuls`, seed by seed | curves: largest difference | spread over seeds |"
    ]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, plans in found.items():
        exact = plans["matmuls"]
        curves = np.array([curve(row) for row in exact])
        for plan, rows in plans.items():
            values = [row["validation"] for row in rows]
            cells = [f"{name}, `{plan}`", f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"]
            if plan == "matmuls":
                cells += ["", "", f"{curves.std(axis=0, ddof=1).mean():.4f}"]
            else:
                apart = [ours["validation"] - theirs["validation"] for ours, theirs in zip(rows, exact, strict=True)]
                largest = np.abs(np.array([curve(row) for row in rows]) - curves).max()
                cells += [f"{statistics.fmean(apart):+.4f} ± {statistics.stdev(apart):.4f}", f"{largest:.4f}", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: Settings) -> None:
    """Runs and writes runs.json and table.md."""
    tasks, out = TASKS, RESULTS
    if args.quick:
        args, out = dataclasses.replace(args, seeds=2), REPOSITORY / "out/compressed_loss"
        tasks = {name: task._replace(steps=2, held_out=8) for name, task in TASKS.items()}
    out.mkdir(parents=True, exist_ok=True)
    found = json.loads((out / "runs.json").read_text()) if args.draw else run_all(args, out, tasks)
    (out / "table.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
