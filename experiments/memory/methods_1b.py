"""What does a step of each method need?

    python -m experiments.memory.methods_1b           # compiles what the data lacks; all of it in 15 minutes
    python -m experiments.memory.methods_1b --draw    # table and picture from the data

The train step of Llama-3.2-1B's geometry, batch 4 x 1024, bfloat16 base, compiled for an H200, with each method's
defaults (low ranks 8) under `matmuls` (methods that run the layers in their own way: `everything`; without a backward
pass: `blocks`). Data in results/memory/methods_1b.json, table in methods_1b.md, picture in methods_1b.png.
"""

from __future__ import annotations

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe
from jaxpeft.memory import planner, targets
from jaxpeft.memory.bars import write_bars
from jaxpeft.models import geometries
from jaxpeft.train.memory import CATEGORIES

NAME = "methods_1b"
GEOMETRY, BATCH, LENGTH, TARGET = "llama3.2-1b", 4, 1024, "h200"
# In the order of the picture: what trains weights, what trains beside them, what has no backward pass.
METHODS = (
    "full galore lisa dora lora ia3 paca lora_fa prefix houlsby pfeiffer parallel "
    "quantize+dora quantize+lora quantize+paca lora+lisa meft lst mezo mezo+prefix mezo+lora quantize+mezo+lora"
).split()


def measure(key: common.Row) -> common.Row:
    """A step's bytes by owner, as `jaxpeft plan` gives them."""
    config = geometries.load(key["geometry"])
    step = planner.make_step(config, recipe.parse(key["method"]), key["batch_size"], key["seq_len"], packed=False)
    made = planner.row(step, targets.target(key["target"]))
    names = ("save", "bytes", "device_bytes", "fits", "flops", "recompute_flops")
    return {name: made[name] for name in names}


def collect(figures: common.Figures) -> list[common.Row]:
    """A figure for each method."""
    fixed = {"geometry": GEOMETRY, "batch_size": BATCH, "seq_len": LENGTH, "dtype": "bfloat16", "target": TARGET}
    return [figures(**fixed, method=name) for name in METHODS]


def table(rows: list[common.Row]) -> str:
    """GiB by owner, and FLOPs over those of LoRA."""
    lora = next(row["flops"] for row in rows if row["method"] == "lora")
    body = [
        [
            row["method"],
            row["save"],
            *(f"{row['bytes'][name] / GIB:.2f}" for name in (*CATEGORIES, "total")),
            f"{row['flops'] / lora:.2f}",
        ]
        for row in rows
    ]
    return common.table(["method", "plan", *CATEGORIES, "total", "FLOPs / LoRA's"], body)


def document(rows: list[common.Row]) -> str:
    """The table under its title."""
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    head = (
        f"# A step of each method\n\n{GEOMETRY}, batch {BATCH} x {LENGTH}, bfloat16, GiB on an {TARGET}; JAX {jax}.\n"
    )
    return f"{head}\n{table(rows)}"


if __name__ == "__main__":
    args = common.arguments(__doc__, TARGET)
    rows = collect(common.Figures(NAME, None if args.draw else measure))
    common.write(f"{NAME}.md", document(rows))
    write_bars({"model": GEOMETRY, "rows": rows}, common.RESULTS / f"{NAME}.png")
