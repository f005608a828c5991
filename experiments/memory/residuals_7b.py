"""How close is what a plan keeps to the least that it could keep?

    python -m experiments.memory.residuals_7b           # compiles what the data lacks; all of it in about 10 minutes
    python -m experiments.memory.residuals_7b --draw    # tables from the data

The reference step is value and gradient of the chunked cross-entropy of Llama-2-7B, batch 16 x 1024, bfloat16, adapters
too, rank 64 on all linear maps, no optimizer. Without a matrix product computed twice a layer keeps, per token, its
input, q, k, v, attention's output, the stream after it (2d bytes each), gate and up (2f each): 12d + 4f. Here o_proj's
product is kept in place of the stream after attention, which is its sum with the input. Figures are in
results/memory/residuals_7b.json, by plan and by name in residuals_7b.md.

- 31 of 32 plans need at most the temporaries that were asked for. Not v5p, lora, compressed12.
- h200, LoRA: 46.45 GiB under matmuls, everything 70.7. Of 94,208 bytes kept per token and layer 93,184 are the floor,
  896 the low-rank products, 128 attention's log-sum-exp; the rest is 0.45 GiB in all (0.45 to 0.48 under the 8
  plans). 32 more layers under blocks cost 4.04 GiB, their inputs being 4.00.
- v5p, LoRA: 46.56 GiB under matmuls, everything 71.4. Of 94,208 bytes kept per token and layer 93,184 are the floor,
  896 the low-rank products, 128 attention's log-sum-exp; the rest is 0.56 GiB in all (0.53 to 0.90 under the 8
  plans). 32 more layers under blocks cost 3.95 GiB, their inputs being 4.00.

What stands in the way of the floor, which is exceeded by 1.1 % in what is kept: low-rank products and log-sum-exps
could be computed again, the former from the layer's input at the price of the low-rank maps' products, the latter with
attention. The rest hardly grows with depth: the gradient of the stream (128 MiB) and what one layer computes for 2048
tokens (43 MiB an array of the MLP's; tokens=... in a plan sets how many); residuals_7b.md lists the largest. Below the
floor there is only what compresses, offloads or recomputes products. `compressed` and `compressed4` compute attention
again by themselves, from the rounded q, k, v.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import tree
from jaxpeft.backward import residuals
from jaxpeft.backward.segments import recorded
from jaxpeft.memory import aot, profile, targets
from jaxpeft.memory.owners import Owner, Owners
from jaxpeft.method import Method, view_of
from jaxpeft.models import family, geometries
from jaxpeft.train.loss import completion_loss

NAME = "residuals_7b"
METHODS: dict[str, Callable[..., Method]] = {"lora": jp.lora, "lora_fa": jp.lora_fa}
PLANS = (
    "everything",
    "matmuls",
    "matmuls,attention=recompute",
    "compressed",
    "compressed,attention=recompute",
    "compressed12",
    "compressed4",
    "offload",
    "blocks",
)
TITLE = "llama2-7b, batch 16 x 1024, bfloat16, rank 64 on all linear maps, value and gradient, no optimizer"
LAYERS, D, F = 32, 4096, 11008
REST = ("workspace", "loss", "alignment", "fragmentation", "unattributed")  # of what is live at the peak
FLOOR = 12 * D + 4 * F  # bytes per token and layer
# GiB of temporaries at most, as set before the work began; (v5p, h200).
GOALS = {
    "matmuls": (46.8, 46.8),
    "matmuls,attention=recompute": (42.8, 42.8),
    "compressed": (30.5, 30.5),
    "compressed,attention=recompute": (27.0, 27.0),
    "compressed12": (35.5, 35.5),
    "compressed4": (15.0, 15.0),
    "offload": (14.0, 14.0),
    "blocks": (8.6, 9.9),
}


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """Every plan for every target and method, `blocks` with twice the layers too."""
    fixed = {"geometry": "llama2-7b", "rank": 64, "batch_size": 16, "seq_len": 1024, "dtype": "bfloat16"}
    return [
        figures(**fixed, target=target, method=method, save=plan, layers=layers)
        for target in names
        for plan, layers in [*((plan, LAYERS) for plan in PLANS), ("blocks", 2 * LAYERS)]
        for method in METHODS
    ]


def reference(key: common.Row) -> tuple[Any, tuple[Any, ...], Owners]:
    """(function, its arguments, their owners): value and gradient of the chunked cross-entropy under a plan.

    Every floating leaf is in the key's dtype; there is no optimizer.
    """
    dtype = jnp.dtype(key["dtype"])
    config = {**geometries.load(key["geometry"]), "num_hidden_layers": key["layers"]}
    method = METHODS[key["method"]](rank=key["rank"])
    base = family(config).from_hf(config, dtype)
    model = residuals.remat(method.forward(base, view_of(base, method, {})), key["save"])
    params = jax.eval_shape(lambda k: model.init(k, {}), jax.random.key(0))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), params
    )
    trainable, frozen = tree.split(params, method.trainable)
    shape = (key["batch_size"], key["seq_len"])
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets")}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)

    def step(trainable, frozen, batch):
        return jax.value_and_grad(lambda t: completion_loss(model, tree.combine(t, frozen), batch)[0])(trainable)

    own = tree.flatten(jax.eval_shape(lambda k: base.init(k, {}), jax.random.key(0)))
    of = {path: Owner("weights" if path in own else "adapters", path) for path in {**trainable, **frozen}}
    order = [*sorted(trainable), *sorted(frozen), *sorted(batch)]
    results = [Owner("loss", "loss"), *(Owner("gradients", path) for path in sorted(trainable))]
    owners = Owners([of.get(name, Owner("batch", name)) for name in order], results, [f"['{name}']" for name in order])
    return step, (trainable, frozen, batch), owners


def measure(key: common.Row) -> dict[str, Any]:
    """Temporaries of the reference step, what it keeps, and what is live beside at the peak."""
    step, args, owners = reference(key)
    with recorded() as segments:
        jax.eval_shape(step, *args)
    with tempfile.TemporaryDirectory() as dump:
        memory = aot.compile(targets.target(key["target"]), step, *args, dump=dump).memory
        peak = profile.table(profile.read(Path(dump), owners), 1000)
    rest = {f"{row['category']}: {row['owner']}": row["bytes"] for row in peak if row["category"] in REST}
    kept = segments["layers"].kept_bytes() if segments else {}
    rest = {name: size for name, size in rest.items() if size >= 2**22}
    return {"memory": {**memory._asdict(), "total": memory.total}, "kept": kept, "rest": rest}


def device_bytes(row: common.Row) -> int:
    """Bytes that the plan keeps on the device."""
    return sum(row["kept"]["device"].values())


def per_token(size: float, row: common.Row) -> float:
    """Bytes per token and layer."""
    return size / (row["layers"] * row["batch_size"] * row["seq_len"])


def totals(rows: list[common.Row]) -> str:
    """Temporaries, the goal that was set, and how far what is kept is from the floor."""
    header = [
        "",
        "temporaries, GiB",
        "at most",
        "host, GiB",
        "kept, B per token and layer",
        "of the floor",
        "rest, GiB",
    ]
    body = []
    for row in rows:
        memory, name = row["memory"], f"{row['target']}, {row['method']}, `{row['save']}`"
        line = [name if row["layers"] == LAYERS else f"{name}, {row['layers']} layers", memory["temporaries"] / GIB]
        goal = GOALS.get(row["save"]) if row["layers"] == LAYERS else None
        line += [goal[row["target"] == "h200"] if goal else None, memory["host_temporaries"] / GIB]
        if row["kept"]:
            own = per_token(device_bytes(row), row)
            rest = (memory["temporaries"] - device_bytes(row)) / 2**20
            line += [f"{own:,.0f}", f"{own / FLOOR:.3f}", f"{rest / 1024:.2f}"]
        else:
            own = per_token(memory["temporaries"], row)
            line += [f"{own:,.0f} (all temporaries)", f"{own / FLOOR:.3f}", None]
        body.append(line)
    return common.table(header, body)


def names(rows: list[common.Row]) -> str:
    """What each plan keeps by name, in bytes per token and layer; what lies in the host's memory in brackets."""
    rows = [row for row in rows if row["method"] == "lora" and row["kept"] and row["layers"] == LAYERS]
    rows = [row for row in rows if row["target"] == rows[0]["target"]]
    every = list(dict.fromkeys(name for row in rows for where in row["kept"].values() for name in where))

    def cell(row, name):
        device, host = (row["kept"][where].get(name) for where in ("device", "host"))
        size = device or host
        return None if size is None else f"{per_token(size, row):,.0f}" if device else f"({per_token(size, row):,.0f})"

    body = [[f"`{row['save']}`", *(cell(row, name) for name in every)] for row in rows]
    return common.table(["LoRA", *every], body)


