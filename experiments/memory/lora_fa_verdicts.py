"""What the figures say about the LoRA-FA paper's claims, in words and as a picture."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.memory.common import GIB
from experiments.memory.lora_fa_paper import T3
from experiments.memory.lora_fa_steps import METHODS, PAIRS, PLANS, Sizes, without


def verdicts(of: Sizes) -> list[str]:
    """A sentence per claim, figures out of the data; GiB, 7B, 16 x 1024 tokens, rank 64 where nothing else is said."""
    total = of.total
    (ours, fa), (ours_m, fa_m) = ([of(method, plan)["kept"] / GIB for method in METHODS] for plan in PLANS)
    more, more_m = (of.slope("lora", plan) - of.slope("lora_fa", plan) for plan in PLANS)
    whole, whole_m = (total("lora", plan) for plan in PLANS)
    attention, attention_m = (total("lora", plan, targets="attention") for plan in PLANS)
    first, first_m = (total("lora", plan, layers="0:3") for plan in PLANS)
    last, last_m = (total("lora", plan, layers="29:32") for plan in PLANS)
    down, down_m = (total("lora", plan) - total("lora", plan, targets=without("down")) for plan in PLANS)
    q, q_m = (total("lora", plan) - total("lora", plan, targets=without("q")) for plan in PLANS)
    where = {"lora": "attention", "lora_fa": "all-linear"}
    growth = [
        total(m, plan, rank=128, targets=where[m]) - total(m, plan, rank=1, targets=where[m]) for plan, m in PAIRS
    ]
    cases = [(m, *x) for x in ((2, 1024), (2, 2048), (8, 2048)) for m in METHODS]
    b13, m13 = ({(m, b, s): total(m, plan, "llama2-13b", b, s) for m, b, s in cases} for plan in PLANS)
    elements = (8 * 4096 + 4 * 11008, 6 * 4096 + 3 * 11008)
    tokens = [size * GIB / (32 * 2 * n) for size, n in zip(T3["activations"], elements, strict=True)]
    tokens += [16 * 1024 * size / kept for size, kept in zip(T3["activations"], (ours, fa), strict=True)]
    text = f"""
LoRA-FA keeps less than LoRA: yes, if autodiff keeps what it likes: {ours:.2f} against {fa:.2f} GiB of activations,
{ours - fa:.2f} less (paper: 55.6, 42.3, 13.3). Per token and layer that is {more:,.0f} bytes, e(2d + f) being 38,400.

The saving is a plan's as well: under matmuls LoRA keeps {ours_m:.1f} GiB and LoRA-FA {fa_m:.1f}, {more_m:,.0f} bytes
per token and layer apart, as what A reads is computed again, without a matrix product. What is left between the totals
({whole_m:.1f}, {total("lora_fa", "matmuls"):.1f}) are A's gradients and Adam's state.

Rank matters little: from 1 to 128 LoRA (attention) grows by {growth[0]:.1f} GiB and LoRA-FA by {growth[1]:.1f} under
everything, {growth[2]:.1f} and {growth[3]:.1f} under matmuls (paper: 1.5, 2.2).

Attention alone: {attention:.1f} instead of {whole:.1f} GiB under everything, {whole - attention:.1f} less (paper:
10.9); {attention_m:.1f} instead of {whole_m:.1f} under matmuls, {whole_m - attention_m:.1f} less.

Modules: leaving out down saves {down:.1f} GiB under everything, most of what any single one does, because nothing else
reads its input (paper: 6.0); leaving out q, whose input k and v read too, {q:.1f} (paper: 2.4). Under matmuls it is
{down_m:.1f} and {q_m:.1f}, what belongs to the adapters.

A tenth of the layers: {whole - first:.1f} GiB less under everything if they are the first (paper, which does not say
which: 15.8), {whole_m - first_m:.1f} less under matmuls. If they are the last, nothing below them is kept, and
{last:.1f} and {last_m:.1f} GiB are left in all: which layers matters more than how many.

16 x 2048 tokens in 75.3 and 62.5 GB: not with full rows. With no matrix product computed twice LoRA-FA needs
{total("lora_fa", "matmuls", seq=2048):.1f} GiB there, with plain autodiff
{total("lora_fa", "everything", seq=2048):.1f}. Even its 42.3 GiB of activations are less than 16 x 1024 full rows keep:
12d + 4f bytes per token and layer are 45.5. The paper's activations are those of {tokens[0]:,.0f} and
{tokens[1]:,.0f} tokens if PyTorch keeps 8d + 4f and 6d + 3f elements of each, and of {tokens[2]:,.0f} and
{tokens[3]:,.0f} if it keeps what JAX does.

13B: two rows need less than in the paper: with 1024 and 2048 tokens LoRA takes {b13["lora", 2, 1024]:.1f} and
{b13["lora", 2, 2048]:.1f} GiB under everything, LoRA-FA {b13["lora_fa", 2, 1024]:.1f} and
{b13["lora_fa", 2, 2048]:.1f} (paper: 50, 71; 45, 62). 8 x 2048 tokens, in 77.1 and 63.9 GB, need more:
{b13["lora", 8, 2048]:.1f} and {b13["lora_fa", 8, 2048]:.1f}. Under matmuls two rows need {m13["lora", 2, 1024]:.1f} and
{m13["lora", 2, 2048]:.1f} GiB with LoRA, {m13["lora_fa", 2, 1024]:.1f} and {m13["lora_fa", 2, 2048]:.1f} with LoRA-FA.

Twice the batch in 24 GB, from 2 rows to 4: not by LoRA-FA, at 1024 full tokens. 2 rows of LoRA and 4 of LoRA-FA need
{total("lora", "everything", batch=2):.1f} and {total("lora_fa", "everything", batch=4):.1f} GiB under everything,
{total("lora", "matmuls", batch=2):.1f} and {total("lora_fa", "matmuls", batch=4):.1f} under matmuls (for the H200).
"""
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def picture(of: Sizes) -> Figure:
    """Activations of LoRA and LoRA-FA: the paper's, and ours under three plans."""
    pairs = {"paper, PyTorch\n(12 to 15 thousand tokens)": T3["activations"]}
    for plan in ("everything", "matmuls", "blocks"):
        pairs[f"compiled here,\n{plan}"] = tuple(of(method, plan)["kept"] / GIB for method in METHODS)
    figure = Figure(figsize=(8, 4), dpi=140, layout="constrained")
    axes = figure.subplots()
    for i, (which, label, color) in enumerate([(0, "LoRA", "#c98b5a"), (1, "LoRA-FA", "#4c6a92")]):
        places = [at + 0.36 * (i - 0.5) for at in range(len(pairs))]
        values = [pair[which] for pair in pairs.values()]
        axes.barh(places, values, 0.34, color=color)
        for place, value in zip(places, values, strict=True):
            text = axes.text(value + 0.8, place, f"{label} {value:.1f}", va="center", fontsize=9, color=color)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    floor = (12 * 4096 + 4 * 11008) * 32 * 16 * 1024 / GIB
    axes.axvline(floor, color="#777777", linewidth=1, linestyle=":", zorder=0)
    axes.text(floor + 0.8, 3.2, f"least without a matrix product\ndone twice: {floor:.1f}", fontsize=8, color="#555555")
    axes.set_yticks(range(len(pairs)), pairs, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(right=1.25 * max(map(max, pairs.values())))
    axes.set_xlabel("GiB of activations kept for the backward pass", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Llama-2-7B, batch 16 x 1024, bf16, rank 64 on all linear maps", fontsize=10, loc="left")
    return figure
