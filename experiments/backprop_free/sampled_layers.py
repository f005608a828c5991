"""The memory of methods of which a few layers, or half of the matrices, train at a time, on Llama-2-7B's geometry."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries
from jaxpeft.train.memory import CATEGORIES

NAME = "sampled_layers"
GEOMETRY, LENGTH, TARGET = "llama2-7b", 1024, "h200"
# Batch, plan, recipe, options: beside full fine-tuning and LoRA of the rank that LISA's paper has.
STEPS = (
    (16, "blocks", "full", ()),
    (16, "blocks", "half", ()),
    (16, "blocks", "lisa", ("count=2",)),
    (16, "blocks", "owlore", ()),
    (16, "blocks", "lora", ("rank=64",)),
    (16, "blocks", "lora+ist", ("rank=64",)),
    (1, "blocks", "lisa", ("count=2",)),
    (1, "blocks", "owlore", ()),
    (1, "blocks", "owlore", ("which=layers",)),
)


def measure(key: common.Row) -> common.Row:
    """A step's bytes by owner, as `jaxpeft plan` gives them."""
    config, method = geometries.load(key["geometry"]), recipe.parse(key["method"], key["options"])
    step = planner.make_step(config, method, key["batch_size"], key["seq_len"], key["save"], key["dtype"], packed=False)
    made = planner.row(step, targets.target(key["target"]))
    return {name: made[name] for name in ("bytes", "device_bytes", "fits", "flops", "recompute_flops")}


def collect(figures: common.Figures) -> list[common.Row]:
    """A figure for each step."""
    fixed = {"geometry": GEOMETRY, "seq_len": LENGTH, "dtype": "bfloat16", "target": TARGET}
    return [
        figures(**fixed, batch_size=batch, save=save, method=words, options=list(options))
        for batch, save, words, options in STEPS
    ]


def document(rows: Sequence[common.Row]) -> str:
    """The table under its title; GB as papers count them beside GiB."""
    body = [
        [
            f"{row['method']} {' '.join(row['options'])}".strip(),
            f"{row['batch_size']} x {row['seq_len']}",
            *(f"{row['bytes'][name] / GIB:.2f}" for name in (*CATEGORIES, "total")),
            f"{row['bytes']['total'] / 1e9:.1f}",
        ]
        for row in rows
    ]
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    what = f"{GEOMETRY}, bfloat16, {rows[0]['save']}, GiB on an {TARGET}"
    table = common.table(["method", "batch", *CATEGORIES, "total", "total, GB"], body)
    return f"# Steps in which a part of the layers trains\n\n{what}; JAX {jax}.\n\n{table}"
