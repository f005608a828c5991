"""Do the committed figures still come out? Some of each experiment's are measured anew, and what differs is named.

    python -m experiments.again                                    # one figure of each, some 15 minutes
    python -m experiments.again memory/lora_fa_tables --rows 5 --seed 1
    python -m experiments.again --list

Figures that follow from a compiler, a trace or fixed weights alone, of the JAX that runs this: what is trained for
minutes or timed is not among them. Which ones is drawn at random, by `--seed`. Numbers agree to half a percent. Exit
status 1 where one does not: then its whole experiment is of another program than today's, and wants to be measured anew
(remove its .json and run it) or to say so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.memory import common

# Data under results/: the module whose `measure` makes a figure of its key.
MEASURED = {
    "backprop_free/forward_passes": "backprop_free.forward_passes",
    "backprop_free/full_in_24_gb": "backprop_free.full_in_24_gb",
    "backprop_free/sampled_layers": "backprop_free.sampled_layers",
    "compare/memory": "compare.memory",
    "coresets/memory": "coresets.memory",
    "memory/beside_torchtune": "memory.beside_torchtune",
    "memory/budgets_7b": "memory.budgets_7b",
    "memory/code_errors": "memory.code_errors",
    "memory/does_lora_reduce_memory": "memory.does_lora_reduce_memory",
    "memory/kernels_memory": "kernels.memory",
    "memory/long_rows": "memory.long_rows",
    "memory/lora_fa_tables": "memory.lora_fa_steps",
    "memory/loraprune_7b": "memory.loraprune_7b",
    "memory/meft_inversion": "meft.inversion",
    "memory/meft_memory": "meft.memory",
    "memory/methods_1b": "memory.methods_1b",
    "memory/peqa_65b": "memory.peqa_65b",
    "memory/remat_forms": "memory.remat_forms",
    "memory/residuals_7b": "memory.residuals_7b",
    "memory/side_networks": "side_networks.memory",
    "memory/slimfit_bert": "memory.slimfit_bert",
    "scale/pods": "scale.pods",
    "traffic/ledger": "traffic.ledger",
}
TOLERANCE = 0.005
TIMES = ("seconds", "cpu_seconds", "compiles")  # what a figure took, no part of it


def leaves(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every number, text or None in dictionaries and lists, `TIMES` left out."""
    if isinstance(found, dict | list | tuple):
        inside = found.items() if isinstance(found, dict) else enumerate(found)
        for name, value in inside:
            if name not in TIMES:
                yield from leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, found


def alike(a: Any, b: Any) -> bool:
    """Numbers to `TOLERANCE`; what is no number, a plan that was chosen or why a step is refused, as it is."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(b - a) <= TOLERANCE * abs(a) or (math.isnan(a) and math.isnan(b))
    return a == b


def differences(committed: common.Row, anew: common.Row) -> list[str]:
    """A line for each leaf of `anew` that the committed row lacks or has otherwise, and for each that it had there."""
    before, now = (dict(leaves({name: row[name] for name in anew if name in row})) for row in (committed, anew))
    lines = [f"{path} is {x}, no figure before" for path, x in now.items() if path not in before]
    lines += [f"{path} was {x}, no figure now" for path, x in before.items() if path not in now]
    both = ((path, before[path], x) for path, x in now.items() if path in before)
    return lines + [f"{path}: {a} -> {x}" for path, a, x in both if not alike(a, x)]


def drawn(rows: Sequence[common.Row], count: int, seed: int) -> list[common.Row]:
    """So many of the rows that this JAX has measured, at random."""
    own = [row for row in rows if row["jax"] == jax.__version__]
    return random.Random(seed).sample(own, min(count, len(own)))


def again(name: str, count: int, seed: int) -> bool:
    """Measures so many figures of an experiment anew, says of each what became of it, and whether all are the same."""
    measure, same = importlib.import_module(f"experiments.{MEASURED[name]}").measure, True
    rows = drawn(common.load(name, common.RESULTS.parent), count, seed)
    if not rows:
        print(f"{name}: none measured: no figure of JAX {jax.__version__}, which runs this", flush=True)
    for row in rows:
        began = time.monotonic()
        anew = json.loads(json.dumps(measure(dict(row))))
        words = ", ".join(f"{key} {x}" for key, x in row.items() if key not in (*anew, "jax") and x not in (None, []))
        found = differences(row, anew)
        same &= not found
        print(f"{name}: {'differs' if found else 'the same'}: {words}: {time.monotonic() - began:.0f} s", flush=True)
        for line in found:
            print(f"  {line}", flush=True)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of data under experiments/results; all by default")
    parser.add_argument("--rows", type=int, default=1, help="figures of each")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--list", action="store_true", help="the names")
    args = parser.parse_args()
    for name in args.names:
        if name not in MEASURED:
            parser.error(f"no figures {name!r} to be measured anew; there are {', '.join(MEASURED)}")
    if args.list:
        print("\n".join(MEASURED))
        return
    jax.config.update("jax_platforms", "cpu")  # targets are described; an attached device is left alone
    same = [again(name, args.rows, args.seed) for name in args.names or MEASURED]
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
