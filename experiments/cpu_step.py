"""A LoRA step on a CPU beside torch's: which type is the better default there?

    python -m experiments.cpu_step           # ten minutes on two CPU cores; needs the extra `test`
    python -m experiments.cpu_step --draw    # table from the data

float32: 8.6 CPU seconds where bfloat16 takes 10.9 (SmolLM2-135M, 2 x 256 tokens), 1.15 and 1.25 on the embedded model.
Beside torch in float32 that is 0.93 and 1.12 of its time, 0.88 for 30M, on a processor of AMD's with AVX2; in bfloat16,
for which that processor has no instructions, 0.06 (30M). The products that such a step cannot do without, alone, with
XLA's kernels, take 0.59 of torch's whole step (0.55 for 30M): half of its time cannot be reached there in float32. On
one of Intel's with AMX, busy with other work, a step of 30M took 0.17 of torch's time in float32 and 0.23 in bfloat16,
of which much was torch's threads that wait by spinning.

Each side is a process of its own that takes the same steps: LoRA of rank 8 on every linear map, AdamW, random tokens
of full length, everything kept for the backward pass. torch's side is transformers with peft, eager, `sdpa` attention,
on the same weights. Seconds are of CPU, of all threads, per step: the median of STEPS after two that are not counted;
the sides take turns, ROUNDS times. Weights of SmolLM2-135M-Instruct are its 4-bit release, dequantized, which does not
bear on speed; torch's bfloat16 step on it, minutes long, is left out. Data in results/cpu_step/cpu_step.json, table in
cpu_step.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.memory.common import table

RESULTS = Path(__file__).resolve().parent / "results/cpu_step"
# Name -> rows and tokens of a row.
MODELS = {"embedded, 4M": (8, 256), "30M": (2, 256), "SmolLM2-135M-Instruct": (2, 256)}
PRODUCTS = "XLA's products alone"
SIDES = [(library, dtype) for library in ("jaxpeft", "torch") for dtype in ("float32", "bfloat16")]
SIDES += [(PRODUCTS, "float32")]
LEFT_OUT = {("SmolLM2-135M-Instruct", "torch", "bfloat16")}
STEPS, ROUNDS, RANK, RATE = 3, 2, 8, 1e-4
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tokens(rows: int, length: int, vocabulary: int) -> Any:
    """Random ids, the same for both sides: (rows, length) int32."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (rows, length), dtype=np.int32)


