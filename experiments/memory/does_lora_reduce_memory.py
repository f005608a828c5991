"""Does LoRA reduce memory at all? Bytes by owner against the length of the sequence, in one picture.

    python -m experiments.memory.does_lora_reduce_memory           # compiles what the data lacks; all in 10 minutes
    python -m experiments.memory.does_lora_reduce_memory --draw    # picture and table from the data

Train steps of llama3.1-8b with one row, compiled for an H200, under three plans: everything (plain autodiff), matmuls
(no matrix product is computed twice), blocks (layers are run again). LoRA and LoRA-FA have rank 16 on all linear maps;
prompt tuning has 20 tokens, 82 thousand parameters. Figures are in results/memory/does_lora_reduce_memory.json, all
totals in the .md, the picture in the .png. Totals beyond the device's 141 GiB are what the step would need. Plain
autodiff is that of the library's operations: RMSNorm and SwiGLU keep their inputs alone, where autodiff of their
written-out formulas keeps more.

- Yes, in what belongs to parameters: weights, adapters, gradients and Adam's state take 119.7 GiB with full
  fine-tuning, 15.6 with LoRA, 15.4 with LoRA-FA, 15.0 with a prompt, and 15.0 are the base.
- Little, in what belongs to tokens. Under plain autodiff 16k tokens keep 85.1 GiB of activations with full
  fine-tuning (13.0 of them copies of the weights in bfloat16), 72.4 with LoRA, 46.4 with LoRA-FA and 46.3 with 82
  thousand parameters of a prompt: the backward pass goes through every layer whatever is trained. The whole step
  shrinks from 205 to 90 GiB.
- That part is the plan's: matmuls keeps 46.1, 46.2, 46.2 and 46.1 GiB, blocks 4.0 with every method; LoRA's step is
  then 64 and 22 GiB.
- A reversible model and a network beside the backbone need no plan: MEFT keeps 1.2 GiB and LST 4.9; their steps take
  20 and 23 GiB.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

import jaxpeft as jp
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft.memory.bars import COLORS
from jaxpeft.memory.targets import target
from jaxpeft.method import Method
from jaxpeft.train.memory import CATEGORIES

NAME = "does_lora_reduce_memory"
GEOMETRY, BATCH, RANK, PROMPT, TARGET = "llama3.1-8b", 1, 16, 20, "h200"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
METHODS = {
    "full": "full fine-tuning",
    "lora": f"LoRA, rank {RANK}, all linear maps",
    "lora_fa": f"LoRA-FA, rank {RANK}, all linear maps",
    "prompt": f"prompt tuning, {PROMPT} tokens",
    "meft": "MEFT, exact, factor 1/8",
    "lst": "LST, reduction 8",
}
OWN = ("meft", "lst")  # run the layers in their own way, and have no plans
PLANNED = [method for method in METHODS if method not in OWN]
PLANS = {
    "everything": "plain autodiff",
    "matmuls": "elementwise work done again",
    "blocks": "layers run again",
}


def method_of(key: common.Row) -> Method:
    if key["method"] in ("full", *OWN):
        return getattr(jp, key["method"])()
    if key["method"] == "prompt":
        return jp.prompt(length=PROMPT)
    make = jp.lora_fa if key["method"] == "lora_fa" else jp.lora
    return make(rank=key["rank"], targets=key["targets"])


def measure(key: common.Row) -> common.Row:
    return common.train_step(key, method_of(key))


def collect(figures: common.Figures) -> dict[tuple[str, str, int], common.Row]:
    """{(plan, method, sequence): figure}."""
    adapter: dict[str, dict[str, Any]] = {
        "full": {"rank": None, "targets": None},
        "lora": {"rank": RANK, "targets": "all-linear"},
        "lora_fa": {"rank": RANK, "targets": "all-linear"},
        **{method: {"rank": None, "targets": None} for method in ("prompt", *OWN)},
    }
    fixed = {"geometry": GEOMETRY, "batch_size": BATCH, "dtype": "bfloat16", "target": TARGET}
    return {
        (plan, method, seq): figures(**fixed, seq_len=seq, method=method, **adapter[method], save=plan)
        for seq in LENGTHS
        for plan in PLANS
        for method in (METHODS if plan == "everything" else PLANNED)
    }


def picture(found: dict[tuple[str, str, int], common.Row]) -> Figure:
    """Rows are plans, columns methods; bars are sequence lengths, their parts the owners of the bytes."""
    figure = Figure(figsize=(18, 9.5), dpi=120, layout="constrained")
    grid = figure.subplots(len(PLANS), len(METHODS), sharex=True, sharey=True)
    room = target(TARGET).memory_bytes / GIB
    for i, plan in enumerate(PLANS):
        for j, method in enumerate(METHODS):
            axes = grid[i][j]
            if (plan, method, LENGTHS[0]) not in found:
                axes.set_axis_off()
                continue
            bottom = [0.0] * len(LENGTHS)
            for category in CATEGORIES:
                heights = [found[plan, method, seq]["bytes"][category] / GIB for seq in LENGTHS]
                axes.bar(range(len(LENGTHS)), heights, 0.76, bottom, color=COLORS[category], label=category)
                bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
            for k, seq in enumerate(LENGTHS):
                total = found[plan, method, seq]["bytes"]["total"] / GIB
                text = axes.text(k, bottom[k] + 3, f"{total:.0f}", ha="center", va="bottom", fontsize=9)
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
            axes.axhline(room, color="#b3261e", linewidth=1, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=9)
            if i == 0:
                axes.set_title(METHODS[method], fontsize=10, fontweight="bold", pad=8)
            if j == 0:
                axes.set_ylabel("GiB", fontsize=9.5)
                axes.annotate(plan, (-0.36, 0.5), xycoords="axes fraction", rotation=90, va="center", fontweight="bold")
                axes.annotate(PLANS[plan], (-0.27, 0.5), xycoords="axes fraction", rotation=90, va="center", fontsize=9)
            if i == len(PLANS) - 1 or method in OWN:
                axes.tick_params(labelbottom=True)
                axes.set_xticks(range(len(LENGTHS)), [f"{s}" if s < 1024 else f"{s // 1024}k" for s in LENGTHS])
                axes.set_xlabel("tokens in the sequence", fontsize=9.5)
    grid[0][-1].text(len(LENGTHS) - 0.5, room + 2, "memory of an H200", color="#b3261e", fontsize=9, ha="right")
    largest = max(row["bytes"]["total"] for row in found.values()) / GIB
    grid[0][0].set_ylim(top=1.12 * largest)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(CATEGORIES), fontsize=10, frameon=False)
    figure.suptitle(
        "Does LoRA reduce memory? Gradients and optimizer state: yes. Activations: little; they depend on the plan.\n"
        f"{GEOMETRY}, one sequence, bfloat16, Adam; bytes at the peak of a train step, compiled for an H200",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    return figure


def verdicts(found: dict[tuple[str, str, int], common.Row]) -> list[str]:
    """The answer, its figures out of the data; GiB."""

    def of(category, plan, method, seq):
        return found[plan, method, seq]["bytes"][category] / GIB

    states = {m: sum(of(c, "blocks", m, 16384) for c in CATEGORIES[:4]) for m in PLANNED}
    kept = {(plan, m): of("activations", plan, m, 16384) for plan, m, seq in found if seq == 16384}
    # What full fine-tuning keeps besides the tokens' own.
    copies = (2 * found["everything", "full", 512]["kept"] - found["everything", "full", 1024]["kept"]) / GIB
    full, lora = (of("total", "everything", m, 16384) for m in ("full", "lora"))
    text = f"""
