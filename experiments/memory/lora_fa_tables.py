"""Which of the LoRA-FA paper's claims hold when its steps are compiled?

    python -m experiments.memory.lora_fa_tables           # compiles what the data lacks; all of it in about 15 minutes
    python -m experiments.memory.lora_fa_tables --draw    # tables and picture from the data

Train steps of Llama-2-7B and 13B, compiled for an H200: bfloat16 base and computation, float32 adapters (LoRA-FA's
frozen A too) and Adam's state, one micro-batch, no padding, cuDNN attention, chunked loss. The paper measured PyTorch.
Figures are in results/memory/lora_fa_tables.json, with the paper's beside ours in lora_fa_tables.md, activations in
lora_fa_tables.png. Plain autodiff is that of the library's operations: RMSNorm and SwiGLU keep their inputs alone,
where autodiff of their written-out formulas keeps more. GiB; 7B, 16 x 1024 tokens, rank 64 where nothing else is said:

- LoRA-FA keeps less than LoRA: yes, if autodiff keeps what it likes: 69.01 against 46.26 GiB of activations, 22.75
  less (paper: 55.6, 42.3, 13.3). Per token and layer that is 46,608 bytes, e(2d + f) being 38,400.
- The saving is a plan's as well: under matmuls LoRA keeps 46.0 GiB and LoRA-FA 46.0, 0 bytes per token and layer
  apart, as what A reads is computed again, without a matrix product. What is left between the totals (61.4, 60.5) are
  A's gradients and Adam's state.
- Rank matters little: from 1 to 128 LoRA (attention) grows by 2.0 GiB and LoRA-FA by 4.0 under everything, 2.2 and
  3.8 under matmuls (paper: 1.5, 2.2).
- Attention alone: 68.8 instead of 85.6 GiB under everything, 16.9 less (paper: 10.9); 59.7 instead of 61.4 under
  matmuls, 1.7 less.
- Modules: leaving out down saves 11.4 GiB under everything, most of what any single one does, because nothing else
  reads its input (paper: 6.0); leaving out q, whose input k and v read too, 0.3 (paper: 2.4). Under matmuls it is 0.6
  and 0.3, what belongs to the adapters.
- A tenth of the layers: 23.5 GiB less under everything if they are the first (paper, which does not say which: 15.8),
  2.3 less under matmuls. If they are the last, nothing below them is kept, and 21.2 and 17.5 GiB are left in all:
  which layers matters more than how many.
- 16 x 2048 tokens in 75.3 and 62.5 GB: not with full rows. With no matrix product computed twice LoRA-FA needs 106.6
  GiB there, with plain autodiff 110.0. Even its 42.3 GiB of activations are less than 16 x 1024 full rows keep: 12d +
  4f bytes per token and layer are 45.5. The paper's activations are those of 12,146 and 12,321 tokens if PyTorch
  keeps 8d + 4f and 6d + 3f elements of each, and of 13,200 and 14,981 if it keeps what JAX does.
- 13B: two rows need less than in the paper: with 1024 and 2048 tokens LoRA takes 41.7 and 55.5 GiB under everything,
  LoRA-FA 36.0 and 45.3 (paper: 50, 71; 45, 62). 8 x 2048 tokens, in 77.1 and 63.9 GB, need more: 137.9 and 101.0.
  Under matmuls two rows need 37.3 and 46.4 GiB with LoRA, 36.0 and 45.0 with LoRA-FA.
- Twice the batch in 24 GB, from 2 rows to 4: not by LoRA-FA, at 1024 full tokens. 2 rows of LoRA and 4 of LoRA-FA
  need 23.8 and 26.1 GiB under everything, 21.0 and 25.9 under matmuls (for the H200).

e(2d + f) counts what only A's gradient reads; the 8,192 bytes beyond it are attention's output, which plain autodiff
keeps a second time as the input of o_proj (leaving out o saves 4 GiB).
"""

from __future__ import annotations

from experiments.memory import common
from experiments.memory.common import GIB
from experiments.memory.lora_fa_paper import T2, T3, T4, T6, T8, T9
from experiments.memory.lora_fa_steps import LAYERS, NAME, OURS, PAIRS, PLANS, Sizes, measure, without
from experiments.memory.lora_fa_verdicts import picture, verdicts

# One function per table.


