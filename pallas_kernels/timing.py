"""Times side by side: functions take turns in one process, and what is reported is the ratio of their times.

A round calls every function once, in an order that rotates, `inner` calls at a time between two waits for the device.
Clocks, temperatures and neighbours change between rounds, and less within one; so ratios are taken within a round, and
their median and quartiles over the rounds are the figures. The first round compiles and is thrown away.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib


class Times(NamedTuple):
    """Seconds of one call, by round: {function: [seconds]}."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """(lower quartile, median, upper quartile) of the ratios within the rounds."""
        ratios = sorted(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high


def paired(functions: Mapping[str, Callable[[], Any]], rounds: int = 20, inner: int = 5) -> Times:
    """Times of functions without arguments whose results JAX can wait for."""
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(inner):
                out = functions[name]()
            wait(out)
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / inner)
    return Times(seconds)


def measure(
    functions: Callable[..., Mapping[str, Mapping[str, Callable[[], Any]]]],
    shapes: Sequence[Any],
    ranks: Sequence[int],
    rows: Sequence[int],
    dtype: str,
    rounds: int,
    inner: int,
) -> list[dict[str, Any]]:
    """A row for each map, rank, number of rows and pass; `functions` of these gives {pass: {name: function}}."""
    found = []
    for shape, rank, count in itertools.product(shapes, ranks, rows):
        key = {"map": shape.name, "n": shape.n, "m": shape.m, "rank": rank, "rows": count, "dtype": dtype}
        for name, group in functions(shape, rank, count, jnp.dtype(dtype)).items():
            found.append({**key, "pass": name, "seconds": paired(group, rounds, inner).seconds})
    return found


def wait(out: Any) -> None:
    """Waits for a result, JAX's or PyTorch's."""
    if type(out).__module__.startswith("torch"):
        import torch

        if out.is_cuda:
            torch.cuda.synchronize()
        return
    jax.block_until_ready(out)


def environment() -> dict[str, Any]:
    """What figures were measured on: device, platform, versions."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def main(doc: str | None, functions: Callable[..., Any], models: Mapping[str, Sequence[Any]], to: str) -> None:
    """The command line of a benchmark: measures, and reports ratios to the function `to`."""
    args = arguments(doc, list(models))
    rows = measure(functions, models[args.model], args.ranks, args.rows, args.dtype, args.rounds, args.inner)
    report(rows, to, args.json)


def arguments(doc: str | None, models: Sequence[str]) -> argparse.Namespace:
    """The command line of the benchmarks: .model, .ranks, .rows, .dtype, .rounds, .inner, .json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser.add_argument("--model", default="llama3-8b", choices=models, help="whose linear maps")
    parser.add_argument("--ranks", default=[16, 64], type=numbers, help="with commas")
    parser.add_argument("--rows", default=[8192], type=numbers, help="tokens, with commas")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", default=20, type=int)
    parser.add_argument("--inner", default=5, type=int, help="calls between two waits")
    parser.add_argument("--json", help="a file for the figures")
    return parser.parse_args()


def report(rows: Sequence[Mapping[str, Any]], to: str, file: str | None) -> None:
    """Prints a table of ratios to the function `to`, on stderr where it was measured, and writes the figures."""
    where = environment()
    print(f"{where['device']}, JAX {where['jax']}", file=sys.stderr)
    if where["platform"] == "cpu":
        print("this is a CPU: the kernels do not run, and the ratios say nothing of a GPU or TPU", file=sys.stderr)
    for row in rows:
        words = " ".join(f"{key}={value}" for key, value in row.items() if key not in ("seconds", "pass"))
        times = Times(row["seconds"])
        cells = [f"{to} {1e3 * times.median(to):.3f} ms"]
        for name in times.seconds:
            if name != to:
                low, middle, high = times.ratio(name, to)
                cells.append(f"{name}/{to} {middle:.3f} ({low:.3f} to {high:.3f})")
        print(f"{words}  {row['pass']}:  {'  '.join(cells)}")
    if file:
        with open(file, "w") as out:
            json.dump({**where, "rows": list(rows)}, out, indent=1)
