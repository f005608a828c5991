"""The process that measures one row: it prepares (imports, compiles), says so, waits for its turn, and measures.

    stdin     a line of JSON {"step", "key", "toy", "device"}; later "go"
    stdout    @ready BYTES, then @row {...} or @failed "why", a line each; whatever else is printed goes to stderr

Every row has a process of its own: its peak of memory is its own, and what it breaks ends with it. Many prepare at one
time; one measures.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

STEPS = {"kernels": "right", "layers": "layers", "plans": "plans", "steps": "steps", "fits": "fits"}


def module(step: str) -> Any:
    """The file of a step."""
    return importlib.import_module(f"experiments.on_device.{STEPS[step]}")


def main() -> int:
    """One row."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    try:
        if task["step"] == "environment":
            from experiments.on_device import record

            print(f"@row {json.dumps(record.environment())}", file=out)
            return 0
        prepared = module(task["step"]).prepare(task["key"], task["toy"], task["device"])
        print(f"@ready {prepared.need}", file=out)
        if sys.stdin.readline().strip() != "go":
            return 1
        print(f"@row {json.dumps(prepared.measure())}", file=out)
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        print(f"@failed {json.dumps(f'{type(error).__name__}: {text[0]}'[:300])}", file=out)
        return 1
    return 0


if __name__ == "__main__":
    # At once: a GPU's libraries may hang while a process that has failed takes leave of them.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