Yes, in what belongs to parameters: weights, adapters, gradients and Adam's state take {states["full"]:.1f} GiB with
full fine-tuning, {states["lora"]:.1f} with LoRA, {states["lora_fa"]:.1f} with LoRA-FA, {states["prompt"]:.1f} with a
prompt, and {of("weights", "blocks", "lora", 16384):.1f} are the base.

Little, in what belongs to tokens. Under plain autodiff 16k tokens keep {kept["everything", "full"]:.1f} GiB of
activations with full fine-tuning ({copies:.1f} of them copies of the weights in bfloat16),
{kept["everything", "lora"]:.1f} with LoRA, {kept["everything", "lora_fa"]:.1f} with LoRA-FA and
{kept["everything", "prompt"]:.1f} with 82 thousand parameters of a prompt: the backward pass goes through every layer
whatever is trained. The whole step shrinks from {full:.0f} to {lora:.0f} GiB.

That part is the plan's: matmuls keeps {kept["matmuls", "full"]:.1f}, {kept["matmuls", "lora"]:.1f},
{kept["matmuls", "lora_fa"]:.1f} and {kept["matmuls", "prompt"]:.1f} GiB, blocks {kept["blocks", "lora"]:.1f} with every
method; LoRA's step is then {of("total", "matmuls", "lora", 16384):.0f} and
{of("total", "blocks", "lora", 16384):.0f} GiB.

A reversible model and a network beside the backbone need no plan: MEFT keeps {kept["everything", "meft"]:.1f} GiB and
LST {kept["everything", "lst"]:.1f}; their steps take {of("total", "everything", "meft", 16384):.0f} and
{of("total", "everything", "lst", 16384):.0f} GiB.
"""
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def document(found: dict[tuple[str, str, int], common.Row]) -> str:
    """The answer, and every total."""
    jax = ", ".join(sorted({row["jax"] for row in found.values()}))
    head = f"# Does LoRA reduce memory?\n\n{GEOMETRY}, batch {BATCH}, bfloat16, {TARGET}, JAX {jax}; total, GiB.\n"
    body = [
        [
            f"{plan}, {seq} tokens",
            *(found[plan, m, seq]["bytes"]["total"] / GIB if (plan, m, seq) in found else None for m in METHODS),
        ]
        for plan in PLANS
        for seq in LENGTHS
    ]
    return "\n".join([head, common.bullets(verdicts(found)), common.table(["", *METHODS.values()], body)])


if __name__ == "__main__":
    args = common.arguments(__doc__)
    found = collect(common.Figures(NAME, None if args.draw else measure))
    common.write(f"{NAME}.md", document(found))
    picture(found).savefig(common.RESULTS / f"{NAME}.png")
