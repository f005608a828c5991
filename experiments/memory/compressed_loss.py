"""Does keeping activations in 8 bits change training?

    python -m experiments.memory.compressed_loss          # a few minutes on two CPU cores
    python -m experiments.memory.compressed_loss --quick  # is the script sound?

Not beyond the spread over seeds. Nats per completion token, mean ± standard deviation over three seeds:

    validation, matmuls                       2.394 ± 0.035
    validation, compressed                    2.422 ± 0.059
    compressed minus matmuls, seed by seed   +0.028 ± 0.041
    training loss, largest difference         0.025           (of means over 10 steps, at one seed)
    its deviation over seeds                  0.041           (under matmuls, the mean over the curve)

Limits: three seeds would not show a difference in validation loss below about 0.05. The test file is mostly about
restaurants that the training file does not name, which is why seeds differ more there than in training. Measured when a
completion was tokenized by itself; it now is with its prompt, a token's difference in every row, and was not measured
again.

Model: stories260K, a pretrained Llama of 260 thousand parameters. Data: e2e_nlg as instruction rows of at most 256
tokens, packed; validation on the first 64 packed rows of its test file. LoRA of rank 8 on all linear maps, alpha 16,
AdamW at 0.01, 10 % warm-up, then linearly to zero, 150 steps of 8 x 256 tokens, float32, on a CPU. A seed draws the
order of the data, the adapter's start, and the rounding; plans see the same batches at the same seed. Results are in
results/compressed_loss/table.md, all losses in runs.json.
"""

import dataclasses
import itertools
import json
import os
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxpeft as jp
from jaxpeft.backward import residuals
from jaxpeft.data import eval_batches, load_examples, make_batches
from jaxpeft.hf import load_tokenizer
from jaxpeft.method import view_of
from jaxpeft.train.optimizer import make_direction, make_schedule

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PLANS = ("matmuls", "compressed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare training under `matmuls` and `compressed`."""

    data_root: Path = Path(os.environ.get("JAXPEFT_DATA") or REPOSITORY.parent / "shared" / "data")
    """Folder with checkpoints/stories260K and instruct/."""
    out: Path | None = None
    """Folder of the results. By default beside the experiments, with --quick in out/."""
    steps: int = 150
    """Optimizer steps of each run."""
    batch_size: int = 8
    """Packed rows in a batch."""
    seq_len: int = 256
    """Tokens in a row; longer examples are left out."""
    lr: float = 0.01
    """The highest learning rate."""
    seeds: int = 3
    """Runs of each plan."""
    quick: bool = False
    """Two steps, two seeds."""


def run_all(args: Settings) -> dict[str, list[dict]]:
    """plan -> per seed {"train": the loss of each step, "validation": the loss at the end}."""
    checkpoint = args.data_root / "checkpoints/stories260K"
    base, params = jp.load_pretrained(checkpoint, jnp.float32)
    tokenizer = load_tokenizer(checkpoint)
    examples = {}
    for part in ("train", "test"):
        file = args.data_root / f"instruct/e2e_nlg.{part}.jsonl"
        examples[part], _ = load_examples(file, tokenizer, args.seq_len, too_long="drop")
    method = jp.lora(8, alpha=16)
    optimizer = optax.chain(
        make_direction(),
        optax.scale_by_learning_rate(make_schedule("linear", args.lr, args.steps, warmup=args.steps // 10)),
    )
    held_out = [batch for batch, _ in eval_batches(examples["test"], 8, args.seq_len, pack=True)][:8]
    found: dict[str, list[dict]] = {}
    for plan in PLANS:
        model = residuals.remat(method.forward(base, view_of(base, method, {})), plan)

        @jax.jit
        def train(state, batches, model=model):
            state, metrics = jax.lax.scan(jp.make_train_step(model, method, optimizer), state, batches)
            return state, metrics["loss"]

        @jax.jit
        def evaluate(params, batch, model=model):
            value, aux = jp.completion_loss(model, params, batch)
            return value * aux["weight"], aux["weight"]

        for seed in range(args.seeds):
            _, trainable, frozen = jp.setup(method, base, params, jax.random.key(seed))
            endless = make_batches(examples["train"], args.batch_size, args.seq_len, seed, pack=True)
            batches = [batch for batch, _ in itertools.islice(endless, args.steps)]
            stacked = {name: jnp.asarray(np.stack([batch[name] for batch in batches])) for name in batches[0]}
            state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(100 + seed))
            state, losses = train(state, stacked)
            sums = np.sum([evaluate(state.params, batch) for batch in held_out], axis=0)
            row = {"train": [round(float(loss), 6) for loss in losses], "validation": float(sums[0] / sums[1])}
            found.setdefault(plan, []).append(row)
            print(plan, seed, row["train"][-1], row["validation"], flush=True)
    return found


def summarise(found: dict[str, list[dict]]) -> dict[str, float]:
    """Validation losses, and how far the plans' curves are apart beside how far seeds are.

    Curves are means over 10 steps; `difference` is the largest between the plans at one seed, `spread` the standard
    deviation over the seeds of `matmuls`, the mean over the curve.
    """
    curves = {
        plan: np.array(
            [
                np.convolve(row["train"], np.ones(10) / 10, "valid" if len(row["train"]) >= 10 else "same")
                for row in rows
            ]
        )
        for plan, rows in found.items()
    }
    summary = {}
    for plan, rows in found.items():
        values = [row["validation"] for row in rows]
        summary |= {f"{plan}_mean": statistics.fmean(values), f"{plan}_std": statistics.stdev(values)}
    pairs = zip(found["matmuls"], found["compressed"], strict=True)
    apart = [theirs["validation"] - ours["validation"] for ours, theirs in pairs]
    summary |= {
        "validation_difference_mean": statistics.fmean(apart),
        "validation_difference_std": statistics.stdev(apart),
    }
    summary["curve_difference"] = float(np.abs(curves["compressed"] - curves["matmuls"]).max())
    summary["curve_spread"] = float(curves["matmuls"].std(axis=0, ddof=1).mean())
    return summary


def main(args: Settings) -> None:
    """Runs and writes runs.json and table.md."""
    if args.quick:
        args = dataclasses.replace(args, steps=2, seeds=2)
    default = REPOSITORY / ("out/compressed_loss" if args.quick else "experiments/results/compressed_loss")
    out = args.out or default
    out.mkdir(parents=True, exist_ok=True)
    found = run_all(args)
    summary = summarise(found)
    (out / "runs.json").write_text(json.dumps({"summary": summary, "runs": found}, indent=1) + "\n")
    lines = ["Nats per completion token; mean ± standard deviation over seeds:", "", "| | |", "|---|---|"]
    for plan in PLANS:
        lines.append(f"| validation, {plan} | {summary[f'{plan}_mean']:.4f} ± {summary[f'{plan}_std']:.4f} |")
    mean, std = summary["validation_difference_mean"], summary["validation_difference_std"]
    lines.append(f"| compressed minus matmuls, seed by seed | {mean:+.4f} ± {std:.4f} |")
    lines.append(f"| training loss (means over 10 steps): largest difference | {summary['curve_difference']:.4f} |")
    lines.append(f"| its standard deviation over seeds | {summary['curve_spread']:.4f} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