def breakdown(of: Sizes) -> str:
    """T3: who owns the bytes, 7B, 16 x 1024 tokens, rank 64."""
    found = {pair: of(pair[1], pair[0])["bytes"] for pair in [*PAIRS, ("blocks", "lora"), ("blocks", "lora_fa")]}
    ours = {
        "model in bf16": "weights",
        "adapters": "adapters",
        "optimizer state": "optimizer",
        "gradients": "gradients",
        "activations": "activations",
        "workspace": "workspace",
        "total": "total",
    }
    paper = {**T3, "total": tuple(sum(column) for column in zip(*T3.values(), strict=True))}
    body = [
        [item, *paper.get(item, (None, None)), *(x[ours[item]] / GIB if item in ours else None for x in found.values())]
        for item in [*list(T3)[:5], "gradients", "activations", "workspace", "total"]
    ]
    return common.table(["", "paper LoRA", "paper FA", *OURS, "LoRA, blocks", "FA, blocks"], body)


def ranks(of: Sizes) -> str:
    """T4: LoRA on attention only, LoRA-FA on all linear maps, as in the paper's table."""
    where = {"lora": "attention", "lora_fa": "all-linear"}
    body = [
        [str(r), *paper, *(of.total(m, plan, rank=r, targets=where[m]) for plan, m in PAIRS)] for r, paper in T4.items()
    ]
    return common.table(["rank", "paper LoRA", "paper FA", *OURS], body)


def shares(of: Sizes) -> str:
    """T6: LoRA on all linear maps of the first or of the last layers; the paper doesn't say which it took."""
    body = []
    for i, paper in enumerate(T6):
        n = round(32 * (i + 1) / 10)
        parts = [of.total("lora", plan, layers=x) for plan in PLANS for x in (f"0:{n}", f"{32 - n}:32")]
        body.append([f"{10 * (i + 1)} % ({n})", paper, *parts])
    header = [f"{which}, {plan}" for plan in PLANS for which in ("first", "last")]
    return common.table(["layers", "paper LoRA", *header], body)


def modules(of: Sizes) -> str:
    """T8: which linear maps are adapted."""
    where = {"all": "all-linear", "only attention": "attention", "only MLP": "mlp"}
    where |= {item: without(item[3:]) for item in T8 if item.startswith("no ")}
    body = [[item, *T8[item], *(of.total(m, plan, targets=where[item]) for plan, m in PAIRS)] for item in T8]
    return common.table(["modules", "paper LoRA", "paper FA", *OURS], body)


def batches(of: Sizes) -> str:
    """T2, T9 and what lies between: both models, 1024 and 2048 tokens, batch 2 to 16."""
    known = {**T2, **T9, ("llama2-7b", 16, 2048): T8["all"]}
    body = []
    for geometry in LAYERS:
        for seq in (1024, 2048):
            for batch in (2, 4, 8, 16):
                paper = known.get((geometry, batch, seq), (None, None))
                totals = [of.total(m, plan, geometry=geometry, batch=batch, seq=seq) for plan, m in PAIRS]
                body.append([f"{geometry}, {batch} x {seq}", *paper, *totals])
    return common.table(["", "paper LoRA", "paper FA", *OURS], body)


TABLES = {
    "Who owns the bytes (T3): 16 x 1024 tokens, rank 64, all linear maps": breakdown,
    "Rank (T4): LoRA on attention, LoRA-FA on all linear maps, 16 x 1024 tokens": ranks,
    "Share of the layers (T6): 16 x 1024 tokens, rank 64, all linear maps": shares,
    "Modules (T8): 16 x 1024 tokens, rank 64": modules,
    "Model, batch, sequence (T2, T9): rank 64, all linear maps": batches,
}


HEAD = """# LoRA-FA's tables, compiled

GiB of one device at the peak of a train step: {target}, JAX {jax}, bfloat16 base and computation, float32 adapters and
Adam's state, one micro-batch, no padding, cuDNN attention, chunked loss. FA: LoRA-FA; paper: PyTorch. Plans, as for
`jaxpeft plan --save`: everything is plain autodiff, matmuls computes no matrix product twice, blocks runs layers again.
"""


def document(of: Sizes) -> str:
    """The tables, below what was found."""
    parts = [common.bullets(verdicts(of)), *(f"## {title}\n\n{draw(of)}" for title, draw in TABLES.items())]
    head = HEAD.format(
        target=of.target, jax=", ".join(sorted({row["jax"] for row in of.figures.rows}))
    )  # all are there
    return "\n".join([head, *parts])


if __name__ == "__main__":
    args = common.arguments(__doc__)
    of = Sizes(common.Figures(NAME, None if args.draw else measure), args.targets[0])
    common.write(f"{NAME}.md", document(of))
    picture(of).savefig(common.RESULTS / f"{NAME}.png")
