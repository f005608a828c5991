"""What does a train step need when nothing is differentiated through the backbone?

    python -m experiments.side_networks.memory           # compiles what the data lacks; all in about 20 minutes
    python -m experiments.side_networks.memory --draw    # table from the data

Train steps compiled for an H200, bfloat16, Adam: LoRA of rank 16, LST with reduction 8, UniPT and SHERL with 2, VQT
with 5 queries and 1000 labels. The claim is of LST's paper: 69 % below full fine-tuning of T5-base, optimizer included;
bert-base with its batch of 100 x 128 is what comes nearest here. Networks beside the backbone compute their own part
again in the backward pass, so what is kept is the backbone's stream, d per token and layer: as much as `blocks` keeps,
which runs every layer again. Figures are in results/memory/side_networks.json, steps by owner in the .md.

- h200, roberta-large, 32 x 512: activations of full fine-tuning 23.97, 8.23 and 0.75 GiB under everything, matmuls
  and blocks, of LoRA 20.35, 8.34 and 0.75; of lst 0.89, unipt 0.75 and sherl 0.78.
- h200, llama2-7b, 16 x 1024: activations of full fine-tuning 80.64, 45.56 and 4.00 GiB under everything, matmuls and
  blocks, of LoRA 68.68, 45.67 and 4.00; of lst 4.92, unipt 4.25 and sherl 4.38.
- h200, bert-base, 100 x 128: activations of full fine-tuning 7.05, 2.42 and 0.22 GiB under everything, matmuls and
  blocks, of LoRA 5.97, 2.45 and 0.22; of lst 0.27, unipt 0.22 and sherl 0.24.
- h200, vit-l-16, 128 x 197: activations of full fine-tuning 36.43, 11.58 and 1.15 GiB under everything, matmuls and
  blocks, of LoRA 31.32, 11.69 and 1.15; of lst 1.36, unipt 1.16, sherl 1.21 and vqt 2.68.
- h200, the whole step under plain autodiff: LST is 94, 89, 93 and 94 % below full fine-tuning (claimed: 69 % on
  T5-base) and 91, 76, 90 and 93 % below LoRA on roberta-large, llama2-7b, bert-base and vit-l-16.
- h200, against recomputation: LoRA under blocks takes 0.89, 0.86, 0.85 and 0.83 times the memory of LST and 2.8, 2.5,
  2.8 and 2.5 times its products.

What a network beside the backbone saves over recomputation is therefore work, not memory: no layer is run again, and
none backwards. VQT's queries are 5 and not 10 as products of 1280 rows end XLA's compiler for a described H200.
"""

from __future__ import annotations

import jaxpeft as jp
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries
from jaxpeft.train.memory import CATEGORIES

NAME = "side_networks"
RANK = 16
METHODS = {
    "full": jp.full,
    "lora": lambda: jp.lora(RANK),
    "lst": jp.lst,
    "unipt": jp.unipt,
    "sherl": jp.sherl,
    "vqt": jp.vqt,
}
BESIDE = ("lst", "unipt", "sherl")
PLANS = ("everything", "matmuls", "blocks")  # of the methods that differentiate through the backbone
# geometry -> task, rows, tokens of a row (an image's follow from its size), methods beside the backbone
STEPS = {
    "roberta-large": ("classify", 32, 512, BESIDE),
    "llama2-7b": ("lm", 16, 1024, BESIDE),
    "bert-base": ("classify", 100, 128, BESIDE),
    "vit-l-16": ("classify", 128, 197, (*BESIDE, "vqt")),
}


def measure(key: common.Row) -> common.Row:
    """A train step of `jaxpeft train`: Adam, trainable leaves in float32."""
    step = planner.make_step(
        geometries.load(key["geometry"]),
        METHODS[key["method"]](),
        key["batch_size"],
        key["seq_len"],
        key["save"],
        key["dtype"],
        packed=False,
        task=key["task"],
    )
    traced = planner.cost(step)
    made = planner.row(step, targets.target(key["target"]), traced)
    return {**{name: made[name] for name in ("bytes", "flops", "recompute_flops", "fits")}, "kept": traced.activations}


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """Every method for every geometry and target."""
    return [
        figures(
            geometry=geometry,
            task=task,
            batch_size=rows,
            seq_len=length,
            dtype="bfloat16",
            method=method,
            save=save,
            target=target,
        )
        for target in names
        for geometry, (task, rows, length, beside) in STEPS.items()
        for method, save in [
            *((method, save) for method in ("full", "lora") for save in PLANS),
            *((method, "everything") for method in beside),
        ]
    ]


def _of(rows: list[common.Row], geometry: str, method: str, save: str = "everything") -> common.Row:
    return next(r for r in rows if (r["geometry"], r["method"], r["save"]) == (geometry, method, save))


def _list(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def verdicts(rows: list[common.Row]) -> list[str]:
    """What is kept, against the claim and against recomputation; GiB."""
    text = []
    for name in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == name]
        for geometry, (_, count, length, beside) in STEPS.items():

            def kept(method, save="everything", own=own, geometry=geometry):
                return f"{_of(own, geometry, method, save)['bytes']['activations'] / GIB:.2f}"

            full, lora = ([kept(method, save) for save in PLANS] for method in ("full", "lora"))
            text.append(
                f"{name}, {geometry}, {count} x {length}: activations of full fine-tuning {_list(full)} GiB under "
                f"everything, matmuls and blocks, of LoRA {_list(lora)}; of "
                f"{_list([f'{method} {kept(method)}' for method in beside])}."
            )
        total = {
            (geometry, method): _of(own, geometry, method)["bytes"]["total"]
            for geometry in STEPS
            for method in ("full", "lora", "lst")
        }

        def below(other, total=total):
            shares = [1 - total[geometry, "lst"] / total[geometry, other] for geometry in STEPS]
            return _list([f"{100 * share:.0f}" for share in shares]) + " %"

        text.append(
            f"{name}, the whole step under plain autodiff: LST is {below('full')} below full fine-tuning (claimed: "
            f"69 % on T5-base) and {below('lora')} below LoRA on {_list(list(STEPS))}."
        )
        work = [
            _of(own, geometry, "lora", "blocks")["flops"] / _of(own, geometry, "lst")["flops"] for geometry in STEPS
        ]
        size = [_of(own, geometry, "lora", "blocks")["bytes"]["total"] / total[geometry, "lst"] for geometry in STEPS]
        text.append(
            f"{name}, against recomputation: LoRA under blocks takes {_list([f'{x:.2f}' for x in size])} times the "
            f"memory of LST and {_list([f'{x:.1f}' for x in work])} times its products."
        )
    return text


def document(rows: list[common.Row]) -> str:
    """The verdicts, and every step by owner."""
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    head = f"# Networks beside a frozen backbone\n\nTrain steps, bfloat16, Adam; GiB; JAX {jax}.\n"
    owners = (*CATEGORIES, "total")
    body = [
        [
            f"{row['target']}, {row['geometry']}, {row['method']}, `{row['save']}`",
            *(f"{row['bytes'][owner] / GIB:.2f}" for owner in owners),
            f"{row['flops'] / 1e12:.0f}",
        ]
        for row in rows
    ]
    return "\n".join([head, common.bullets(verdicts(rows)), common.table(["", *owners, "TFLOP"], body)])


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document)
