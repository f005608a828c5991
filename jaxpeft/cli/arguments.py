"""What the commands that name a model, a method and a step share."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

from jaxpeft import launched
from jaxpeft.errors import InputError, shown
from jaxpeft.train.checks import check_least, check_parts, check_rope_scaling, flag
from jaxpeft.train.run import defaults_of

_MOST_BYTES = 2**62
UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclasses.dataclass(frozen=True)
class StepArguments:
    """A fine-tuning step that is planned, not run: nothing is downloaded or allocated."""

    model: str | None = None
    """Built-in geometry (llama2-7b, ...), folder, config.json or GGUF file. Default: the embedded model."""
    task: Literal["lm", "classify"] = "lm"
    """lm: continue texts. classify: a classifier of rows (or images) in place of the model's head."""
    num_labels: int | None = None
    """Labels of --task classify; 1 is a regression. Default: the model's own, or 2."""
    method: str = "lora"
    """Fine-tuning method, or a chain (meft+lora), or several of these with commas; `jaxpeft methods` lists them."""
    rank: int | None = None
    """Rank of the adapters. Default: the method's own."""
    alpha: float | None = None
    """Scale of the adapters. Default: the method's own."""
    targets: str | None = None
    """Sites: all-linear, attention, qv, mlp, names (q_proj,v_proj) or a regular expression. Default: the method's."""
    method_options: tuple[str, ...] = ()
    """Further arguments of the method's factory, as NAME=VALUE with a YAML value; METHOD.NAME=VALUE where more than one
    of a chain takes the name."""
    adapters: tuple[str, ...] = ()
    """Names of several adapters on one base, each for rows of its own, as for `train`; NAME.rank=4 among the
    --method-options is of one alone."""
    batch_size: int = 8
    """Sequences in one step."""
    seq_len: int | None = None
    """Tokens in one sequence. Default: 512, or 256 with the embedded model."""
    accumulate: int = 1
    """Parts that a step's batch is cut into; divides --batch-size."""
    optimizer: Literal["adam", "sgd", "adam8bit", "adafactor", "sm3", "lion"] | None = None
    """What makes steps of gradients, as for `train`. Default: the method's own, else adam."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the frozen weights and of the computation; what trains is float32. Default: float32 for the target cpu,
    else the checkpoint's, bfloat16 for one in float16."""
    rope_scaling: str | None = None
    """Scales rotary positions for texts longer than the model's: linear|dynamic|yarn=FACTOR."""
    save: str | None = None
    """What is kept for the backward pass: everything, matmuls, blocks, offload, compressed, compressed12,
    compressed4, and NAME=ACTION. Default: matmuls; everything where the method runs the layers in its own way; blocks
    where there is no backward pass, with which alone it goes, tokens=N beside it."""
    remat: Literal["loops", "policy"] = "loops"
    """How a plan is carried out: loops of our own, or a scan over jax.checkpoint with the plan as its policy, which
    takes all rows at once and cannot compress."""
    update_in_backward: bool = False
    """Update each layer inside the backward pass, as for `train`: the gradients of all layers never exist."""
    prune_embeddings: int | None = None
    """Rows of the input's embedding table that are there, as many as tokens that the data name: `train` with this flag
    counts them. Default: all."""
    optimizer_memory: Literal["device", "host"] = "device"
    """Where the optimizer's state of matrices lies: on the device, or in the host's pinned memory, from where a step
    takes it layer by layer, as for `train`."""
    target: str = "cpu"
    """Device: h200, h100, a100, rtx4090, v4, v5e, v5p, v6e, tpu7x, cpu; a slice of TPUs such as v5p:4x4x4; a host of
    GPUs such as h200x8, or several: h200x8x2."""
    mesh: str | None = None
    """How several devices divide the step, as for `train`: data=2,fsdp=4. Default: fsdp over all of the target's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessArguments:
    """A command that may divide a model over devices, and over processes."""

    mesh: str | None = None
    """Devices to divide the model over, AXIS=DEVICES,...: fsdp, tensor; auto: fsdp over all of them. Default: one; with
    several processes as auto."""
    processes: int | Literal["auto"] | None = None
    """Processes that do it together, each started with the same flags; auto asks JAX. Default: as SLURM's srun, Open
    MPI's mpirun or JAX_NUM_PROCESSES say, else one."""
    process_id: int | None = None
    """Which of the processes this is, from 0. Default: as the launcher or JAX_PROCESS_ID says."""
    coordinator: str | None = None
    """HOST:PORT of process 0. Default: as the launcher or JAX_COORDINATOR_ADDRESS says."""


