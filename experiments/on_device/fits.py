"""Step 5: what fits. The largest batch and the longest sequence that `jaxpeft plan --largest` names, tried.

What it names must run; twice that must fail for want of memory. A try is a step from random numbers, in a process of
its own that may take as much of the memory as `jaxpeft train` lets JAX take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from experiments.on_device import plans, process
from experiments.on_device.record import Prepared, Row

PATIENCE = 280.0
# JAX's allocator in one piece, as in `jaxpeft train`: one that grows by regions has no room for 58 GiB beside 16.
ALONE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
START = {"llama3.1-8b": (4, 2048), "llama3.2-1b": (8, 2048), "toy": (2, 64)}
CASES = (("llama3.1-8b", "lora", "matmuls"), ("llama3.1-8b", "lora", "blocks"), ("llama3.2-1b", "full", "matmuls"))


def keys(toy: bool) -> Iterator[Row]:
    """In the order of their worth."""
    for geometry, method, save in [("toy", "lora", "matmuls")] if toy else CASES:
        for extent in ("rows",) if toy else ("rows", "length"):
            yield {"geometry": geometry, "method": method, "save": save, "extent": extent}


def ahead(key: Row) -> int:
    """So many search at one time; they keep away from the device. What is named need not wait for a search."""
    return 1 if "named" in key else 6


def prepare(key: Row, toy: bool, device: str) -> Prepared:
    """Finds the largest, unless it was "named" before; measuring tries it, and twice that.

    A key {"attempt": sizes} is one such try.
    """
    if "attempt" in key:
        return plans.compiled(plans.step_of(key["attempt"]), times=1)
    import jax

    jax.config.update("jax_platforms", "cpu")
    target = plans.target_of(device)
    own = {name: value for name, value in key.items() if name not in ("extent", "named")}
    if "named" in key:
        named, searched = key["named"], {"target": target.name if target else None}
    elif toy or target is None:
        rows, length = START[key["geometry"]]
        named, searched = {"rows": rows, "length": length}, {}
    else:
        named, searched = largest(own, key["extent"], target), {"target": target.name}

    def measure() -> Row:
        once = attempt({**own, **named})
        twice = attempt({**own, **named, key["extent"]: 2 * named[key["extent"]]})
        found = {**searched, "named": named, "once": once, "twice": twice}
        return found if toy else {**found, "right": once["runs"] and not twice["runs"]}

    return Prepared(measure)


def largest(key: Row, extent: str, target: Any) -> Row:
    """{"rows", "length"} of the largest that fits: rows of START's length, or the length of one row."""
    from jaxpeft.memory import planner, search

    key = {name: value for name, value in key.items() if name != "extent"}
    length = START[key["geometry"]][1]
    sizes = lambda n: {"rows": n, "length": length} if extent == "rows" else {"rows": 1, "length": n}
    total = lambda n: planner.row(plans.step_of({**key, **sizes(n)}), target)["bytes"]["total"]
    if extent == "rows":
        found = search.largest(total, target.usable_bytes, START[key["geometry"]][0])
    else:
        most = plans.config_of(key["geometry"])["max_position_embeddings"]
        found = search.largest(total, target.usable_bytes, 8192, 128, most)
    return sizes(found)


def attempt(key: Row) -> Row:
    """{"runs": whether the step of these sizes runs, "measured": its peak, or "why" not}."""
    try:
        found = process.ask("fits", {"attempt": key}, ALONE, PATIENCE / 2)
    except RuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise
        return {"runs": False, "why": str(error)[:200]}
    return {"runs": True, "measured": found["measured"]}