def ours(folder: str, dtype: str, rows: int, length: int) -> Callable[[], Any]:
    """A step of this library's, as `jaxpeft train --save everything` compiles it."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxpeft as jp

    base, params = jp.load_pretrained(folder, dtype)
    method = jp.lora(rank=RANK)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    optimizer = optax.adamw(RATE)
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    step = jax.jit(jp.make_train_step(model, method, optimizer, jp.completion_loss), donate_argnums=0)
    ids = tokens(rows, length, base.config.vocab_size)
    batch = {
        "tokens": jnp.asarray(ids),
        "targets": jnp.asarray(ids),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape),
        "segment_ids": jnp.ones(ids.shape, jnp.int32),
        "loss_weights": jnp.ones(ids.shape, jnp.float32),
    }

    def once() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return once


def theirs(folder: str, dtype: str, rows: int, length: int) -> Callable[[], Any]:
    """A step of transformers' model with peft's adapter."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEAR), lora_dropout=0.0)
    model = peft.get_peft_model(base, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    ids = torch.tensor(tokens(rows, length, base.config.vocab_size), dtype=torch.long)

    def once() -> Any:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return once


def products(folder: str, dtype: str, rows: int, length: int) -> Callable[[], Any]:
    """The products that a step cannot do without: with the frozen kernels forward and back, and with the head."""
    import jax
    import jax.numpy as jnp

    from jaxpeft import hf

    config = hf.load_config(folder)
    d, f, head = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d * config["num_key_value_heads"] // config["num_attention_heads"]
    maps = [(d, d), (d, d), (d, kv), (d, kv), (d, f), (d, f), (f, d)] * config["num_hidden_layers"] + [(d, head)]

    @jax.jit
    def there_and_back(x: Any, kernel: Any) -> Any:
        y = x @ kernel
        return jax.lax.optimization_barrier(y) @ kernel.T

    given = {shape: (jnp.ones((rows * length, shape[0]), dtype), jnp.ones(shape, dtype)) for shape in set(maps)}
    return lambda: [there_and_back(*given[shape]).block_until_ready() for shape in maps]


def measure_here(folder: str, library: str, dtype: str, rows: int, length: int) -> float:
    """Seconds of CPU of a step, in this process."""
    once = {"jaxpeft": ours, "torch": theirs, PRODUCTS: products}[library](folder, dtype, rows, length)
    for _ in range(2):
        once()
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        once()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _written(name: str, folder: str) -> str:
    """The folder of a model, which is written there unless it lies in the package; of 30M weights are random."""
    import jaxpeft as jp
    from experiments.traffic.planned_cpu import SMALL
    from jaxpeft import assets, hf

    if name == "embedded, 4M":
        return str(assets.MODEL)
    if name == "30M":
        import transformers

        config = transformers.LlamaConfig(**{key: value for key, value in SMALL.items() if key != "model_type"})
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        return folder
    params = jp.load_pretrained(assets.smollm2(), "float32")[1]
    jp.save_pretrained(folder, hf.load_config(assets.smollm2()), params)
    return folder


def measure(name: str, rounds: int, wanted: list[str]) -> list[dict[str, Any]]:
    """A row for each side of a model that is wanted, with the seconds of every round."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found = []
    for rows, length in [MODELS[name]]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = _written(name, f"{temporary}/model")
            sides = [side for side in SIDES if (name, *side) not in LEFT_OUT and side[0] in wanted]
            seconds: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side in sides:
                    flags = [folder, *side, str(rows), str(length)]
                    command = [sys.executable, "-m", "experiments.cpu_step", "--here", *flags]
                    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
                    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
                    seconds[side].append(float(said.stdout.split()[-1]))
                    print(name, side, seconds[side][-1], file=sys.stderr, flush=True)
            load = round(os.getloadavg()[1], 1)
            sizes = {"model": name, "rows": rows, "length": length}
            found += [
                {**sizes, "library": library, "dtype": dtype, "cpu_seconds": each, "load": load}
                for (library, dtype), each in seconds.items()
            ]
    return found


def draw(rows: list[dict[str, Any]]) -> str:
    """The table; the last column is the ratio to torch in the same type."""
    at = {(row["model"], row["library"], row["dtype"]): statistics.median(row["cpu_seconds"]) for row in rows}

    def of_torch(row: dict[str, Any]) -> str:
        theirs = at.get((row["model"], "torch", row["dtype"]))
        return "" if theirs is None else f"{at[row['model'], row['library'], row['dtype']] / theirs:.2f}"

    body = [
        [
            f"{row['model']}, {row['rows']} x {row['length']}",
            row["library"],
            row["dtype"],
            f"{at[row['model'], row['library'], row['dtype']]:.2f}",
            f"{min(row['cpu_seconds']):.2f} to {max(row['cpu_seconds']):.2f}",
            of_torch(row),
        ]
        for row in rows
    ]
    return table(["model", "library", "type", "CPU seconds of a step", "range", "of torch's"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="make the table from the data alone")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="models to measure; others stay as they are")
    sides = list(dict.fromkeys(library for library, _ in SIDES))
    parser.add_argument("--sides", nargs="+", default=sides, choices=sides, help="whose steps; others stay as they are")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often the sides take turns")
    parser.add_argument("--here", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        folder, library, dtype, rows, length = args.here
        print(measure_here(folder, library, dtype, int(rows), int(length)))
        return
    file = RESULTS / "cpu_step.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in [] if args.draw else args.models:
        rows = [row for row in rows if row["model"] != name or row["library"] not in args.sides]
        rows += measure(name, args.rounds, args.sides)
        rows.sort(key=lambda row: (list(MODELS).index(row["model"]), SIDES.index((row["library"], row["dtype"]))))
        file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    (RESULTS / "cpu_step.md").write_text("# A LoRA step on a CPU\n\n" + draw(rows))
    print(draw(rows), end="")


if __name__ == "__main__":
    main()
