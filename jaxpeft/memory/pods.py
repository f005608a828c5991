"""What a fine-tuning step needs on several devices: bytes of each, what they send each other, and the least time.

    made = row(step, target)        of a step made with a mesh of the target's devices

The step is compiled for all of the target's devices (`planner`), and everything is read from that program, loops by
their trips. It takes no less than the largest of

    compute        FLOPs of one device's products / its rate
    memory         bytes that it moves / its memory's bandwidth
    interconnect   its collectives, one after the other (`interconnect`)
    host           bytes to and from the host's memory / the link between

where each hides the others. What of the devices' rate that leaves to the products that the model asks for, none of
them computed twice, is the utilisation (MFU; Chowdhery et al. 2022, arXiv:2204.02311, section 4.1) at most.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxpeft.memory import hlo, interconnect, planner
from jaxpeft.memory.collectives import by_kind, collectives
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.movement import moves
from jaxpeft.memory.planner import Cost, Step
from jaxpeft.memory.profile import profile
from jaxpeft.memory.targets import Target
from jaxpeft.memory.traffic import traffic


def default_mesh(target: Target) -> str:
    """The mesh of a target of several devices that nobody has named one for."""
    return f"fsdp={target.chips}"


def row(step: Step, target: Target, traced: Cost | None = None, dump: Any = None) -> dict[str, Any]:
    """A row of the plan (`planner.row`) with what is said of several devices.

    Args:
      step: with a mesh of the target's devices.
      target: to compile for.
      traced: the step's `cost`, where it is known.
      dump: a folder for XLA's files.

    Returns:
      The row and "mesh" ("data=2,fsdp=4"), "chips", and, where the compiler did not refuse the program,
      "flops_per_chip" (of products), "collectives" ({kind: {"times", "bytes", "sent"}}, `collectives.by_kind`),
      "traffic" (the totals of `Traffic.to_json`), "bound" ({"compute_s", "memory_s", "interconnect_s", "host_s",
      "step_s", "by", "utilisation", "tokens_per_s"}) and "rematerialised" ({"instructions", "flops"} that the compiler
      computes again on its own, to save memory).

    Raises:
      InputError: as `planner.row` does.
    """
    assert step.mesh is not None
    traced = planner.cost(step) if traced is None else traced
    with _folder(dump) as folder:
        made = planner.row(step, target, traced, folder)
        made |= {"mesh": text_of(step.mesh), "chips": target.chips}
        program = _program(folder)
    if program is None:
        return made
    flow, owners = Dataflow(program), planner.owners(step)
    found, _ = collectives(flow, target.chips)
    moved = traffic(program, owners, target=target)
    # Of loops that run as often as the data says, the compiled program tells only one turn.
    flops = max(sum(moved.flops.values()), traced.flops / target.chips)
    sent = interconnect.seconds(found, target, list(step.mesh.devices.flat))
    kept = profile(program, owners).categories.get("saved activations", 0) if step.backward else 0
    sizes = made["bytes"]
    workspace = sizes["temporaries"] - sizes["gradients"] - kept
    return {
        **made,
        "bytes": {**sizes, "activations": kept, "workspace": workspace} if workspace >= 0 else sizes,
        "flops_per_chip": flops,
        "collectives": by_kind(found),
        "traffic": planner.totals(moved.to_json(0)),
        "bound": _bound(step, target, traced, flops, moved.bytes, moved.host, sent),
        "rematerialised": rematerialised(flow),
    }


def text_of(mesh: Any) -> str:
    """A mesh as --mesh takes it, axes of one device left out."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or f"data={mesh.size}"


def _bound(
    step: Step, target: Target, traced: Cost, flops: float, moved: float, host: float, sent: float | None
) -> dict[str, Any]:
    if target.flops is None or target.bandwidth is None:
        return {}
    times = {"compute": flops / target.flops, "memory": moved / target.bandwidth}
    times |= {} if sent is None else {"interconnect": sent}
    times |= {"host": host / target.host_bandwidth} if host and target.host_bandwidth else {}
    by = max(times, key=times.__getitem__)
    asked = (traced.flops - traced.recompute_flops) / target.chips / target.flops
    return {
        **{f"{name}_s": seconds for name, seconds in times.items()},
        "step_s": times[by],
        "by": by,
        "utilisation": asked / times[by],
        "tokens_per_s": step.rows * step.length / times[by],
    }


def rematerialised(flow: Dataflow) -> dict[str, float]:
    """{"instructions", "flops"} of what the compiler has put in a second time, FLOPs of all turns of loops.

    XLA calls what it computes again to save memory by the name of the first, with .remat behind it.
    """
    again = [move for move in moves(flow)[0] if ".remat" in move.instruction.name]
    return {
        "instructions": len(again),
        "flops": float(sum(move.times * (move.flops or 0.0) for move in again)),
    }


@contextlib.contextmanager
def _folder(dump: Any) -> Iterator[Path]:
    if dump is not None:
        yield Path(dump)
        return
    with tempfile.TemporaryDirectory(prefix="jaxpeft-plan-") as folder:
        yield Path(folder)


def _program(folder: Path) -> hlo.Program | None:
    """The program of a folder; None where the compiler refused it before it wrote one."""
    if not any(folder.glob("*after_optimizations.hlo.pb")):
        return None
    return hlo.read(folder)
