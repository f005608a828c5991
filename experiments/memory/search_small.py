"""Does the search of `jaxpeft plan --budget` find the best plan? Every table of a small model, compiled.

    python -m experiments.memory.search_small          # about ten minutes on two CPU cores
    python -m experiments.memory.search_small --draw   # the table again, from the committed data

RESULT

A Llama of 2 layers (hidden 256, MLP 688, 4 heads), LoRA of rank 8, batch 8 x 256, float32, the train step compiled for
this CPU by JAX 0.10.2 (without most optimisations, for the sake of time): all 256 tables that save or recompute its
eight names. "Extra" is what the chosen plan computes beyond the cheapest table that fits the budget, as a share of the
step's FLOPs. Data and table are in results/memory/search_small.json and .md.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from experiments.memory import common
from jaxpeft.memory import planner, targets
from jaxpeft.memory.plan import Plan

NAME = "search_small"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NAMES = ("q_proj", "k_proj", "v_proj", "attention", "o_proj", "gate_proj", "up_proj", "lora_low")
TARGET = targets.target("cpu")
PARTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def make(plan: Plan) -> planner.Step:
    return planner.make_step(CONFIG, jp.lora(rank=8), 8, 256, plan, jnp.float32)


def tables() -> list[Plan]:
    """Every way to save some of the names and recompute the others."""
    found = []
    for chosen in itertools.product((False, True), repeat=len(NAMES)):
        saved = [name for name, use in zip(NAMES, chosen, strict=True) if use]
        saved += ["attention_lse"] if "attention" in saved else []
        found.append(Plan("blocks", tuple((name, "save") for name in saved)))
    return found


def collect() -> dict[str, Any]:
    jax.config.update("jax_disable_most_optimizations", True)  # the search sees the same compiler, a faster one
    rows = []
    for plan in tables():
        made = planner.row(make(plan), TARGET)
        rows.append({"save": str(plan), "total": made["bytes"]["total"], "recompute_flops": made["recompute_flops"]})
        print(len(rows), rows[-1], file=sys.stderr, flush=True)
    low, high = rows[0]["total"], rows[-1]["total"]  # nothing kept but the layers' inputs; everything named
    budgets = [int(low + part * (high - low)) for part in PARTS]
    return {"jax": jax.__version__, "tables": rows, "budgets": [found(budget) for budget in budgets]}


def found(budget: int) -> dict[str, Any]:
    """What the search chooses; a budget below the smallest table is one that nothing fits."""
    compiles: list[str] = []
    step, made = planner.fit(make, TARGET, budget, report=compiles.append)
    return {
        "budget": budget,
        "save": str(step.plan),
        "total": made["bytes"]["total"],
        "flops": made["flops"],
        "recompute_flops": made["recompute_flops"],
        "compiles": len(compiles),
    }


def summarise(data: dict[str, Any]) -> str:
    body = []
    for row in data["budgets"]:
        best = min(table["recompute_flops"] for table in data["tables"] if table["total"] <= row["budget"])
        again, least, extra = (x / row["flops"] for x in (row["recompute_flops"], best, row["recompute_flops"] - best))
        sizes = f"{row['budget'] / 2**20:.1f}", f"{row['total'] / 2**20:.1f}", f"{row['total'] / row['budget']:.0%}"
        body.append((*sizes, f"{again:.1%}", f"{least:.1%}", f"{extra:.1%}", row["compiles"]))
    return common.table(("budget MiB", "chosen MiB", "used", "recomputed", "by the best", "extra", "compiles"), body)


def main() -> None:
    import json

    path = common.RESULTS / f"{NAME}.json"
    if "--draw" not in sys.argv:
        path.write_text(json.dumps(collect(), indent=1) + "\n")
    text = summarise(json.loads(path.read_text()))
    (common.RESULTS / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
