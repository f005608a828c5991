"""PEQA's claim: LLaMA-65B is tuned in 33 GB in place of 457. What does a step take?

    python -m experiments.memory.peqa_65b           # compiles what the data lacks; some minutes
    python -m experiments.memory.peqa_65b --draw    # the table from the data

The train step of LLaMA-65B's sizes, compiled for the target, one row of 2,048 tokens: weights in bfloat16, or codes of
PEQA's bits with one scale per output; what trains, its gradients and Adam's state in float32. LoRA is of rank 4 on
q_proj and v_proj. The paper's 33 GB leave no room for more than weights and the optimizer's state, as 65.3 billion
numbers of 4 bits are 32.6, so these are what is compared; full fine-tuning's 457 are 7 bytes a number, ours 12.

- h200: weights and state are 783 GB for full fine-tuning, 130.7 for LoRA, 33.5 for PEQA in 4 bits and 25.5 in 3; the
  whole step takes 38.7 and 30.6 GB.
"""

from __future__ import annotations

import jaxpeft as jp
from experiments.memory import common
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries

NAME = "peqa_65b"
SIZES = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80}
SIZES |= {"num_attention_heads": 64, "num_key_value_heads": 64}
METHODS = {
    "full": jp.full,
    "lora": lambda: jp.lora(4, targets=["q_proj", "v_proj"]),
    "peqa, 4 bits": lambda: jp.peqa(4),
    "peqa, 3 bits": lambda: jp.peqa(3),
}
THEIRS = {"full": "457", "peqa, 4 bits": "33"}  # GB
HELD = ("weights", "adapters", "optimizer")


def measure(key: common.Row) -> common.Row:
    """A train step's bytes."""
    config = {**geometries.load("llama2-7b"), **SIZES}
    step = planner.make_step(
        config, METHODS[key["method"]](), key["batch_size"], key["seq_len"], key["save"], key["dtype"], packed=False
    )
    return {"bytes": planner.row(step, targets.target(key["target"]))["bytes"]}


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """A figure per target and method."""
    fixed = {"geometry": "llama-65b", "batch_size": 1, "seq_len": 2048, "dtype": "bfloat16", "save": "blocks"}
    return [figures(**fixed, method=method, target=name) for name in names for method in METHODS]


def held(row: common.Row) -> float:
    """GB of weights and the optimizer's state."""
    return sum(row["bytes"][name] for name in HELD) / 1e9


def document(rows: list[common.Row]) -> str:
    """The page."""
    head = ["target", "method", "weights and state, GB", "its paper, GB", "gradients", "activations", "whole step, GB"]
    body = [
        [
            row["target"],
            row["method"],
            f"{held(row):.1f}",
            THEIRS.get(row["method"]),
            *(f"{row['bytes'][name] / 1e9:.1f}" for name in ("gradients", "activations", "total")),
        ]
        for row in rows
    ]
    return f"# PEQA at 65B\n\nLLaMA-65B, one row of 2,048 tokens, plan `blocks`.\n\n{common.table(head, body)}"


def verdicts(rows: list[common.Row]) -> list[str]:
    """What there is of the claim, per target."""
    said = []
    for name in dict.fromkeys(row["target"] for row in rows):
        full, lora, four, three = (row for row in rows if row["target"] == name)
        said.append(
            f"{name}: weights and state are {held(full):.0f} GB for full fine-tuning, {held(lora):.1f} for LoRA, "
            f"{held(four):.1f} for PEQA in 4 bits and {held(three):.1f} in 3; the whole step takes "
            f"{four['bytes']['total'] / 1e9:.1f} and {three['bytes']['total'] / 1e9:.1f} GB."
        )
    return said


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document, verdicts)
