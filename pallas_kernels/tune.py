"""Finds the tiles that are fastest on the attached device, and writes them to a table (see tuning.py).

    python -m pallas_kernels.tune --model llama3-8b --ranks 16,64 --rows 2048,8192 --out tuned.json
    PALLAS_KERNELS_TUNED=tuned.json jaxpeft train ...

Every linear map of the model, in every kernel that reads it (forward, the input's gradient, and, apart, the low-rank
product and the factors' gradients), with every candidate of the kernel's file. Candidates take turns; the one with the
lowest median wins. One that does not compile is left out. The table is written after each entry, and what it has is
not measured again.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import lora_matmul, packed, timing, tuning
from pallas_kernels.lora_matmul import bench
from pallas_kernels.lora_matmul.shapes import MODELS, Shape
from pallas_kernels.tuning import Sizes


def calls(
    shape: Shape, rank: int, rows: int, dtype: Any
) -> Iterator[tuple[str, str, Callable[..., Sizes], tuple, dict]]:
    """(package, function, sizes, arguments, static arguments) of every kernel that a map runs."""
    x, w, a, b, dy = jax.jit(bench.arrays, static_argnums=(0, 1, 2, 3))(shape, rank, rows, dtype)
    seed, both, z = jnp.int32(0), {"scale": 2.0, "rate": 0.0}, jnp.ones((rank, rows), dtype)
    thin, factor = lora_matmul.sizes_of_low, lora_matmul.sizes_of_factor
    yield "lora_matmul", "forward", lora_matmul.sizes_of_both, (x, w, a, b, seed), both
    yield "lora_matmul", "input_gradient", lora_matmul.sizes_of_both, (dy, w, a, b, seed), both
    yield "lora_matmul", "low", thin, (x, a, seed), both
    yield "lora_matmul", "factor_gradient", factor, (z, x, seed), {"rate": 0.0}
    yield "lora_matmul", "factor_gradient", factor, (z, dy, seed), {"rate": 0.0}
    nf4 = packed.quantize(w)
    yield "quant_lora_matmul", "forward", lora_matmul.sizes_of_both, (x, nf4, a, b, seed), both
    yield "quant_lora_matmul", "input_gradient", lora_matmul.sizes_of_both, (dy, nf4, a, b, seed), both


def candidates(
    shape: Shape, rank: int, rows: int, dtype: Any
) -> Iterator[tuple[str, Sizes, dict[Any, Callable[[], Any]]]]:
    """(operation, sizes, {candidate: a run of it}) of a map's kernels, compiled, where there is a choice."""
    platform = jax.devices()[0].platform
    if platform not in ("gpu", "tpu"):
        return
    for package, function, sizes, args, static in calls(shape, rank, rows, dtype):
        file = importlib.import_module(f"pallas_kernels.{package}.{platform}")
        if getattr(file, f"supports_{function}")(*args, **static):
            runs = compiled(file, function, args, static)
            if len(runs) > 1:
                yield f"{package}.{function}", sizes(*args), runs


def compiled(file: Any, function: str, args: tuple, static: dict[str, Any]) -> dict[Any, Callable[[], Any]]:
    """{candidate: a run of it} for a call, of those that compile and run."""
    runs: dict[Any, Callable[[], Any]] = {}
    for config in file.configs(function, *args):
        run = jax.jit(functools.partial(getattr(file, function), config=config, **static))
        try:
            jax.block_until_ready(run(*args))
        except Exception as error:  # whatever a compiler says of tiles that it cannot take
            print(f"  {config}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
            continue
        runs[config] = functools.partial(run, *args)
    return runs


def best(file: Any, function: str, args: tuple, static: dict[str, Any], rounds: int, inner: int) -> Any:
    """The fastest of the candidates for a call; None if there is no choice."""
    runs = compiled(file, function, args, static)
    if len(runs) < 2:
        return next(iter(runs), None)
    times = timing.paired(runs, rounds, inner)
    return min(runs, key=times.median)


def write(table: dict[str, Any], path: Path) -> None:
    """Writes a table whole, in place of the old one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(part, path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 2 for a mistake in the arguments, or without a GPU or TPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser.add_argument("--model", default="llama3-8b", choices=list(MODELS), help="whose linear maps")
    parser.add_argument("--ranks", default=[16], type=numbers, help="with commas")
    parser.add_argument("--rows", default=[8192], type=numbers, help="tokens, with commas")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", default=10, type=int)
    parser.add_argument("--inner", default=5, type=int, help="calls between two waits")
    parser.add_argument("--out", default="tuned.json", type=Path, help="the table; what it has is kept")
    args = parser.parse_args(arguments)
    device = jax.devices()[0]
    files = {"gpu": "gpu", "tpu": "tpu"}
    if device.platform not in files:
        print(
            f"pallas_kernels.tune: the attached device is a {device.platform}; a GPU or TPU is needed", file=sys.stderr
        )
        return 2
    try:
        table = tuning.read(args.out) if args.out.exists() else {}
    except ValueError as error:
        print(f"pallas_kernels.tune: {error}", file=sys.stderr)
        return 2
    for shape in MODELS[args.model]:
        for rank in args.ranks:
            for rows in args.rows:
                for package, function, sizes, values, static in calls(shape, rank, rows, jnp.dtype(args.dtype)):
                    name, key = f"{package}.{function}", sizes(*values).key
                    entries = table.setdefault(device.device_kind, {}).setdefault(name, {}).setdefault(key, [])
                    if any(count == rows for count, _ in entries):
                        continue
                    file = importlib.import_module(f"pallas_kernels.{package}.{files[device.platform]}")
                    if not getattr(file, f"supports_{function}")(*values, **static):
                        continue
                    config = best(file, function, values, static, args.rounds, args.inner)
                    if config is not None:
                        entries.append([rows, config._asdict()])
                        print(f"{name} {key} {rows}: {config}")
                        write(table, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
