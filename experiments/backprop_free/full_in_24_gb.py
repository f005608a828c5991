"""Full fine-tuning of Llama-2-7B, a row of 2048 tokens, on a card of 24 GB: who owns what of each way to it."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries
from jaxpeft.train.memory import CATEGORIES

NAME = "full_in_24_gb"
GEOMETRY, LENGTH, TARGET = "llama2-7b", 2048, "rtx4090"
# Recipe, its options, optimizer, whether layers are updated in the backward pass, where the optimizer's state lies.
STEPS = (
    ("galore", ("rank=1024",), "adam8bit", True, "device"),
    ("galore", ("rank=1024",), "adam8bit", True, "host"),
    ("full", (), "adam", False, "device"),
    ("full", (), "adam8bit", False, "device"),
    ("full", (), "adam", True, "device"),
    ("full", (), "adam", True, "host"),
    ("lisa", ("count=2",), "adam", False, "device"),
    ("lisa", ("count=2", "moments=host"), "adam", False, "device"),
    ("lora", ("rank=64",), "adam", False, "device"),
)


def measure(key: common.Row) -> common.Row:
    """A step's bytes by owner, as `jaxpeft plan` gives them."""
    config, method = geometries.load(key["geometry"]), recipe.parse(key["method"], key["options"])
    options = {name: key[name] for name in ("optimizer", "update_in_backward", "optimizer_memory")}
    step = planner.make_step(config, method, 1, key["seq_len"], key["save"], key["dtype"], packed=False, **options)
    made = planner.row(step, targets.target(key["target"]))
    return {name: made[name] for name in ("bytes", "host_bytes", "device_bytes", "fits")}


def collect(figures: common.Figures) -> list[common.Row]:
    """A figure for each step."""
    fixed = {"geometry": GEOMETRY, "seq_len": LENGTH, "dtype": "bfloat16", "target": TARGET, "save": "blocks"}
    names = ("method", "options", "optimizer", "update_in_backward", "optimizer_memory")
    return [figures(**fixed, **dict(zip(names, (step[0], list(step[1]), *step[2:]), strict=True))) for step in STEPS]


def document(rows: Sequence[common.Row]) -> str:
    """The table under its title."""
    body = [
        [
            f"{row['method']} {' '.join(row['options'])}".strip(),
            f"{row['optimizer']}, {row['optimizer_memory']}" + (", in backward" if row["update_in_backward"] else ""),
            *(f"{row['bytes'][name] / GIB:.2f}" for name in (*CATEGORIES, "total")),
            f"{row['host_bytes'] / GIB:.2f}",
            "yes" if row["fits"] else "no",
        ]
        for row in rows
    ]
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    what = f"{GEOMETRY}, 1 x {LENGTH} tokens, bfloat16, {rows[0]['save']}, GiB on an {TARGET}"
    table = common.table(["method", "optimizer", *CATEGORIES, "total", "host", "fits"], body)
    return f"# Full fine-tuning of 7B, and what stands beside it, on 24 GB\n\n{what}; JAX {jax}.\n\n{table}"
