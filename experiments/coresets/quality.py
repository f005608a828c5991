"""Does a coreset of a batch teach more than a random half of it?

    python -m experiments.coresets.quality          # a few minutes on two CPU cores
    python -m experiments.coresets.quality --quick  # is the script sound?

Perhaps. Validation, nats per completion token, mean over the sources: random half 3.185 ± 0.107, coreset 2.978 ± 0.113,
all rows 3.006 ± 0.049; seed by seed the coreset is 0.207 ± 0.207 below the random half. It is better on e2e_nlg (0.38)
and instruction_induction (0.34) and worse on dolly (0.10): as it keeps all rows of small sources, it trains on another
mixture. Limits: 25 steps, three seeds, and a model that has not learnt to answer by then.

Model: stories260K, a pretrained Llama of 260 thousand parameters. Data: a mixture of three sources, e2e_nlg and dolly
(large) and instruction_induction (small), rows of at most 192 tokens, one example each. LoRA of rank 8 on all linear
maps, AdamW at 0.01, 10 % warm-up, then linearly to zero, 25 batches of 16 rows, float32, on a CPU. Of each batch
train: all rows; the first 8, as batches are shuffled a random half; the 8 of `colm`. Validation on 16 rows of each
source. A seed draws the order of the data and the adapter's start; all see the same batches at the same seed. Results
are in results/coresets/quality.md, all losses in quality.json.
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
from jaxpeft.data import eval_batches, load_examples, make_batches
from jaxpeft.hf import load_tokenizer
from jaxpeft.train.optimizer import make_direction, make_schedule

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SOURCES = ("e2e_nlg", "dolly", "instruction_induction")
SMALL = "instruction_induction"
ROWS = 16  # of a batch
ARMS = {
    "8 random rows": (jp.lora(8, alpha=16), ROWS // 2),
    "colm, 8 of 16": (jp.chain(jp.lora(8, alpha=16), jp.colm(0.5)), ROWS),
    "all 16 rows": (jp.lora(8, alpha=16), ROWS),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare training on a coreset with training on a random half and on all rows."""

    data_root: Path = Path(os.environ.get("JAXPEFT_DATA") or REPOSITORY.parent / "shared" / "data")
    """Folder with checkpoints/stories260K and instruct/."""
    out: Path | None = None
    """Folder of the results. By default beside the experiments, with --quick in out/."""
    steps: int = 25
    """Optimizer steps of each run."""
    seq_len: int = 192
    """Tokens in a row; longer examples are left out."""
    lr: float = 0.01
    """The highest learning rate."""
    seeds: int = 3
    """Runs of each arm."""
    quick: bool = False
    """Two steps, two seeds."""


def mixture(args: Settings, tokenizer) -> tuple[list, dict[str, list]]:
    """(training examples, validation batches by source); 400 examples of the small source."""
    examples, held_out = [], {}
    for number, name in enumerate(SOURCES, start=1):
        read = lambda part, name=name: load_examples(
            args.data_root / f"instruct/{name}.{part}.jsonl", tokenizer, args.seq_len, too_long="drop", cache=False
        )[0]
        own = list(read("train"))[: 400 if name == SMALL else None]
        examples += [example._replace(source=number) for example in own]
        batches = eval_batches(list(read("test"))[:16], 16, args.seq_len)
        held_out[name] = [batch for batch, _ in batches]
    return examples, held_out


def run_all(args: Settings) -> dict[str, list[dict]]:
    """arm -> per seed the validation losses by source, and their mean."""
    checkpoint = args.data_root / "checkpoints/stories260K"
    base, params = jp.load_pretrained(checkpoint, jnp.float32)
    examples, held_out = mixture(args, load_tokenizer(checkpoint))
    schedule = make_schedule("linear", args.lr, args.steps, warmup=args.steps // 10)
    optimizer = optax.chain(make_direction(), optax.scale_by_learning_rate(schedule))
    found: dict[str, list[dict]] = {}
    for arm, (method, rows) in ARMS.items():
        model = jp.setup(method, base, params, jax.random.key(0))[0]

        @jax.jit
        def train(state, batches, model=model, method=method):
            return jax.lax.scan(jp.make_train_step(model, method, optimizer), state, batches)

        @jax.jit
        def evaluate(params, batch, model=model):
            value, aux = jp.completion_loss(model, params, batch)
            return value * aux["weight"], aux["weight"]

        for seed in range(args.seeds):
            _, trainable, frozen = jp.setup(method, base, params, jax.random.key(seed))
            batches = [
                batch for batch, _ in itertools.islice(make_batches(examples, ROWS, args.seq_len, seed), args.steps)
            ]
            stacked = {name: jnp.asarray(np.stack([batch[name][:rows] for batch in batches])) for name in batches[0]}
            state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(100 + seed), model)
            state, _ = train(state, stacked)
            losses = {}
            for name, parts in held_out.items():
                sums = np.sum([evaluate(state.params, batch) for batch in parts], axis=0)
                losses[name] = round(float(sums[0] / sums[1]), 4)
            losses["mean"] = round(statistics.fmean(losses.values()), 4)
            found.setdefault(arm, []).append(losses)
            print(arm, seed, losses, flush=True)
    return found


def table(found: dict[str, list[dict]]) -> str:
    """Mean ± standard deviation over seeds, and the mean's difference from the random half, seed by seed."""
    names = (*SOURCES, "mean")
    lines = [f"| | {' | '.join(names)} | minus random, seed by seed |", "|---|" + "---:|" * (len(names) + 1)]
    for arm, rows in found.items():
        spread = lambda values: f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
        apart = [row["mean"] - other["mean"] for row, other in zip(rows, found["8 random rows"], strict=True)]
        cells = [spread([row[name] for row in rows]) for name in names]
        lines.append(
            f"| {arm} | {' | '.join(cells)} | {statistics.fmean(apart):+.3f} ± {statistics.stdev(apart):.3f} |"
        )
    return "Nats per completion token; mean ± standard deviation over seeds.\n\n" + "\n".join(lines) + "\n"


def main(args: Settings) -> None:
    """Runs and writes quality.json and quality.md."""
    if args.quick:
        args = dataclasses.replace(args, steps=2, seeds=2)
    out = args.out or REPOSITORY / ("out/coresets" if args.quick else "experiments/results/coresets")
    out.mkdir(parents=True, exist_ok=True)
    found = run_all(args)
    (out / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "quality.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
