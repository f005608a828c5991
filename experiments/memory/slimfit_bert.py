"""SlimFit's claim: 2.2 times less memory for BERT-base at batch 128. Is it so here, and by which part?

    python -m experiments.memory.slimfit_bert           # compiles what the data lacks; all of it in ten minutes
    python -m experiments.memory.slimfit_bert --draw    # the table from the data

The step of full fine-tuning, a classifier's, 128 rows of 128 tokens, bfloat16, what trains and Adam's state in float32,
compiled for the target; and of SlimFit, of whose stacks a tenth of the layers trains, with each of the paper's codes
added. Linear maps' inputs are among them, where the paper keeps those alone whose kernels train. Softmax is not: fused
attention keeps none. Data in results/memory/slimfit_bert.json, the table in slimfit_bert.md.

- h200: full fine-tuning takes 10.83 GiB under plain autodiff, 4.76 where no matrix product is computed again; slimfit
  with all its codes 1.92: 5.6 and 2.5 times less; full fine-tuning with them 2.82.
- h200: freezing alone takes 1.07 times less under plain autodiff, 1.23 times under matmuls; it spares gradients and
  moments.
- h200: of 3.10 GiB of activations under matmuls, codes of attention's operands and GELU's inputs leave 1.60, of
  linear maps' inputs 1.61, pruned norms 1.16; 0.9% of the FLOPs are attention that is computed again.
- h200: norms in 4 bits leave 1.20 in place of 1.16, a step of 1.97.

Codes of inputs spare nothing until norms are pruned: what they were made from is kept for the norms' sake. What the
codes cost is in code_errors.py: a tenth of a norm's rows moves the gradient by 19 to 30 % of its length, 4 bits of them
by 1.5 to 2.2.
"""

from __future__ import annotations

import jaxpeft as jp
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries

NAME = "slimfit_bert"
TITLE = "bert-base, a classifier's train step, batch 128 x 128, bfloat16"
FREEZE = 0.9
CODES = (
    "matmuls,q_proj=compress,k_proj=compress,v_proj=compress,attention=recompute,attention_lse=recompute,"
    "up_proj=compress4"
)
INPUTS = f"{CODES},block_input=compress,attention_norm=compress"
PRUNED = f"{INPUTS},attention_norm_normalized=prune,output_norm_normalized=prune"
FOUR_BITS = f"{INPUTS},attention_norm_normalized=compress4,output_norm_normalized=compress4"
# label -> method, plan
FORMS = {
    "full, plain autodiff": ("full", "everything"),
    "full, `matmuls`": ("full", "matmuls"),
    "slimfit, plain autodiff": ("slimfit", "everything"),
    "slimfit, `matmuls`": ("slimfit", "matmuls"),
    "attention's operands in 8 bits, GELU's inputs in 4": ("slimfit", CODES),
    "and linear maps' inputs in 8 bits": ("slimfit", INPUTS),
    "and norms pruned to a tenth": ("slimfit", PRUNED),
    "full, with all these codes": ("full", PRUNED),
    "slimfit, norms in 4 bits in place of a tenth": ("slimfit", FOUR_BITS),
}


def measure(key: common.Row) -> common.Row:
    """A train step, and what its layers keep, by name."""
    method = {"full": jp.full, "slimfit": lambda: jp.slimfit(FREEZE)}[key["method"]]()
    config = geometries.load(key["geometry"])
    shape = (key["batch_size"], key["seq_len"], key["save"], key["dtype"])
    step = planner.make_step(config, method, *shape, packed=False, task="classify")
    traced = planner.cost(step)
    made = planner.row(step, targets.target(key["target"]), traced)
    names = [segment.kept_bytes()["device"] for segment in traced.segments.values()]
    kept = {"kept": traced.activations, "names": {name: size for own in names for name, size in own.items()}}
    return {name: made[name] for name in ("bytes", "flops", "recompute_flops", "fits")} | kept


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """One figure per target and form."""
    fixed = {"geometry": "bert-base", "batch_size": 128, "seq_len": 128, "dtype": "bfloat16"}
    return [
        figures(**fixed, method=method, save=save, target=name) for name in names for method, save in FORMS.values()
    ]


def total(row: common.Row) -> float:
    """GiB of a step."""
    return row["bytes"]["total"] / GIB


def _by_target(rows: list[common.Row]) -> dict[str, list[common.Row]]:
    """In the order of FORMS."""
    return {name: [row for row in rows if row["target"] == name] for name in dict.fromkeys(r["target"] for r in rows)}


def document(rows: list[common.Row]) -> str:
    """The page."""
    text = f"# SlimFit on BERT-base\n\n{TITLE}; GiB; a share of {FREEZE} of each stack's layers stands still.\n"
    head = ["", "weights", "optimizer", "gradients", "activations", "workspace", "total", "of autodiff", "of `matmuls`"]
    for name, own in _by_target(rows).items():
        body = []
        for label, row in zip(FORMS, own, strict=True):
            size = {part: count / GIB for part, count in row["bytes"].items()}
            parts = (size["weights"] + size["adapters"], *(size[part] for part in head[2:7]))
            times = [f"{total(row) / total(other):.2f}" for other in own[:2]]
            body.append([label, *(f"{part:.2f}" for part in parts), *times])
        text += f"\n## {name}\n\n{common.table([*head], body)}"
        text += f"\nThe plan with all codes, `--save`:\n\n    {PRUNED}\n\nWhat it keeps of all layers, MiB:\n\n"
        names = own[list(FORMS.values()).index(("slimfit", PRUNED))]["names"]
        text += common.table([*names], [[f"{size / 2**20:.1f}" for size in names.values()]])
    return text


def verdicts(rows: list[common.Row]) -> list[str]:
    """What there is of the claim, per target."""
    said = []
    for name, own in _by_target(rows).items():
        auto, matmuls, frozen, frozen_matmuls, codes, inputs, pruned, full, four_bits = own
        activations = lambda row: row["bytes"]["activations"] / GIB
        said += [
            f"{name}: full fine-tuning takes {total(auto):.2f} GiB under plain autodiff, {total(matmuls):.2f} where no "
            f"matrix product is computed again; slimfit with all its codes {total(pruned):.2f}: "
            f"{total(auto) / total(pruned):.1f} and {total(matmuls) / total(pruned):.1f} times less; full fine-tuning "
            f"with them {total(full):.2f}.",
            f"{name}: freezing alone takes {total(auto) / total(frozen):.2f} times less under plain autodiff, "
            f"{total(matmuls) / total(frozen_matmuls):.2f} times under matmuls; it spares gradients and moments.",
            f"{name}: of {activations(matmuls):.2f} GiB of activations under matmuls, codes of attention's operands "
            f"and GELU's inputs leave {activations(codes):.2f}, of linear maps' inputs {activations(inputs):.2f}, "
            f"pruned norms {activations(pruned):.2f}; {pruned['recompute_flops'] / pruned['flops']:.1%} of the FLOPs "
            "are attention that is computed again.",
            f"{name}: norms in 4 bits leave {activations(four_bits):.2f} in place of {activations(pruned):.2f}, a step "
            f"of {total(four_bits):.2f}.",
        ]
    return said


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document, verdicts)
