"""LoRAM: does LoRA that was trained beside a pruned base do on the whole one what LoRA of the whole base does?

    JAXPEFT_DATA=... python -m experiments.compare.pruned_base            # what the data lacks; minutes of one core
    JAXPEFT_DATA=... python -m experiments.compare.pruned_base --draw     # the table from the data

stories260K on E2E NLG as in `experiments.compare.quality`: 120 steps of 4 x 256 tokens, three seeds, the rate by the
held-out rows of seed 0 on the whole base. The base is pruned by `jaxpeft prune --by taylor` of eight batches of the
training rows; there is no alignment, the paper's further pretraining of what is left, for which this model's corpus is
not at hand. Losses are nats a token of the test rows: of the pruned base with what was trained on it ("pruned"), and
of the whole base with the recovered adapter ("recovered"); `lora` rows are those of results/compare/quality.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from experiments.compare import quality
from experiments.memory import common
from jaxpeft import hf, pruning, tree
from jaxpeft.models import decoder
from jaxpeft.train.compiled import Compiled

FOLDER = Path(__file__).resolve().parent.parent / "results/compare"
NAME, TASK, METHOD = "pruned_base", "e2e_nlg", "lora"
KEEPS = (0.75, 0.5)
SEEDS = quality.DATA[TASK].seeds
RATES = (0.003, 0.006, 0.01, 0.02)


class Runner(quality.Runner):
    """One share that stays, compiled once; the eval step of the whole base beside that of the pruned one."""

    def __init__(self, keep: float):
        self.rows, self.protocol = quality.rows_of(TASK), quality.DATA[TASK]
        self.layout: dict[str, Any] = {"pack": True}
        folder = quality.shared() / "checkpoints/stories260K"
        self.whole, self.params = jp.load_pretrained(folder, "float32")
        scores = pruning.importance(self.whole, self.params, "taylor", self.batches(0, 8))
        self.kept = pruning.choose(scores, keep, keep)
        counts = [at.shape[1] for at in self.kept]
        fields = {**hf.load_config(str(folder)), **pruning.smaller(self.whole.config, *counts)}
        self.small = decoder.from_hf(fields)
        self.left = jax.tree.map(jnp.asarray, pruning.pruned(self.params, self.whole.config, self.kept))
        super().__init__(TASK, METHOD)
        self.on_whole = jp.setup(self.method, self.whole, self.params, jax.random.key(0))
        self.whole_step = Compiled(self.task.eval_step(self.on_whole[0]))

    def setup(self, seed: int) -> Any:
        return jp.setup(self.method, self.small, self.left, jax.random.key(100 + seed))

    def both(self, lr: float, seed: int) -> common.Row:
        """A run: losses of the pruned base and, with what it learned, of the whole one."""
        began = time.process_time()
        _, trainable, frozen = self.setup(seed)
        state = self.train(lr, seed, trainable, frozen, self.steps)
        pruned = {name: self.scores(state, rows)["loss"] for name, rows in self.parts.items()}
        leaves = jax.tree.map(jnp.asarray, pruning.recovered(state.trainable, self.whole.config, self.kept))
        model, _, rest = self.on_whole
        whole = jp.init_state(self.method, self.direction, leaves, rest, jax.random.key(0), model=model)
        own, self.eval_step = self.eval_step, self.whole_step
        recovered = {name: self.scores(whole, rows)["loss"] for name, rows in self.parts.items()}
        self.eval_step = own
        found = {f"{name}_loss_pruned": x for name, x in pruned.items()}
        found |= {f"{name}_loss": x for name, x in recovered.items()}
        sizes = {"trained": tree.size(trainable), "base": tree.size(frozen)}
        return {**found, **sizes, "cpu_seconds": round(time.process_time() - began, 1)}

    @property
    def parts(self) -> dict[str, list[Any]]:
        return {"tune": self.rows.tune, "test": self.rows.test}


def collect(figures: common.Figures) -> None:
    """The rates of seed 0, then the other seeds at the best of them."""
    for keep in KEEPS:
        tried = {lr: figures(keep=keep, lr=lr, seed=0)["tune_loss"] for lr in RATES}
        for seed in SEEDS[1:]:
            figures(keep=keep, lr=min(tried, key=lambda lr: tried[lr]), seed=seed)


def at_best(rows: Iterable[common.Row], keep: float) -> list[common.Row]:
    """The runs of a share at the best rate of seed 0, one per seed; [] where not every seed has run."""
    own = [row for row in rows if row["keep"] == keep]
    tried = [row for row in own if row["seed"] == 0 and math.isfinite(row["tune_loss"])]
    lr = min(tried, key=lambda row: row["tune_loss"])["lr"] if tried else None
    runs = {row["seed"]: row for row in own if row["lr"] == lr}
    return [runs[seed] for seed in SEEDS] if set(SEEDS) <= runs.keys() else []


def table(rows: Iterable[common.Row], of_whole: Iterable[common.Row]) -> str:
    """Mean over the seeds and half of what lies between the least and the largest."""
    rows = list(rows)
    lines = ["| base | trained on | numbers of the base | lr | pruned | recovered |", "|---|---|---|---|---|---|"]
    spread = lambda found: f"{statistics.mean(found):.3f} ± {(max(found) - min(found)) / 2:.3f}"
    if runs := quality.at_best(of_whole, TASK, METHOD):
        lines.append(f"| whole | whole | | {runs[0]['lr']:g} | | {spread([run['loss'] for run in runs])} |")
    for keep in KEEPS:
        if runs := at_best(rows, keep):
            own, whole = ([run[name] for run in runs] for name in ("test_loss_pruned", "test_loss"))
            first = runs[0]
            lines.append(
                f"| whole | {keep:.0%} of heads and neurons | {first['base']:,} | {first['lr']:g} | {spread(own)} | "
                f"{spread(whole)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="the table from the data alone")
    if not parser.parse_args().draw:
        runners: dict[float, Runner] = {}

        def measure(key: common.Row) -> common.Row:
            keep = key["keep"]
            if keep not in runners:
                runners[keep] = Runner(keep)
            return runners[keep].both(key["lr"], key["seed"])

        collect(common.Figures(NAME, measure, FOLDER))
    found = table(common.load(NAME, FOLDER), common.load("quality", FOLDER))
    about = (
        "stories260K on E2E NLG, LoRA for 120 steps, nats a token of the test rows: mean of three seeds ± half of the"
    )
    text = f"# LoRA trained beside a pruned base\n\n{about} range.\n\n{found}\n"
    (FOLDER / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
