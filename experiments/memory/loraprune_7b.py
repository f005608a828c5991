"""LoRAPrune's claim: 52.6 % less memory than a pruner that takes the gradients of all weights (LLM-Pruner).

    python -m experiments.memory.loraprune_7b           # compiles what the data lacks
    python -m experiments.memory.loraprune_7b --draw    # the table from the data

Its paper says so of LLaMA models of which half is pruned; LLM-Pruner takes each weight's gradient to score it.
Here Llama-2-7B, compiled for the target: `dense` is the loss with the gradients of all weights in bfloat16, without an
optimizer; `loraprune+lora` a whole train step, of which scores are a part. Rows of 512 tokens are LoRAPrune's, 10 rows
of 64 LLM-Pruner's, by the defaults of their programs.

- h200, 4 x 512: everything 33.9 to 21.6 GiB (36%), matmuls 31.1 to 18.9 GiB (39%), blocks 26.2 to 13.7 GiB (48%).
- h200, 10 x 64: everything 27.8 to 15.6 GiB (44%), matmuls 27.0 to 14.7 GiB (45%), blocks 25.6 to 13.4 GiB (48%).

Gradients of all weights are as many bytes as the weights, which stay: by those alone less than half can be spared.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe, tree
from jaxpeft.memory import aot, planner, targets
from jaxpeft.models import geometries

NAME = "loraprune_7b"
DENSE, OURS = "dense", "loraprune+lora"
SHAPES = ((4, 512), (10, 64))
PLANS = ("everything", "matmuls", "blocks")


def measure(key: common.Row) -> common.Row:
    """A step's bytes on a target; of `dense` those of the loss and its gradients."""
    dense = key["method"] == DENSE
    config, method = geometries.load(key["geometry"]), recipe.parse("full" if dense else key["method"])
    shape = (key["batch_size"], key["seq_len"], key["save"], key["dtype"])
    step = planner.make_step(config, method, *shape, packed=False)
    target = targets.target(key["target"])
    if not dense:
        return {"total": planner.row(step, target)["bytes"]["total"]}

    def loss(leaves: Any, batch: Any) -> Any:
        return step.task.loss(step.model, tree.unflatten(leaves), batch)[0]

    half = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in step.state.leaves.items()}
    return {"total": aot.compile(target, jax.value_and_grad(loss), half, step.batch).memory.total}


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """Per target, shape and plan the two figures, in turn."""
    fixed = {"geometry": "llama2-7b", "dtype": "bfloat16"}
    return [
        figures(**fixed, batch_size=batch, seq_len=length, method=method, save=save, target=name)
        for name in names
        for batch, length in SHAPES
        for save in PLANS
        for method in (DENSE, OURS)
    ]


def _pairs(rows: list[common.Row]) -> list[tuple[common.Row, common.Row]]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def document(rows: list[common.Row]) -> str:
    """The page."""
    head = ["target", "batch", "`--save`", "all weights' gradients, GiB", f"`{OURS}`, GiB", "less by"]
    body = [
        [
            ours["target"],
            f"{ours['batch_size']} x {ours['seq_len']}",
            ours["save"],
            *(f"{row['total'] / GIB:.2f}" for row in (dense, ours)),
            f"{1 - ours['total'] / dense['total']:.1%}",
        ]
        for dense, ours in _pairs(rows)
    ]
    return f"# What LoRAPrune's scores spare\n\nLlama-2-7B, bfloat16.\n\n{common.table(head, body)}"


def verdicts(rows: list[common.Row]) -> list[str]:
    """What there is of the claim, per target and shape."""
    pairs, said = _pairs(rows), []
    for name, batch, length in dict.fromkeys((row["target"], row["batch_size"], row["seq_len"]) for row in rows):
        own = [p for p in pairs if (p[1]["target"], p[1]["batch_size"], p[1]["seq_len"]) == (name, batch, length)]
        less = ", ".join(
            f"{ours['save']} {dense['total'] / GIB:.1f} to {ours['total'] / GIB:.1f} GiB "
            f"({1 - ours['total'] / dense['total']:.0%})"
            for dense, ours in own
        )
        said.append(f"{name}, {batch} x {length}: {less}.")
    return said


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document, verdicts)
