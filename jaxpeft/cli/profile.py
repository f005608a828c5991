"""`jaxpeft profile`: who owns the bytes at the peak of a step, as its target's compiler laid them out.

The step is one of ours that is compiled for it, or what XLA has written about any program (--xla-dump). A file is what
JAX has written about the memory in use on its devices.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from jaxpeft.cli.arguments import StepArguments, check_step, describe_only, mesh_text, methods, settled
from jaxpeft.errors import InputError
from jaxpeft.files import check_empty

if TYPE_CHECKING:
    from jaxpeft.memory.profile import Profile as Found


@dataclasses.dataclass(frozen=True)
class Profile(StepArguments):
    """Say who owns the bytes at a step's peak: category, module and activation, from the compiler's own assignment."""

    file: tyro.conf.Positional[Path | None] = None
    """What jax.profiler.save_device_memory_profile wrote, to be shown in place of a step."""
    xla_dump: Path | None = None
    """Folder that a program with XLA_FLAGS=--xla_dump_to=DIR filled, to be read in place of a step that is compiled."""
    module: str | None = None
    """Which of the programs of --xla-dump, by its name or a part of it. Default: the largest."""
    out: Path | None = None
    """Folder for profile.html, profile.png and profile.json."""
    dump: Path | None = None
    """Folder for XLA's own files (HLO, buffer assignment, live ranges), which xprof and other tools read."""
    traffic: bool = False
    """Say what the step moves through memory, too: bytes by kind and owner, copies, time at the target's bandwidth (of
    --xla-dump: that of --target)."""
    limit: int = 20
    """Owners to list."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


_OF_FILES = ("file", "xla_dump", "out", "limit", "json")  # the flags of what is not compiled here


def run(args: Profile) -> dict[str, Any]:
    """Returns the profile (see `jaxpeft.memory.profile.to_json`) with the step that it is of.

    Raises:
      InputError: for arguments that cannot be used.
    """
    read = _of_file if args.file else _of_dump if args.xla_dump else _of_step
    if read is not _of_step:
        _check_alone(args)
    else:
        if args.module is not None:
            raise InputError(f"--module {args.module}: belongs to --xla-dump")
        args = settled(args)
        check_step(args)
    if args.limit < 1:
        raise InputError(f"--limit {args.limit}: must be at least 1")
    for name, folder in (("out", args.out), ("dump", args.dump)):
        if folder is not None:
            check_empty(f"--{name}", folder)
    describe_only()

    from jaxpeft import files
    from jaxpeft.memory import draw, profile

    about, found, title = read(args)
    document = {**about, "profile": profile.to_json(found, args.limit)}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw.write_html(found, args.out / "profile.html", title)
        draw.write_png(found, args.out / "profile.png", title)
        files.write_json(args.out / "profile.json", document)
    return document


def _check_alone(args: Profile) -> None:
    """Raises InputError for a flag of a step beside a file or a dump of another program."""
    given = f"{args.file}" if args.file else "--xla-dump"
    allowed = _OF_FILES if args.file else (*_OF_FILES, "module", "traffic", *(("target",) if args.traffic else ()))
    if args.file and args.xla_dump:
        raise InputError(f"--xla-dump {args.xla_dump}: not together with {args.file}; give one of them")
    for field in dataclasses.fields(args):
        if field.name not in allowed and getattr(args, field.name) != field.default:
            raise InputError(
                f"--{field.name.replace('_', '-')}: not together with {given}, of which nothing is compiled; leave it "
                "out"
            )


def _of_file(args: Profile) -> tuple[dict[str, Any], Found, str]:
    """What is in use by a file of JAX's: (what the document says of it, the profile, a title)."""
    from jaxpeft.memory import in_use

    assert args.file is not None
    found = in_use.read(args.file)
    return {"file": str(args.file)}, found, found.title


