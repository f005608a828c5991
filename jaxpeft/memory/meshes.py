"""Which mesh of a target's devices a step is fastest on: a few are compiled, of those that promise most.

What a mesh promises is known without a compiler: the bytes of the arguments on each device, and the least time that

    all-gather    of each matrix that lies over `fsdp`, in the forward pass and in the backward pass
    all-reduce    over `data` and `fsdp`, of the gradients of what trains; over `tensor`, of the stream, twice per layer
                  and pass

take on the links of the target, which is no less than the products' own time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpeft import sharding, tree
from jaxpeft.errors import InputError
from jaxpeft.memory import interconnect, planner, pods, targets
from jaxpeft.memory.collectives import Collective
from jaxpeft.memory.planner import Step
from jaxpeft.memory.targets import Target

MOST_TRIED = 4  # meshes that are compiled
MOST_SECONDS = 60.0  # by when the last of them should be, as far as the longest before it tells

_TENSOR = (1, 2, 4, 8)  # devices that the heads are divided over


def default(target: Target) -> str:
    """The mesh of a target of several devices that nobody has named one for."""
    return f"fsdp={target.chips}"


def candidates(chips: int, rows: int, accumulate: int = 1) -> list[str]:
    """Meshes of so many devices, over whose data x fsdp the rows of each micro-batch can be divided."""
    found = []
    for tensor in _TENSOR:
        shards = chips // tensor
        if chips % tensor or rows % (shards * accumulate):
            continue
        for data in (size for size in range(1, shards + 1) if shards % size == 0):
            sizes = {"data": data, "fsdp": shards // data, "tensor": tensor}
            found.append(",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1))
    return found


def best(
    make: Callable[[Mesh], Step],
    target: Target,
    rows: int,
    accumulate: int = 1,
    report: Callable[[str], None] = lambda text: None,
    most: int = MOST_TRIED,
    most_seconds: float = MOST_SECONDS,
) -> tuple[Step, dict[str, Any]]:
    """The step, and its row (`pods.row`), on the mesh whose step fits and has the least bound of those compiled.

    Args:
      make: mesh -> step.
      target: of several devices.
      rows: of a step's batch.
      accumulate: micro-batches.
      report: is told what is tried.
      most: meshes that are compiled, of those whose arguments fit.
      most_seconds: by which all should be: another is compiled if it would be, taking as long as the longest did.

    Returns:
      (step, row), the row with "tried": [{"mesh", "total", "fits", "step_s"}], and "meshes", the number of all that
      divide devices and rows. If no step fits, it is the smallest.

    Raises:
      InputError: where no mesh divides devices and rows, or the arguments fit on none.
    """
    begun, names = time.monotonic(), candidates(target.chips, rows, accumulate)
    if not names:
        parts = f", times --accumulate {accumulate}" if accumulate > 1 else ""
        raise InputError(
            f"--batch-size {rows}: must be a multiple of the {target.chips} devices of {target.name}, or of a half, a "
            f"fourth or an eighth of them{parts}"
        )
    meshes = [sharding.make_mesh(name, targets.devices(target)) for name in names]
    first = make(meshes[0])
    promised = [(*promise(first._replace(mesh=mesh), target), mesh) for mesh in meshes]
    least = min(size for size, _, _ in promised)
    if least > target.usable_bytes:
        raise InputError(
            f"--mesh auto: the arguments alone (weights, adapters, optimizer state, batch) take {_gib(least)} of each "
            f"device of {target.name}, which has {_gib(target.usable_bytes)}"
        )
    order = sorted((pair for pair in promised if pair[0] <= target.usable_bytes), key=lambda pair: pair[1])
    tried: list[tuple[Step, dict[str, Any]]] = []
    longest = 0.0
    for _, _, mesh in order[:most]:
        before = time.monotonic()
        if tried and before + longest > begun + most_seconds:
            break
        step = make(mesh)
        tried.append((step, made := pods.row(step, target)))
        longest = max(longest, time.monotonic() - before)
        report(f"{target.name}, {made['mesh']}: {_said(made)}")
    step, made = min(tried, key=lambda pair: _rank(pair[1]))
    return step, {**made, "tried": [_short(one) for _, one in tried], "meshes": len(names)}


def promise(step: Step, target: Target) -> tuple[int, float]:
    """(bytes of the arguments on one device, seconds of what it has to send or to compute), without a compiler."""
    mesh = step.mesh
    assert mesh is not None
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    sent: list[Collective] = []

    def add(kind: str, axes: tuple[str, ...], size: float, times: int) -> None:
        whole = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
        group = tuple(int(number) for number in numbers[whole].ravel())
        if len(group) > 1:
            sent.append(Collective(kind, "", "", (), group, size, times))

    state, batch = planner.local(step)
    placed, _ = planner.placed(step)
    passes = 2 if step.backward else 1
    over_fsdp = [path for path, leaf in placed.leaves.items() if "fsdp" in jax.tree.leaves(leaf)[0].sharding.spec]
    gathered = tree.num_bytes([state.leaves[path] for path in over_fsdp])
    add("all-gather", ("fsdp",), gathered * mesh.shape["fsdp"], passes)
    add("all-reduce", sharding.ROWS, tree.num_bytes(state.trainable), passes - 1)
    outputs = [leaf for path, leaf in step.state.leaves.items() if path.endswith("o_proj/kernel")]
    for leaf in outputs:
        layers, width = leaf.shape[0], leaf.shape[-1]
        stream = step.rows * step.length * width * leaf.dtype.itemsize / step.shards
        add("all-reduce", ("tensor",), stream, 2 * layers * passes)
    seconds = interconnect.seconds(sent, target, list(mesh.devices.flat)) or 0.0
    return tree.num_bytes((state._replace(key=None), batch)), seconds


def _rank(made: dict[str, Any]) -> tuple[bool, float]:
    """By time, of those that fit; of those that do not, by size."""
    return not made["fits"], _seconds(made) if made["fits"] else made["bytes"]["total"]


def _seconds(made: dict[str, Any]) -> float:
    return made["bound"]["step_s"] if made.get("bound") else math.inf


def _short(made: dict[str, Any]) -> dict[str, Any]:
    time_ = made["bound"]["step_s"] if made.get("bound") else None
    return {"mesh": made["mesh"], "total": made["bytes"]["total"], "fits": made["fits"], "step_s": time_}


def _said(made: dict[str, Any]) -> str:
    at_least = f", {1e3 * _seconds(made):.1f} ms at least" if made.get("bound") else ""
    return f"{_gib(made['bytes']['total'])}, {'fits' if made['fits'] else 'does not fit'}{at_least}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
