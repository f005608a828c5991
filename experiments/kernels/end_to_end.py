"""How fast is a whole LoRA or QLoRA step, and how much memory does it take, beside peft with transformers?

    python -m experiments.kernels.end_to_end                # on a machine with an NVIDIA GPU of 80 GB
    python -m experiments.kernels.end_to_end --draw         # table from the data

Not measured yet: no GPU was at hand.

Llama-3.1-8B's geometry with random weights in bfloat16, adapters of rank 16 on all linear maps, AdamW, batch x sequence
of 1 x 4096 and 8 x 2048. Each configuration runs in a process of its own, so that its peak is its own: `ours` under the
memory plans matmuls and blocks, with the kernels and without (xla), peft eager and compiled (torch.compile), each with
and without gradient checkpointing; QLoRA with NF4 and double quantization (bitsandbytes for peft). Tokens per second
are of the median of ten steps after three, peak memory as each allocator counts it. The roofline is measured in the
same run: the rate of an 8192^3 bfloat16 product and the bandwidth of a copy. `--profile DIR` writes a trace of one of
our steps (jax.profiler). Data in results/kernels/end_to_end.json, table in end_to_end.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.memory.common import table

RESULTS = Path(__file__).resolve().parent.parent / "results/kernels"
SIZES = ((1, 4096), (8, 2048))
GEOMETRY, RANK, WARM, STEPS = "llama3.1-8b", 16, 3, 10
OURS = [(save, kernels) for save in ("matmuls", "blocks") for kernels in ("kernels", "xla")]
THEIRS = [(mode, save) for mode in ("eager", "compile") for save in ("kept", "checkpointing")]


def ours(base: str, rows: int, length: int, save: str, kernels: str, geometry: str = GEOMETRY, profile: str = ""):
    """{"seconds" of the steps, "peak" bytes} of a step of this library; base is "bfloat16" or "nf4"."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jaxpeft as jp
    from jaxpeft import tree
    from jaxpeft.models import family, geometries
    from pallas_kernels import packed, platform

    config = geometries.load(geometry)
    model = family(config).from_hf(config, jnp.bfloat16)
    batch = tokens_of(rows, length, config["vocab_size"])

    def start(key):
        params = tree.flatten(model.init(key, {}))
        params = {path: leaf.astype(jnp.bfloat16) for path, leaf in params.items()}
        if base == "nf4":
            for path in [p for p in params if p.endswith("/kernel") and params[p].ndim == 3]:
                params[path] = jax.lax.map(packed.quantize, params[path])
        return tree.unflatten(params)

    params = jax.jit(start)(jax.random.key(0))
    method = jp.lora(rank=RANK)
    adapted, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    optimizer = optax.adamw(1e-4)
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(2))
    del params, trainable, frozen
    with platform.forced(None if kernels == "kernels" else "xla"):
        step = jax.jit(jp.make_train_step(jp.remat(adapted, save), method, optimizer), donate_argnums=0)
        compiled = step.lower(state, batch).compile()
    seconds = []
    for i in range(WARM + STEPS):
        if profile and i == WARM + STEPS - 1:
            jax.profiler.start_trace(profile)
        begin = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - begin)
    if profile:
        jax.profiler.stop_trace()
    statistics_ = jax.devices()[0].memory_stats() or {}
    assert np.isfinite(loss)
    return {"seconds": seconds[WARM:], "peak": statistics_.get("peak_bytes_in_use")}


