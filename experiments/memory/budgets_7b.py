"""Given a budget, what plan does the search choose, and what does it cost?

    python -m experiments.memory.budgets_7b           # compiles what the data lacks; all of it in a few minutes
    python -m experiments.memory.budgets_7b --draw    # table from the data

The train step of LoRA, rank 64 on all linear maps, Llama-2-7B, batch 16 x 1024, bfloat16 base, float32 adapters and
Adam's state, for budgets of arguments and temporaries together; activations are saved or recomputed, none is compressed
or offloaded. Data in results/memory/budgets_7b.json, the plans in budgets_7b.md.

- h200: 7 of 7 budgets are reached and every plan fits; 90% or more is used where more would help; extra FLOPs fall
  with the budget, from 37.4% at 22 GiB to 0.0% at 70 GiB.
"""

from __future__ import annotations

import itertools

import jaxpeft as jp
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, search, targets
from jaxpeft.models import geometries

NAME = "budgets_7b"
TITLE = "llama2-7b, train step of LoRA, rank 64 on all linear maps, batch 16 x 1024, bfloat16"
BUDGETS = (70, 60, 50, 40, 30, 24, 22)  # GiB


def measure(key: common.Row) -> common.Row:
    """The plan that the search chooses, as it was compiled, or what the search says where nothing fits."""
    config = geometries.load(key["geometry"])

    def make(plan):
        method = jp.lora(rank=key["rank"])
        return planner.make_step(config, method, key["batch_size"], key["seq_len"], plan, key["dtype"], packed=False)

    device, actions = targets.target(key["target"]), key["actions"].split(",")
    compiles: list[str] = []
    try:
        _, made = search.fit(make, device, key["budget_gib"] * GIB, actions, compiles.append)
    except InputError as error:
        return {"refused": str(error), "compiles": len(compiles)}
    names = ("save", "bytes", "host_bytes", "fits", "flops", "recompute_flops")
    return {name: made[name] for name in names} | {"compiles": len(compiles)}


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """One figure per target and budget."""
    fixed = {"geometry": "llama2-7b", "method": "lora", "rank": 64, "batch_size": 16, "seq_len": 1024}
    fixed |= {"dtype": "bfloat16", "actions": "save"}
    return [figures(**fixed, target=name, budget_gib=budget) for name in names for budget in BUDGETS]


def share(row: common.Row) -> float:
    """FLOPs that are computed again, over those that are computed once."""
    return row["recompute_flops"] / (row["flops"] - row["recompute_flops"])


def table(rows: list[common.Row]) -> str:
    """Budget, what the plan takes of it, what it computes again, and the plan."""
    body = []
    for row in rows:
        head = [f"{row['target']}, {row['budget_gib']} GiB"]
        if "refused" in row:
            body.append([*head, None, None, None, None, row["refused"]])
            continue
        total = row["bytes"]["total"] / GIB
        used = total / row["budget_gib"]
        body.append([*head, total, f"{used:.0%}", f"{share(row):.1%}", str(row["compiles"]), f"`{row['save']}`"])
    return common.table(["target, budget", "total, GiB", "used", "extra FLOPs", "compiles", "plan"], body)


def verdicts(rows: list[common.Row]) -> list[str]:
    """What was asked of the search, per target."""
    said = []
    for name in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == name]
        found = [row for row in own if "refused" not in row]
        fits = all(row["fits"] and row["bytes"]["total"] <= row["budget_gib"] * GIB for row in found)
        extra = [row["recompute_flops"] for row in found]
        falls = all(a <= b for a, b in itertools.pairwise(extra))
        most = max(row["bytes"]["total"] for row in found)
        # Nothing more can be kept than what the largest plan keeps.
        used = [row["bytes"]["total"] / (row["budget_gib"] * GIB) for row in found]
        useful = [x for x, row in zip(used, found, strict=True) if row["bytes"]["total"] < most]
        # Largest budgets come first.
        first, last = (f"{share(row):.1%} at {row['budget_gib']} GiB" for row in (found[0], found[-1]))
        said.append(
            f"{name}: {len(found)} of {len(own)} budgets are reached and {'every' if fits else 'NOT every'} plan fits; "
            f"{min(useful):.0%} or more is used where more would help; extra FLOPs {'' if falls else 'DO NOT '}fall "
            f"with the budget, from {last} to {first}."
        )
    return said


def document(rows: list[common.Row]) -> str:
    """The verdicts and the plans."""
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    head = f"# The plan that fits a budget\n\n{TITLE}; JAX {jax}.\n"
    return "\n".join([head, common.bullets(verdicts(rows)), table(rows)])


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document)
