"""Steps without a backward pass beside the forward pass itself, and beside what the sources say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe, tree
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries

NAME = "forward_passes"
FORWARD = "forward pass"
# Geometry, batch, length, recipe, options.
STEPS: tuple[tuple[str, int, int, str, tuple[str, ...]], ...] = (
    ("llama2-7b", 4, 512, FORWARD, ()),
    ("llama2-7b", 4, 512, "mezo", ()),
    ("llama2-13b", 1, 512, "quantize+qzo", ("format=int4",)),
    ("llama2-7b", 4, 512, "mezo", ("variant=forward",)),
)
TARGETS = ("h200", "v5p")


def measure(key: common.Row) -> common.Row:
    """A step's bytes on a target; of the forward pass those of the loss, of the same batch."""
    forward = key["method"] == FORWARD
    config, method = (
        geometries.load(key["geometry"]),
        recipe.parse("mezo" if forward else key["method"], key["options"]),
    )
    step = planner.make_step(config, method, key["batch_size"], key["seq_len"], dtype=key["dtype"], packed=False)
    target = targets.target(key["target"])
    if not forward:
        made = planner.row(step, target)
        return {"total": made["bytes"]["total"], "flops": made["flops"]}

    def loss(leaves: Any, batch: Any) -> Any:
        return step.task.loss(step.model, tree.unflatten(leaves), batch)[0]

    compiled = targets.compile(target, loss, step.state.moved, step.batch)
    return {"total": compiled.memory.total, "flops": planner.cost(step).flops / 2}


def collect(figures: common.Figures) -> list[common.Row]:
    """A figure for each step on each target."""
    return [
        figures(
            geometry=geometry,
            batch_size=batch,
            seq_len=length,
            method=words,
            options=list(options),
            dtype="bfloat16",
            target=target,
        )
        for target in TARGETS
        for geometry, batch, length, words, options in STEPS
    ]


def document(rows: Sequence[common.Row]) -> str:
    """The table under its title, each step beside the forward pass of the same batch on the same device."""
    same = ("geometry", "batch_size", "seq_len", "target")
    passes = {tuple(row[name] for name in same): row for row in rows if row["method"] == FORWARD}
    body = []
    for row in rows:
        beside = passes.get(tuple(row[name] for name in same))
        body.append(
            [
                f"{row['method']} {' '.join(row['options'])}".strip(),
                f"{row['geometry']}, {row['batch_size']} x {row['seq_len']}, {row['target']}",
                f"{row['total'] / GIB:.2f}",
                f"{row['total'] / 1e9:.1f}",
                f"{row['total'] / beside['total']:.3f}" if beside else None,
                f"{row['flops'] / beside['flops']:.2f}" if beside else None,
            ]
        )
    header = ["step", "of", "GiB", "GB", "times the forward pass's", "its FLOPs"]
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    return f"# Steps without a backward pass\n\nbfloat16; JAX {jax}.\n\n{common.table(header, body)}"