def rests(rows: list[common.Row]) -> str:
    """What lives at the peak beside arguments, results and what is kept: the five largest owners."""
    body = []
    for row in rows:
        if row["method"] == "lora" and row["kept"] and row["layers"] == LAYERS:
            largest = sorted(row["rest"].items(), key=lambda item: -item[1])[:5]
            words = [
                f"{name.partition(': ')[2] or name.partition(':')[0]} {size / 2**20:.0f}" for name, size in largest
            ]
            body.append(
                [f"{row['target']}, `{row['save']}`", f"{sum(row['rest'].values()) / 2**20:,.0f}", ", ".join(words)]
            )
    return common.table(["LoRA", "beside what is kept, MiB", "largest owners"], body)


def verdicts(rows: list[common.Row]) -> list[str]:
    """What was asked for, and what stands between the compiler's figures and the floor."""
    whole = [row for row in rows if row["layers"] == LAYERS]
    asked = [(row, GOALS[row["save"]][row["target"] == "h200"]) for row in whole if row["save"] in GOALS]
    over = [row for row, most in asked if row["memory"]["temporaries"] > most * GIB]
    text = [
        f"{len(asked) - len(over)} of {len(asked)} plans need at most the temporaries that were asked for."
        + "".join(f" Not {row['target']}, {row['method']}, {row['save']}." for row in over)
    ]
    for name in dict.fromkeys(row["target"] for row in rows):
        own = {(row["method"], row["save"], row["layers"]): row for row in rows if row["target"] == name}
        temporaries = {key: row["memory"]["temporaries"] / GIB for key, row in own.items()}
        row = own["lora", "matmuls", LAYERS]
        kept = row["kept"]["device"]
        low, lse = (per_token(kept[part], row) for part in ("lora_low", "attention_lse"))
        rest = {
            plan: temporaries["lora", plan, LAYERS] - device_bytes(own["lora", plan, LAYERS]) / GIB
            for plan in PLANS[1:]
            if ("lora", plan, LAYERS) in own
        }
        added = temporaries["lora", "blocks", 2 * LAYERS] - temporaries["lora", "blocks", LAYERS]
        text.append(
            f"{name}, LoRA: {temporaries['lora', 'matmuls', LAYERS]:.2f} GiB under matmuls, everything "
            f"{temporaries['lora', 'everything', LAYERS]:.1f}. Of {per_token(device_bytes(row), row):,.0f} bytes kept "
            f"per token and layer {FLOOR:,} are the floor, {low:.0f} the low-rank products, {lse:.0f} attention's "
            f"log-sum-exp; the rest is {rest['matmuls']:.2f} GiB in all ({min(rest.values()):.2f} to "
            f"{max(rest.values()):.2f} under the {len(rest)} plans). 32 more layers under blocks cost {added:.2f} "
            "GiB, their inputs being 4.00."
        )
    return text


def document(rows: list[common.Row]) -> str:
    """The verdicts and both tables."""
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    head = f"# The 7B reference step\n\n{TITLE}; temporaries in GiB; JAX {jax}.\n"
    return "\n".join([head, common.bullets(verdicts(rows)), totals(rows), names(rows), rests(rows)])


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document, targets="h200,v5p")
