"""How fast is a LoRA layer beside its frozen product, fused, unfused, and in PyTorch's peft?

    python -m experiments.kernels.layers                          # on a machine with an NVIDIA GPU
    python -m experiments.kernels.layers --draw                   # table from the data

Not measured yet: no GPU was at hand. Goals: at 8,192 tokens and more and ranks 16 and 64, ours over the frozen product
at most 1.05 forward, 1.08 with the backward pass; peft over ours at least 1.39 with the backward pass (the best of
Zhu et al. 2025, "LoRAFusion"); NF4 at least 0.8 of the bfloat16 kernel's rate.

For the linear maps of Llama-2-7B, Llama-3-8B and 70B, bfloat16, in one process: (frozen) x W alone in JAX; (xla) LoRA
in plain JAX; (ours) lora_matmul; (nf4) quant_lora_matmul; (peft) peft's LoRA layer on the same GPU with adapters in
bfloat16, no dropout. `forward` is y, `both` adds dx (for LoRA also dA and dB). The functions take turns; figures are
medians and quartiles of the ratios within a turn (pallas_kernels/timing.py). PyTorch needs a CUDA build
(`pip install torch peft`), and JAX must not take all memory: XLA_PYTHON_CLIENT_PREALLOCATE=false is set here. Data in
results/kernels/layers.json, table in layers.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.memory.common import table
from pallas_kernels import timing
from pallas_kernels.lora_matmul import bench as dense
from pallas_kernels.lora_matmul.shapes import MODELS, Shape
from pallas_kernels.quant_lora_matmul import bench as quantized

RESULTS = Path(__file__).resolve().parent.parent / "results/kernels"
GRID = {"model": ("llama2-7b", "llama3-8b", "llama3-70b"), "rank": (8, 16, 64, 256), "rows": (2048, 8192, 16384, 65536)}


def peft_functions(shape: Shape, rank: int, rows: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """{pass: function} of peft's LoRA layer, on the GPU if there is one."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    base = torch.nn.Linear(shape.n, shape.m, bias=False, device=device, dtype=kind).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    try:
        layer = Linear(base, "default", config=config, r=rank, lora_alpha=2 * rank)
    except TypeError:  # peft before 0.19 takes the fields alone
        layer = Linear(base, "default", r=rank, lora_alpha=2 * rank)
    layer = layer.to(device=device, dtype=kind)
    x = torch.randn(rows, shape.n, device=device, dtype=kind, requires_grad=True)
    dy = torch.randn(rows, shape.m, device=device, dtype=kind)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def both():
        y = layer(x)
        torch.autograd.grad(y, trained, dy)
        return y

    def forward():
        with torch.no_grad():
            return layer(x)

    return {"forward": forward, "both": both}


def measure(model: str, shape: Shape, rank: int, rows: int, rounds: int, inner: int) -> list[dict[str, Any]]:
    """A row for each pass."""
    groups = dense.functions(shape, rank, rows, jnp.bfloat16)
    packed = quantized.functions(shape, rank, rows, jnp.bfloat16)
    theirs = peft_functions(shape, rank, rows)
    found = []
    for name, group in groups.items():
        group = {**group, "nf4": packed[name]["nf4"], "peft": theirs[name]}
        key = {"model": model, "map": shape.name, "n": shape.n, "m": shape.m, "rank": rank, "rows": rows, "pass": name}
        found.append({**key, "seconds": timing.paired(group, rounds, inner).seconds})
    return found


def document(found: dict[str, Any]) -> str:
    """Medians of the ratios, with the quartiles of ours."""
    body = []
    for row in found["rows"]:
        times = timing.Times(row["seconds"])
        low, ours, high = times.ratio("ours", "frozen")
        cells = [
            f"{times.ratio(name, to)[1]:.3f}" for name, to in (("xla", "frozen"), ("peft", "ours"), ("nf4", "ours"))
        ]
        own = [f"{1e3 * times.median('frozen'):.3f}", f"{ours:.3f} ({low:.3f} to {high:.3f})"]
        body.append([row["model"], row["map"], row["rank"], row["rows"], row["pass"], *own, *cells])
    header = [
        "model",
        "map",
        "rank",
        "rows",
        "pass",
        "frozen, ms",
        "ours/frozen",
        "xla/frozen",
        "peft/ours",
        "nf4/ours",
    ]
    where = ", ".join(f"{key} {found[key]}" for key in ("device", "jax", "torch", "peft"))
    return f"# LoRA layers, bfloat16 ({where})\n\n" + table(header, body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the data; measure nothing")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--inner", type=int, default=5)
    for name, values in GRID.items():
        parser.add_argument(f"--{name}", default=",".join(map(str, values)), help="with commas")
    args = parser.parse_args()
    file = RESULTS / "layers.json"
    if not args.draw:
        if jax.devices()[0].platform != "gpu":
            print("experiments.kernels.layers: no NVIDIA GPU is attached to JAX", file=sys.stderr)
            return 2
        import peft
        import torch

        rows: list[dict[str, Any]] = []
        for model, rank, count in itertools.product(args.model.split(","), args.rank.split(","), args.rows.split(",")):
            for shape in MODELS[model]:
                rows += measure(model, shape, int(rank), int(count), args.rounds, args.inner)
        versions = {"torch": torch.__version__, "peft": peft.__version__}
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**timing.environment(), **versions, "rows": rows}, indent=1))
    if not file.exists():
        print(f"experiments.kernels.layers: {file.name} does not exist yet; measure first", file=sys.stderr)
        return 2
    (RESULTS / "layers.md").write_text(document(json.loads(file.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
