"""Does a step on a coreset need the memory of its rows alone?

    python -m experiments.coresets.memory           # compiles what the data lacks: some five minutes
    python -m experiments.coresets.memory --draw    # the table from the data

Train steps of LoRA on Llama-2-7B, rows of 512 tokens, bfloat16, compiled for the target: on a whole batch, on the half
of it that CoLM chooses in the step, and on a batch of half as many rows. Data in results/coresets/memory.json, the
table in memory.md.
"""

from __future__ import annotations

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries

NAME = "memory"
FOLDER = common.RESULTS.parent / "coresets"
ROWS, RATIO = (8, 16, 32), 0.5
PLANS = ("matmuls", "blocks")


def measure(key: common.Row) -> common.Row:
    """A train step's bytes and FLOPs."""
    method = recipe.parse(key["method"], {"ratio": RATIO} if "colm" in key["method"] else {})
    shape = (key["batch_size"], key["seq_len"], key["save"], key["dtype"])
    step = planner.make_step(geometries.load(key["geometry"]), method, *shape, packed=False)
    made = planner.row(step, targets.target(key["target"]))
    return {"bytes": made["bytes"], "flops": made["flops"]}


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """Per target, plan and number of rows: all of them, those of a coreset, half as many."""
    fixed = {"geometry": "llama2-7b", "seq_len": 512, "dtype": "bfloat16"}
    return [
        figures(**fixed, batch_size=rows, method=method, save=save, target=name)
        for name in names
        for save in PLANS
        for size in ROWS
        for rows, method in ((size, "lora"), (size, "lora+colm"), (round(RATIO * size), "lora"))
    ]


def _threes(rows: list[common.Row]) -> list[tuple[common.Row, common.Row, common.Row]]:
    return list(zip(rows[::3], rows[1::3], rows[2::3], strict=True))


def total(row: common.Row) -> float:
    """GiB of a step."""
    return row["bytes"]["total"] / GIB


def document(rows: list[common.Row]) -> str:
    """The page."""
    head = ["target", "`--save`", "rows", "all, GiB", "coreset of half, GiB", "half as many, GiB", "FLOPs"]
    body = [
        [
            chosen["target"],
            chosen["save"],
            str(chosen["batch_size"]),
            *(f"{total(row):.2f}" for row in (whole, chosen, half)),
            f"{chosen['flops'] / whole['flops']:.2f}",
        ]
        for whole, chosen, half in _threes(rows)
    ]
    text = f"Llama-2-7B, LoRA, rows of 512 tokens, bfloat16; a coreset is {RATIO:.0%} of the rows."
    return f"# Memory of a coreset\n\n{text}\n\n{common.table(head, body)}"


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document, folder=FOLDER)
