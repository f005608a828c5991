"""What does each form of a plan cost: our own loops, or `jax.checkpoint` under a policy?

    python -m experiments.memory.remat_forms                # compiles what the data lacks, under the JAX that runs it
    JAX_REMAT3=1 python -m experiments.memory.remat_forms   # under JAX 0.12: with the remat that it will have
    python -m experiments.memory.remat_forms --draw         # table from the data

The train step of LoRA, rank 64 on all linear maps, Llama-2-7B, batch 16 x 1024, bfloat16 base, float32 adapters and
Adam's state, under the plans `matmuls`, `blocks` and `offload`, by JAX 0.10 and 0.12. Data in
results/memory/remat_forms.json, table in remat_forms.md.

- Both forms keep the same bytes and compute the same products.
- h200: the policy's temporaries are larger by 1.9 to 2.4 GiB.
- v5p: the policy's temporaries are larger by 2.6 to 3.3 GiB.
- Under JAX_REMAT3 the peaks are those without it, to 0.1 MiB.
- The policy's compilation takes 0.7 to 1.1 times the loops' CPU seconds.

The loops take 2048 tokens at a time through a layer, the policy all 16384: what one layer computes, beside what is
kept, is that much larger. FLOPs are those of the trace, without what a compiler leaves out or computes again by itself.
JAX 0.10 initialises no model of ours under JAX_REMAT3 (it has no vmap of names there).
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

import jaxpeft as jp
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft.memory import aot, planner, targets
from jaxpeft.models import geometries

NAME = "remat_forms"
TITLE = "llama2-7b, train step of LoRA, rank 64 on all linear maps, batch 16 x 1024, bfloat16"
SIZES = {"geometry": "llama2-7b", "rank": 64, "batch_size": 16, "seq_len": 1024}
FORMS = ("loops", "policy")
PLANS = ("matmuls", "blocks", "offload")


def measure(key: common.Row) -> common.Row:
    """The step under a plan and a form, compiled."""
    config, method = geometries.load(key["geometry"]), jp.lora(rank=key["rank"])
    sizes = (key["batch_size"], key["seq_len"], key["save"], key["dtype"])
    step = planner.make_step(config, method, *sizes, packed=False, form=key["form"])
    traced = planner.cost(step)
    where = targets.target(key["target"])
    aot.compile(where, jnp.sin, jax.ShapeDtypeStruct((), jnp.float32))  # the compiler is loaded before it is timed
    start = time.process_time()
    compiled = aot.compile(where, step.function, *planner.placed(step), donate_argnums=0)
    return {
        "memory": {**compiled.memory._asdict(), "total": compiled.memory.total, "host": compiled.memory.host},
        "fits": compiled.fits,
        "kept": traced.activations,
        "flops": traced.flops,
        "recompute_flops": traced.recompute_flops,
        "seconds": round(time.process_time() - start, 1),
    }


Version = tuple[int, bool]  # JAX 0.x, and whether under JAX_REMAT3=1


def running() -> Version:
    """What runs this."""
    return jax.__version_info__[1], getattr(jax.config, "jax_remat3", False)


def measured(figures: common.Figures) -> list[Version]:
    """What the data is of."""
    return sorted({(row["minor"], row["remat3"]) for row in figures.rows})


def collect(figures: common.Figures, names: list[str], versions: list[Version]) -> list[common.Row]:
    """One figure per target, plan, version of JAX and form."""
    fixed = {**SIZES, "method": "lora", "dtype": "bfloat16"}
    return [
        figures(**fixed, target=target, save=plan, form=form, minor=minor, remat3=remat3)
        for target in names
        for plan in PLANS
        for minor, remat3 in versions
        for form in FORMS
    ]


def more(rows: list[common.Row]) -> dict[tuple[str, str, str], float]:
    """{(target, plan, version): GiB that the policy needs beyond the loops}."""
    own = {(row["target"], row["save"], version(row), row["form"]): row["memory"]["temporaries"] / GIB for row in rows}
    return {key[:3]: own[*key[:3], "policy"] - size for key, size in own.items() if key[3] == "loops"}


def version(row: common.Row) -> str:
    """As a reader knows it."""
    return row["jax"] + (", JAX_REMAT3" if row["remat3"] else "")


def table(rows: list[common.Row]) -> str:
    """A row for each figure."""
    header = ["target, plan, form", "JAX", "arguments", "temporaries", "peak", "in the host's memory", "TFLOP"]
    body = []
    for row in rows:
        size = {name: f"{row['memory'][name] / GIB:.2f}" for name in ("arguments", "temporaries", "total", "host")}
        line: list[str | None] = [f"{row['target']}, `{row['save']}`, {row['form']}", version(row), size["arguments"]]
        line += [size["temporaries"], size["total"] + ("" if row["fits"] else " (does not fit)")]
        line += [size["host"] if row["memory"]["host"] else None, f"{row['flops'] / 1e12:.0f}"]
        body.append([*line, f"{row['recompute_flops'] / row['flops']:.1%}", f"{row['seconds']:.0f}"])
    return common.table([*header, "recomputed", "compiled in, CPU s"], body)


def verdicts(rows: list[common.Row]) -> list[str]:
    """What the forms differ in, and what they do not."""
    pairs = [(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    same = all(a[name] == b[name] for a, b in pairs for name in ("kept", "flops", "recompute_flops"))
    said = [f"Both forms {'' if same else 'do NOT '}keep the same bytes and compute the same products."]
    for target in dict.fromkeys(row["target"] for row in rows):
        size = [size for key, size in more(rows).items() if key[0] == target]
        said.append(f"{target}: the policy's temporaries are larger by {min(size):.1f} to {max(size):.1f} GiB.")
    sizes = {(r["target"], r["save"], r["form"], r["minor"], r["remat3"]): r["memory"]["total"] for r in rows}
    if apart := [abs(size - sizes[*key[:4], False]) for key, size in sizes.items() if key[4]]:
        said.append(f"Under JAX_REMAT3 the peaks are those without it, to {max(apart) / 2**20:.1f} MiB.")
    ratio = [b["seconds"] / a["seconds"] for a, b in pairs]
    said.append(f"The policy's compilation takes {min(ratio):.1f} to {max(ratio):.1f} times the loops' CPU seconds.")
    return said


def document(rows: list[common.Row]) -> str:
    """The verdicts and the table."""
    versions = " and ".join(sorted({row["jax"] for row in rows}))
    head = f"# What each form of a plan costs\n\n{TITLE}; GiB; JAX {versions}.\n"
    return "\n".join([head, common.bullets(verdicts(rows)), table(rows)])


if __name__ == "__main__":
    args = common.arguments(__doc__, "h200,v5p")
    figures = common.Figures(NAME, None if args.draw else measure)
    if not args.draw:
        collect(figures, args.targets, [running()])
    common.write(f"{NAME}.md", document(collect(figures, args.targets, measured(figures))))