def tokens_of(rows: int, length: int, vocabulary: int) -> dict[str, Any]:
    """A batch of whole rows of random tokens, each of which predicts the next."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(3, vocabulary, (rows, length), dtype=np.int32)
    weights = np.ones((rows, length), np.float32)
    weights[:, -1] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": weights}


def theirs(base: str, rows: int, length: int, mode: str, save: str, geometry: str = GEOMETRY):
    """The same of peft with transformers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from jaxpeft.models import geometries

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = LlamaConfig(**geometries.load(geometry))
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(settings)
        torch.set_default_dtype(torch.float32)
    if base == "nf4":
        model = quantized(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    if save == "checkpointing":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    run = torch.compile(model) if mode == "compile" else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    tokens = torch.tensor(tokens_of(rows, length, settings.vocab_size)["tokens"], device=device, dtype=torch.long)
    seconds = []
    for _ in range(WARM + STEPS):
        begin = time.perf_counter()
        loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds": seconds[WARM:], "peak": peak}


def quantized(model):
    """The model with bitsandbytes' NF4 layers, doubly quantized, in place of its layers' linear maps."""
    import bitsandbytes as bnb
    import torch

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            parent = model.get_submodule(name.rpartition(".")[0])
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            setattr(parent, name.rpartition(".")[2], new.to(module.weight.device))
    return model


def roofline() -> dict[str, float]:
    """{"flops": per second of an 8192^3 bfloat16 product, "bandwidth": bytes per second of a copy}, in JAX."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import timing

    n = 8192
    x = jnp.ones((n, n), jnp.bfloat16)
    big = jnp.ones((2**30,), jnp.bfloat16)
    multiply, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    times = timing.paired({"multiply": lambda: multiply(x), "copy": lambda: copy(big)}, rounds=10, inner=5)
    return {"flops": 2 * n**3 / times.median("multiply"), "bandwidth": 2 * big.nbytes / times.median("copy")}


def configurations():
    """(base, rows, length, side, how, how)."""
    for base in ("bfloat16", "nf4"):
        for rows, length in SIZES:
            yield from ((base, rows, length, "ours", *how) for how in OURS)
            yield from ((base, rows, length, "peft", *how) for how in THEIRS)


def one(argument: str) -> dict[str, Any]:
    """What a process of its own measures."""
    if argument == "roofline":
        return roofline()
    base, rows, length, side, *how = json.loads(argument)
    return (ours if side == "ours" else theirs)(base, rows, length, *how)


def in_a_process(argument: str) -> dict[str, Any]:
    """`one(argument)` in a process of its own; {"failed": last line} where that fails, as for want of memory."""
    command = [sys.executable, "-m", "experiments.kernels.end_to_end", "--one", argument]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def document(found: dict[str, Any]) -> str:
    """Tokens per second and peak memory, and the rates over peft's best at the same size."""
    rows = found["rows"]
    rate = lambda row: row["rows"] * row["length"] / statistics.median(row["seconds"])
    body = []
    for row in rows:
        words = [row["base"], f"{row['rows']} x {row['length']}", row["side"], *row["how"]]
        if "failed" in row:
            body.append([*words, "", "", row["failed"]])
            continue
        peers = [r for r in rows if r["side"] == "peft" and "seconds" in r]
        peers = [
            rate(r) for r in peers if (r["base"], r["rows"], r["length"]) == (row["base"], row["rows"], row["length"])
        ]
        ratio = f"{rate(row) / max(peers):.2f}" if peers else ""
        body.append([*words, f"{rate(row):,.0f}", "" if row["peak"] is None else row["peak"] / 2**30, ratio])
    header = ["base", "batch", "side", "", "", "tokens/s", "peak, GiB", "over peft's fastest"]
    limits = found["roofline"]
    where = f"{found['device']}, JAX {found['jax']}, torch {found['torch']}, peft {found['peft']}"
    text = f"# {GEOMETRY}, LoRA rank {RANK} ({where})\n\n"
    text += f"Measured: {limits['flops'] / 1e12:.0f} TFLOP/s, {limits['bandwidth'] / 1e12:.2f} TB/s.\n\n"
    return text + table(header, body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the data; measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--profile", help="a folder for a trace of one of our steps; nothing else is measured")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return 0
    file = RESULTS / "end_to_end.json"
    if not args.draw:
        from pallas_kernels import timing

        where = timing.environment()
        if where["platform"] != "gpu":
            print("experiments.kernels.end_to_end: no NVIDIA GPU is attached to JAX", file=sys.stderr)
            return 2
        if args.profile:
            ours("bfloat16", 8, 2048, "matmuls", "kernels", profile=args.profile)
            return 0
        import peft
        import torch

        found: dict[str, Any] = {**where, "torch": torch.__version__, "peft": peft.__version__}
        found |= {"roofline": in_a_process("roofline"), "rows": []}
        RESULTS.mkdir(parents=True, exist_ok=True)
        for base, rows, length, side, *how in configurations():
            row = {"base": base, "rows": rows, "length": length, "side": side, "how": how}
            found["rows"].append({**row, **in_a_process(json.dumps([base, rows, length, side, *how]))})
            file.write_text(json.dumps(found, indent=1))
    if not file.exists():
        print(f"experiments.kernels.end_to_end: {file.name} does not exist yet; measure first", file=sys.stderr)
        return 2
    (RESULTS / "end_to_end.md").write_text(document(json.loads(file.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
