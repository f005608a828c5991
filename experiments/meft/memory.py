"""What does a reversible model save?

    python -m experiments.meft.memory           # compiles what the data lacks; ten minutes
    python -m experiments.meft.memory --draw    # tables from the data

Nearly all of the activations, at the price of computing each layer once more. A step's extra memory on an H200, GiB:

                                     bert-base   roberta-large   opt-1.3b   llama2-7b
    rows x tokens                     32 x 512        32 x 512   32 x 512   16 x 1024
    full fine-tuning                      9.21           24.20      34.88       81.82
    full, no product computed again       3.13            8.23      15.30       45.68
    LoRA, layers computed again           0.39            0.89       1.73        4.46
    MEFT1, published                      0.23            0.31       0.65        1.55
    MEFT1, exact, lam = 1/8               0.31            0.49       0.93        2.28

Exact MEFT1 needs 2.0 % (roberta-large) and 2.7 % (opt-1.3b) of what plain autodiff needs for full fine-tuning, 5.9 and
6.1 % of what it needs where only matrix products are kept. About 32 % of its FLOPs are the layers' second evaluation
(LoRA under blocks, which needs nearly twice as much: 23 to 32 %); evaluated twice, 43 to 49 %.

Train steps as `jaxpeft train` runs them (bfloat16, Adam, what trains in float32), compiled for the target. Activations:
what the backward pass keeps of the forward pass; extra: all temporaries without the gradients, so with what a layer
works on. The paper's claim: 84 % less activation memory than full fine-tuning on average. Data in
results/memory/meft_memory.json, tables in meft_memory.md.
"""

from __future__ import annotations

import jaxpeft as jp
from experiments.memory import common
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries

NAME = "meft_memory"
GIB = 2**30
# geometry -> task, rows, tokens of a row
STEPS = {
    "bert-base": ("classify", 32, 512),
    "roberta-large": ("classify", 32, 512),
    "opt-1.3b": ("lm", 32, 512),
    "llama2-7b": ("lm", 16, 1024),
}
# label -> method, plan
FORMS = {
    "full": (jp.full, "everything"),
    "full, matmuls": (jp.full, "matmuls"),
    "full, blocks": (jp.full, "blocks"),
    "lora": (lambda: jp.lora(rank=8), "everything"),
    "lora, matmuls": (lambda: jp.lora(rank=8), "matmuls"),
    "lora, blocks": (lambda: jp.lora(rank=8), "blocks"),
    "meft 1, published": (lambda: jp.meft(1, exact=False, readout="mean"), "everything"),
    "meft 2, published": (lambda: jp.meft(2, exact=False, readout="mean"), "everything"),
    "meft 3, published": (lambda: jp.meft(3, exact=False, readout="mean"), "everything"),
    "meft 1, exact 1/8": (lambda: jp.meft(1), "everything"),
    "meft 2, exact 1/8": (lambda: jp.meft(2), "everything"),
    "meft 3, exact 1/8": (lambda: jp.meft(3), "everything"),
    "meft 1, exact 1/256": (lambda: jp.meft(1, lam="1/256"), "everything"),
    "meft 1, exact 1/8, evaluated twice": (lambda: jp.meft(1, twice=True), "everything"),
}


def measure(key: common.Row) -> common.Row:
    """A train step."""
    method, save = FORMS[key["form"]]
    task, rows, length = STEPS[key["geometry"]]
    config = geometries.load(key["geometry"])
    step = planner.make_step(config, method(), rows, length, save, "bfloat16", packed=False, task=task)
    traced = planner.cost(step)
    made = planner.row(step, targets.target(key["target"]), traced)
    names = ("bytes", "flops", "recompute_flops", "fits")
    return {"batch": f"{rows} x {length}", **{name: made[name] for name in names}, "kept": traced.activations}


def extra(row: common.Row) -> float:
    """GiB of temporaries without the gradients."""
    return (row["bytes"]["temporaries"] - row["bytes"]["gradients"]) / GIB


def document(rows: list[common.Row]) -> str:
    """A table for each target and geometry."""
    text = "# Activation memory of reversible models\n"
    for target in dict.fromkeys(row["target"] for row in rows):
        for geometry in STEPS:
            own = {row["form"]: row for row in rows if (row["target"], row["geometry"]) == (target, geometry)}
            full = own["full"]
            body = [
                [
                    form,
                    f"{row['kept'] / GIB:.2f}",
                    f"{extra(row):.2f}",
                    f"{extra(row) / extra(full):.1%}",
                    f"{extra(row) / extra(own['full, matmuls']):.1%}",
                    f"{row['bytes']['total'] / GIB:.2f}",
                    f"{row['flops'] / 1e12:.0f}",
                    f"{row['recompute_flops'] / row['flops']:.0%}",
                ]
                for form, row in own.items()
            ]
            head = [
                "",
                "activations GiB",
                "extra GiB",
                "of full",
                "of full, matmuls",
                "step GiB",
                "TFLOP",
                "computed again",
            ]
            text += f"\n## {geometry}, {full['batch']} tokens, {target}\n\n" + common.table(head, body)
    return text


if __name__ == "__main__":
    args = common.arguments(__doc__)
    figures = common.Figures(NAME, None if args.draw else measure)
    rows = [
        figures(geometry=geometry, form=form, target=target)
        for target in args.targets
        for geometry in STEPS
        for form in FORMS
    ]
    common.write(f"{NAME}.md", document(rows))
