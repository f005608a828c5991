"""Steps without a backward pass beside the forward pass itself, and beside what the sources say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe, tree
from jaxpeft.memory import aot, planner, targets
from jaxpeft.models import geometries

NAME = "forward_passes"
FORWARD = "forward pass"
# Geometry, batch, length, recipe, options.
STEPS: tuple[tuple[str, int, int, str, tuple[str, ...]], ...] = (
    ("llama2-7b", 4, 512, FORWARD, ()),
    ("llama2-7b", 4, 512, "mezo", ()),
    ("llama2-13b", 1, 512, "quantize+qzo", ("format=int4",)),
    ("llama2-7b", 4, 512, "mezo", ("variant=forward",)),
    ("opt-13b", 4, 512, FORWARD, ()),
    ("opt-13b", 4, 512, "mezo", ()),
    ("opt-30b", 4, 512, FORWARD, ()),
    ("opt-30b", 4, 512, "mezo", ()),
)
TARGETS = ("h200", "v5p")
# Beside full fine-tuning on an H200: what is compared, whose paper's claim it is, and its two figures in GB. MeZO's are
# of A100s and rows of 400 tokens on average (MultiRC), one at a time; QZO's of 16-bit weights, gradients and moments of
# 7B parameters, and of int4 weights.
CLAIMS: tuple[Any, ...] = (
    ("opt-13b", 1, 400, "mezo", (), "MeZO", 316, 26),
    ("llama2-7b", 1, 512, "quantize+qzo", ("format=int4",), "QZO", 56, 3.5),
)


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

    compiled = aot.compile(target, loss, step.state.moved, step.batch)
    return {"total": compiled.memory.total, "flops": planner.cost(step).flops / 2}


def collect(figures: common.Figures) -> list[common.Row]:
    """A figure for each step on each target, then those of the papers' claims, each before full fine-tuning's."""
    beside = [step for *of, words, options, _, _, _ in CLAIMS for step in ((*of, words, options), (*of, "full", ()))]
    asked = [(target, *step) for target in TARGETS for step in STEPS] + [(TARGETS[0], *step) for step in beside]
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
        for target, geometry, batch, length, words, options in asked
    ]


def document(rows: Sequence[common.Row]) -> str:
    """The table under its title, each step beside the forward pass of the same batch on the same device."""
    same = ("geometry", "batch_size", "seq_len", "target")
    passes = {tuple(row[name] for name in same): row for row in rows if row["method"] == FORWARD}
    body, claims = [], rows[len(TARGETS) * len(STEPS) :]
    for row in rows[: len(TARGETS) * len(STEPS)]:
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
    table = common.table(header, body)
    return f"# Steps without a backward pass\n\nbfloat16; JAX {jax}.\n\n{table}\n{beside_full(claims)}"


def beside_full(rows: Sequence[common.Row]) -> str:
    """The papers' claims with our figures: rows of each step and of full fine-tuning, in turn."""
    body = []
    for step, full, (*_, source, theirs, least) in zip(rows[::2], rows[1::2], CLAIMS, strict=True):
        body.append(
            [
                f"{step['method']} {' '.join(step['options'])}".strip(),
                f"{step['geometry']}, {step['batch_size']} x {step['seq_len']}",
                *(f"{row['total'] / 1e9:.1f}" for row in (full, step)),
                f"{full['total'] / step['total']:.1f}",
                f"{source}: {theirs} and {least}, {theirs / least:.1f}",
            ]
        )
    header = ["step", "of", "full fine-tuning, GB", "GB", "times less", "as its paper has it"]
    how = (
        "On an H200; full fine-tuning by Adam with masters, gradients and moments in float32, 16 bytes a number, under "
        "`matmuls`."
    )
    return f"## Beside full fine-tuning\n\n{how}\n\n{common.table(header, body)}"
