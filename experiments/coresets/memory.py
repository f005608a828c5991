"""What does a step on chosen rows of a large batch need?

    python -m experiments.coresets.memory           # compiles what the data lacks
    python -m experiments.coresets.memory --draw    # the table from the data

The train step of Llama-3.2-1B's geometry, LoRA of rank 128 on all linear maps, rows of 512 tokens, bfloat16, compiled
for an H200: `lora+colm` on half of a batch and LoRA on the whole batch and on half of it. Data in
results/coresets/memory.json, table in memory.md.
"""

from __future__ import annotations

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe

NAME, FOLDER = "memory", common.RESULTS.parent / "coresets"
GEOMETRY, LENGTH, TARGET = "llama3.2-1b", 512, "h200"
# (method, rows of the batch)
STEPS = (("lora", 32), ("lora+colm", 32), ("lora", 16))
PLANS = ("matmuls",)


def measure(key: common.Row) -> common.Row:
    """A step's bytes by owner and its FLOPs, as `jaxpeft plan` gives them."""
    return common.train_step(key, recipe.parse(key["method"], (), rank=key["rank"]))


def collect(figures: common.Figures) -> list[common.Row]:
    """A figure for each step under each plan."""
    fixed = {"geometry": GEOMETRY, "seq_len": LENGTH, "dtype": "bfloat16", "target": TARGET, "rank": 128}
    return [figures(**fixed, method=name, batch_size=rows, save=plan) for plan in PLANS for name, rows in STEPS]


def document(rows: list[common.Row]) -> str:
    """GiB by owner, under a title."""
    head = (
        f"# A step on chosen rows\n\n{GEOMETRY}, LoRA r 128, rows of {LENGTH} tokens, bfloat16, GiB on an {TARGET}.\n"
    )
    names = [name for name in rows[0]["bytes"] if name != "total"]
    body = [
        [row["save"], row["method"], row["batch_size"]]
        + [f"{row['bytes'][name] / GIB:.2f}" for name in (*names, "total")]
        + [f"{row['flops'] / 1e12:.0f}"]
        for row in rows
    ]
    return f"{head}\n{common.table(['plan', 'method', 'rows', *names, 'total', 'TFLOPs'], body)}"


if __name__ == "__main__":
    args = common.arguments(__doc__, TARGET)
    found = collect(common.Figures(NAME, None if args.draw else measure, FOLDER))
    common.write("memory.md", document(found), FOLDER)