def _of_dump(args: Profile) -> tuple[dict[str, Any], Found, str]:
    """A program of a folder of XLA's files, likewise."""
    from jaxpeft.memory import dumped, hlo, targets

    assert args.xla_dump is not None
    # Without one there is no bandwidth: a CPU's is not known either.
    where = targets.target(args.target) if args.traffic and args.target != "cpu" else None
    made = dumped.read(args.xla_dump, args.module, args.traffic, where)
    others = [one for one in made.modules if one != made.module]
    if others and args.module is None:
        note = f"reading {made.module.name}, the largest; --module takes another: {hlo.listed(others)}"
        print(note, file=sys.stderr, flush=True)
    modules = [{"name": one.name, "bytes": one.bytes} for one in made.modules]
    about = {"xla_dump": str(args.xla_dump), "module": made.module.name, "modules": modules}
    return about, made.profile, made.profile.title


def _of_step(args: Profile) -> tuple[dict[str, Any], Found, str]:
    """A fine-tuning step, compiled here, likewise."""
    from jaxpeft import assets, models, sharding
    from jaxpeft.memory import planner, pods, profile, targets
    from jaxpeft.models import geometries

    assert args.seq_len is not None
    device = targets.target(args.target)
    text = mesh_text(args, device)
    if text == "auto":
        raise InputError("--mesh auto: `jaxpeft plan` finds it; name it here")
    mesh = sharding.make_mesh(text, targets.devices(device)) if text else None
    targets.devices(device)
    raw = geometries.load(str(assets.MODEL) if args.model is None else args.model)
    config = models.for_longer(raw, args.rope_scaling)
    chosen = methods(args)
    if len(chosen) > 1:
        raise InputError(f"--method {args.method}: one at a time; `jaxpeft plan` compares several")
    name, method = chosen[0]
    dtype = models.compute_dtype(config, args.dtype, device.platform)
    layout = (True, args.accumulate, mesh, args.task, args.num_labels, args.remat)
    kept = (args.prune_embeddings, args.optimizer_memory)
    of_step = (args.optimizer, args.update_in_backward, *kept, bool(args.adapters))
    step = planner.make_step(config, method, args.batch_size, args.seq_len, args.save, dtype, *layout, *of_step)
    where = f"{device.name} ({text})" if text else device.name
    print(f"compiling {name} for {where}, {step.plan}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="jaxpeft-profile-") as scratch:
        dump = args.dump or Path(scratch)
        made = (planner.row if mesh is None else pods.row)(step, device, dump=dump)
        found = profile.read(dump, planner.owners(step))
        if args.traffic:
            found = found._replace(traffic=planner.moved(step, device, dump))
    made.pop("traffic", None)
    about = {"model": args.model or "embedded", "task": args.task, "method": name, **made, "dtype": dtype}
    title = f"{about['model']}, {name}, batch {args.batch_size} x {args.seq_len}, {dtype}, {where}, {step.plan}"
    return about, found, title


def show(document: dict[str, Any]) -> None:
    """Prints the categories and the largest owners."""
    import rich.console

    from jaxpeft.memory import traffic
    from jaxpeft.memory.profile import text
    from jaxpeft.train.report import human_bytes

    found = document["profile"]
    console = rich.console.Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(_heading(document), soft_wrap=True)
    if found["host_bytes"]:
        console.print(f"in the host's memory {human_bytes(found['host_bytes'])}")

    console.print("", text(found, console.width), sep="\n", soft_wrap=True)
    if "traffic" in found:
        console.print("", traffic.text(found["traffic"], console.width), sep="\n", soft_wrap=True)


def _heading(document: dict[str, Any]) -> str:
    """What the tables are of, and the bytes of all."""
    from jaxpeft.train.report import human_bytes

    total = human_bytes(document["profile"]["total_bytes"])
    if "file" in document:
        return f"{document['file']}\nin use {total}"
    if "xla_dump" in document:
        return f"{document['module']} of {document['xla_dump']}, {document['profile']['platform']}\npeak {total}"
    mesh = f" ({document['mesh']})" if "mesh" in document else ""
    return (
        f"{document['model']}, {document['method']}, batch {document['batch_size']} x {document['seq_len']} tokens, "
        f"{document['dtype']}, {document['target']}{mesh}, --save {document['save']}"
        f"{' --remat policy' if document['remat'] == 'policy' else ''}"
        f"{' --update-in-backward' if document['update_in_backward'] else ''}"
        f"{' --optimizer-memory host' if document.get('optimizer_memory') == 'host' else ''}, JAX {document['jax']}\n"
        f"peak {total} of {human_bytes(document['device_bytes'])}{', of each device' if mesh else ''}"
    )
