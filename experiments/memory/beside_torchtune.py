"""Llama-3.1-8B on one RTX 4090, beside the figure that torchtune gives.

    python -m experiments.memory.beside_torchtune           # compiles what the data lacks: ten minutes
    python -m experiments.memory.beside_torchtune --draw    # table from the data

torchtune's README of September 2024 (commit 30b8519e8) says 16.2 GiB for LoRA on a 4090: 2 rows of 2048 packed tokens,
compiled. Its recipe of that commit (`llama3_1/8B_lora_single_device`) trains rank 8 on q_proj and v_proj alone, 3.4 M
numbers, in bfloat16 with their gradients and AdamW's moments; block inputs are kept, or offloaded by a flag. By hand:

    GiB     weights    what trains, gradients, moments    block inputs    logits of 4,096 tokens    together
    kept      14.96                               0.03            1.00                      0.98       16.96
    offloaded 14.96                               0.03            0.00                      0.98       15.96

so that 16.2 leaves room for offloaded inputs, not for kept ones; which flags were set the README does not say.

Ours: the train step with Adam, bfloat16 weights, where what trains is float32, with gradients and moments (16 bytes a
number). With the same sites 16.66 GiB with inputs kept, 15.67 offloaded; with the MLP 512 tokens at a time 15.86 with
inputs in 4 bits, 15.54 offloaded. On all seven maps that is 21 M numbers and
0.31 GiB, on q_proj and v_proj 3.4 M and 0.05. Table in results/memory/beside_torchtune.md, data in
beside_torchtune.json.
"""

from __future__ import annotations

import jaxpeft as jp
from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries
from jaxpeft.train.memory import CATEGORIES

NAME = "beside_torchtune"
STEP = {"geometry": "llama3.1-8b", "batch_size": 2, "seq_len": 2048, "dtype": "bfloat16", "target": "rtx4090"}
SITES = {"all-linear": "all seven maps", "qv": "q_proj, v_proj"}
SAVES = {
    "blocks": "kept",
    "blocks,block_input=offload": "offloaded",
    "blocks,block_input=offload,tile=512": "offloaded, the MLP 512 tokens at a time",
    "blocks,block_input=compress12,tile=512": "in 12 bits, the MLP 512 tokens at a time",
    "blocks,block_input=compress4,tile=512": "in 4 bits, the MLP 512 tokens at a time",
}
STEPS = [
    ("qv", "blocks"),
    ("qv", "blocks,block_input=offload"),
    ("qv", "blocks,block_input=offload,tile=512"),
    ("qv", "blocks,block_input=compress12,tile=512"),
    ("qv", "blocks,block_input=compress4,tile=512"),
    ("all-linear", "blocks"),
    ("all-linear", "blocks,block_input=offload"),
]


def measure(key: common.Row) -> common.Row:
    """A step's bytes by owner, as `jaxpeft plan` gives them."""
    config, method = geometries.load(key["geometry"]), jp.lora(rank=8, targets=key["sites"])
    sizes = (key["batch_size"], key["seq_len"])
    step = planner.make_step(config, method, *sizes, key["save"], key["dtype"], packed=False)
    made = planner.row(step, targets.target(key["target"]))
    return {name: made[name] for name in ("bytes", "device_bytes", "fits")}


def collect(figures: common.Figures) -> list[common.Row]:
    """A figure for each choice of sites and of where block inputs are."""
    return [figures(**STEP, sites=sites, save=save) for sites, save in STEPS]


def document(rows: list[common.Row]) -> str:
    """The table under its title."""
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    body = [
        [f"{SITES[row['sites']]}; block inputs {SAVES[row['save']]}"]
        + [f"{row['bytes'].get(name, 0) / GIB:.2f}" for name in (*CATEGORIES, "total")]
        for row in rows
    ]
    head = f"# {STEP['geometry']}, LoRA of rank 8, 2 x 2048 tokens, bfloat16, on an RTX 4090\n\nGiB; JAX {jax}.\n"
    return f"{head}\n{common.table(['sites', *CATEGORIES, 'total'], body)}"


if __name__ == "__main__":
    args = common.arguments(__doc__, "rtx4090")
    rows = collect(common.Figures(NAME, None if args.draw else measure))
    common.write(f"{NAME}.md", document(rows))