@contextlib.contextmanager
def mesh_of(args: ProcessArguments) -> Iterator[Any]:
    """A context in which the processes know of each other; gives the mesh of their devices, None for one device.

    Raises:
      InputError: for flags that make no sense, or are not the same in all processes.
    """
    where = launched.place(args.processes, args.process_id, args.coordinator, os.environ)
    if where is None and args.mesh is None:
        yield None
        return
    from jaxpeft import distributed, shares

    with distributed.joined(where) as group:
        if group is not None:
            fields = [field.name for field in dataclasses.fields(args) if field.name not in launched.FLAGS]
            group.agree({flag(name): getattr(args, name) for name in fields})
        yield shares.make_mesh(args.mesh)


def settled(args: Any) -> Any:
    """The arguments with the defaults that depend on whether the model is the embedded one."""
    defaults = defaults_of(args.model)
    return dataclasses.replace(args, **{name: x for name, x in defaults.items() if getattr(args, name, x) is None})


def check_step(args: StepArguments) -> None:
    """Raises InputError for the first argument whose value makes no sense by itself; `args` are settled."""
    check_least(args, {"batch_size": 1, "seq_len": 2, "accumulate": 1, "prune_embeddings": 1})
    if args.num_labels is not None and (args.num_labels < 1 or args.task != "classify"):
        why = "must be at least 1" if args.num_labels < 1 else "belongs to --task classify"
        raise InputError(f"--num-labels {args.num_labels}: {why}")
    check_parts(args)
    check_rope_scaling(args)


def methods(args: StepArguments) -> list[tuple[str, Any]]:
    """(words, Method) of every method or chain; of several, each gets the settings that it takes. Of --adapters, which
    train together, one.

    Raises:
        InputError: for an unknown method, a setting that none takes, or that the method refuses.
    """
    if args.adapters:
        from jaxpeft.train import several

        found = several.planned(args)
        return [(found.spelled(), found.method)]
    from jaxpeft import recipe

    return recipe.several(args.method, args.method_options, rank=args.rank, alpha=args.alpha, targets=args.targets)


def mesh_text(args: StepArguments, target: Any) -> str | None:
    """The text of the mesh for a target: what is asked for, else fsdp over all devices of one that has several.

    Raises:
      InputError: for a mesh of another number of devices.
    """
    from jaxpeft import sharding
    from jaxpeft.memory.meshes import default

    if args.mesh is None:
        return default(target) if target.chips > 1 else None
    if args.mesh != "auto" and (size := math.prod(sharding.parse(args.mesh).values())) != target.chips:
        count = "1 device" if target.chips == 1 else f"{target.chips} devices"
        raise InputError(f"--mesh {args.mesh}: {size} devices, and --target {target.name} has {count}")
    return args.mesh if target.chips > 1 else None


def describe_only() -> None:
    """Keeps JAX off the attached devices, which are not needed, and its compilers' remarks off stderr."""
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def parse_bytes(flag: str, text: str) -> int:
    """24GiB, 24GB, 25769803776 -> bytes.

    Raises:
        InputError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise InputError(
            f"{flag} {shown(text)}: should be a size such as 24GiB; units: {', '.join(u for u in UNITS if u)}"
        )
    size = float(found[1]) * UNITS[found[2]]
    if size > _MOST_BYTES:
        raise InputError(f"{flag} {shown(text)}: is above {_MOST_BYTES // 2**60} EiB")
    return int(size)
