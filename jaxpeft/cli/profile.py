"""`jaxpeft profile`: who owns the bytes at the peak of a fine-tuning step, as its target's compiler laid them out."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxpeft.cli.arguments import StepArguments, check_step, describe_only, methods, settled
from jaxpeft.errors import InputError
from jaxpeft.files import check_empty


@dataclasses.dataclass(frozen=True)
class Profile(StepArguments):
    """Say who owns the bytes at a step's peak: category, module and activation, from the compiler's own assignment."""

    out: Path | None = None
    """Folder for profile.html, profile.png and profile.json."""
    dump: Path | None = None
    """Folder for XLA's own files (HLO, buffer assignment, live ranges), which xprof and other tools read."""
    limit: int = 20
    """Owners to list."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Profile) -> dict[str, Any]:
    """Returns the profile (see `jaxpeft.memory.profile.to_json`) with the step that it is of.

    Raises:
      InputError: for arguments that cannot be used.
    """
    args = settled(args)
    check_step(args)
    if args.limit < 1:
        raise InputError(f"--limit {args.limit}: must be at least 1")
    for name, folder in (("out", args.out), ("dump", args.dump)):
        if folder is not None:
            check_empty(f"--{name}", folder)
    describe_only()

    import jax

    from jaxpeft import assets, files, models
    from jaxpeft.memory import draw, planner, profile, targets
    from jaxpeft.models import geometries

    assert args.seq_len is not None
    device = targets.target(args.target)
    targets.devices(device)
    raw = geometries.load(str(assets.MODEL) if args.model is None else args.model)
    config = models.for_longer(raw, args.rope_scaling)
    chosen = methods(args)
    if len(chosen) > 1:
        raise InputError(f"--method {args.method}: one at a time; `jaxpeft plan` compares several")
    name, method = chosen[0]
    dtype = models.compute_dtype(config, args.dtype, device.platform)
    layout = (True, args.accumulate, device.chips, args.task, args.num_labels, args.remat)
    step = planner.make_step(config, method, args.batch_size, args.seq_len, args.save, dtype, *layout)
    print(f"compiling {name} for {device.name}, {step.plan}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="jaxpeft-profile-") as scratch:
        dump = args.dump or Path(scratch)
        made = planner.row(step, device, dump=dump)
        metrics = jax.eval_shape(step.function, step.state, step.batch)[1]
        found = profile.read(dump, profile.step_owners(step.state, step.batch, step.base, metrics))
    document = {"model": args.model or "embedded", "task": args.task, "method": name, **made, "dtype": dtype}
    document["profile"] = profile.to_json(found, args.limit)
    if args.out is not None:
        title = (
            f"{document['model']}, {name}, batch {args.batch_size} x {args.seq_len}, {dtype}, {device.name}, "
            f"{step.plan}"
        )
        args.out.mkdir(parents=True, exist_ok=True)
        draw.write_html(found, args.out / "profile.html", title)
        draw.write_png(found, args.out / "profile.png", title)
        files.write_json(args.out / "profile.json", document)
    return document


def show(document: dict[str, Any]) -> None:
    """Prints the categories and the largest owners."""
    import rich.console

    from jaxpeft.memory.profile import text
    from jaxpeft.train.report import human_bytes

    found = document["profile"]
    console = rich.console.Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{document['model']}, {document['method']}, batch {document['batch_size']} x {document['seq_len']} tokens, "
        f"{document['dtype']}, {document['target']}, --save {document['save']}"
        f"{' --remat policy' if document['remat'] == 'policy' else ''}, JAX {document['jax']}\n"
        f"peak {human_bytes(found['total_bytes'])} of {human_bytes(document['device_bytes'])}",
        soft_wrap=True,
    )
    if found["host_bytes"]:
        console.print(f"in the host's memory {human_bytes(found['host_bytes'])}")

    console.print("", text(found, console.width), sep="\n", soft_wrap=True)
