"""Everything that only a device can say, in one command: half an hour on a GPU (or a TPU) becomes committed figures.

    python -m experiments.on_device                                  # on the device, from a source tree
    python -m experiments.on_device --minutes 9 --only layers,steps  # some steps; goes on where the last run ended
    python -m experiments.on_device --name h100                      # beforehand, anywhere: what `fits` is to try
    python -m experiments.on_device --draw                           # tables, and the section of docs/device.md

Steps, in the order of their worth; each has its share of the time, writes its rows the moment they are there, and
stops none of the others when it fails:

    kernels   are the kernels right on the device?                                     right.py
    layers    are they fast? a layer beside its frozen product; tiles; ceilings        layers.py
    plans     predicted against measured peak of whole steps                           plans.py
    steps     tokens/s and memory beside peft with transformers; where the time goes   steps.py
    fits      the largest that the plan names must run, twice that must fail           fits.py

Files: DIR/<step>.json and DIR/tuned.json, the kernels' tiles, written to pallas_kernels/tuned.json as well. DIR is
experiments/results/device/<device> unless given. On a CPU every step runs at toy sizes, and its figures are of nothing.

Exit status: 0 if every row was measured, now or before; 1 if rows failed or are left for another run; 2 for a mistake
in the arguments, or a device that JAX does not show. docs/device.md says how to read the results.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.on_device import process
from experiments.on_device.record import RESULTS, Record, Row, commit, measured, missing, now
from experiments.on_device.worker import STEPS, module
from jaxpeft.memory.kinds import GPU_FRACTION, TARGETS

# Of the time that is left when a step begins, beside the shares of those after it.
SHARES = {"kernels": 3.0, "layers": 6.0, "plans": 4.0, "steps": 8.0, "fits": 4.0}
# A process takes memory as it needs it, and at most as much as jaxpeft lets JAX take.
SHARED = {
    "XLA_CLIENT_MEM_FRACTION": str(GPU_FRACTION),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "",  # the old name; JAX refuses both at a time
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTHONUNBUFFERED": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see above for the exit status."""
    args = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended
    try:
        if args.draw:
            from experiments.on_device import report

            return report.main(args.out)
        return _name(args) if args.name else _measure(args)
    except KeyboardInterrupt:
        print("experiments.on_device: interrupted; what was measured is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"experiments.on_device: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.on_device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="after which nothing more begins")
    parser.add_argument("--out", type=Path, help="folder of the figures")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, with commas")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--match", default="", help="only rows whose key, as JSON, this regular expression is found in")
    parser.add_argument("--commit", help="of the source tree, where git is not there to say")
    parser.add_argument("--name", metavar="TARGET", help="only find the largest that fits a target; needs no device")
    parser.add_argument("--draw", action="store_true", help="draw tables from the data; measure nothing")
    args = parser.parse_args(arguments)
    args.steps = [step.strip() for step in args.only.split(",") if step.strip()]
    if unknown := [step for step in args.steps if step not in STEPS]:
        parser.error(f"--only {args.only}: {unknown[0]!r} is no step; known: {', '.join(STEPS)}")
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: must be above 0")
    try:
        re.compile(args.match)
    except re.error as error:
        parser.error(f"--match {args.match}: {error}")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: is not a folder")
    return args


def _measure(args: argparse.Namespace) -> int:
    """All steps, on what JAX shows."""
    end = time.monotonic() + 60 * args.minutes
    try:
        header = process.ask("environment", None, SHARED, 180)
    except RuntimeError as error:
        raise ValueError(f"JAX shows no device: {error}") from None
    toy = header["platform"] == "cpu"
    folder = args.out or _folder(header["device"])
    if toy and args.out is None:
        raise ValueError("this is a CPU, where sizes are toys and figures of nothing: name a folder with --out")
    say = lambda text: print(text, file=sys.stderr, flush=True)
    say(f"{header['device']}, driver {header['driver']}, JAX {header['versions'].get('jax')}, figures to {folder}")
    if header["missing"]:
        say(f"not installed: {', '.join(header['missing'])}; what needs them, if anything, is left out")
    with _alone(folder):
        return _steps(args, folder, header, toy, end, say)


def _steps(args: argparse.Namespace, folder: Path, header: Row, toy: bool, end: float, say: Any) -> int:
    records = {step: Record(folder, step) for step in args.steps}
    for record in records.values():
        record.begin(header)
    stamp = {"commit": args.commit or commit(), "run": now()}
    bad = 0
    for i, step in enumerate(args.steps):
        share = SHARES[step] / sum(SHARES[later] for later in args.steps[i:])
        deadline = time.monotonic() + share * max(end - time.monotonic(), 0)
        try:
            bad += _step(step, records[step], header, toy, deadline, stamp, args, say)
        except Exception as error:  # a step that fails leaves the others
            bad += 1
            say(f"{step}: {type(error).__name__}: {error}")
    return 1 if bad else 0


def _step(step: str, record: Record, header: Row, toy: bool, deadline: float, stamp: Row, args: Any, say: Any) -> int:
    """Measures what a step's file lacks; how many rows failed or are left."""
    own = module(step)
    every = [key for key in own.keys(toy) if re.search(args.match, json.dumps(key))]
    every = [key for key in every if not _wants(key) & set(header["missing"])]
    done = lambda key: not args.again and _done(record.find({"key": key}))
    left = [key for key in every if not done(key)]
    named = {json.dumps(key): (record.find({"key": key}) or {}).get("named") for key in left}
    tasks = [{**key, "named": named[json.dumps(key)]} if named[json.dumps(key)] else key for key in left]
    environment = dict(SHARED)
    if step in ("layers", "steps") and (record.file.parent / "tuned.json").exists():
        environment["PALLAS_KERNELS_TUNED"] = str((record.file.parent / "tuned.json").resolve())
    room = int(0.9 * (header["bytes_limit"] or 4 << 30)) if step in ("kernels", "plans") else None
    say(f"{step}: {len(every) - len(left)} rows are there, {len(left)} to go")
    log = lambda key, text: _log(text)
    for task, row in process.rows(
        step, tasks, toy, header["device"], environment, deadline, own.PATIENCE, own.ahead, room, log
    ):
        key = {name: value for name, value in task.items() if name != "named"}
        words = " ".join(str(value) for value in key.values())
        if row.get("late"):
            say(f"{step}: {words}: no time left")
            continue
        before = record.find({"key": key}) or {}
        names: dict[str, Any] = {name: before[name] for name in ("target", "named", "named_at") if name in before}
        record.add({"key": key, **names, **row, **stamp})
        say(f"{step}: {words}: {_short(row)}")
        if step == "layers" and row.get("entries"):
            _write_tiles(own.table(record.rows, header["device"]), record.file.parent, header["figures"])
    if not every:
        say(f"{step}: no row matches {args.match!r}")
        return 1
    if bad := len(every) - sum(_done(record.find({"key": key})) for key in every):
        say(f"{step}: {bad} rows failed or are left")
    return bad


def _wants(key: Row) -> set[str]:
    """Modules without which a row cannot be."""
    return {"torch", "peft", "transformers"} if key.get("side") == "peft" else set()


def _done(row: Row | None) -> bool:
    """Whether a row has been measured, found right, and lacks no peer that is here now."""
    if row is None or not measured(row) or row.get("right") is False:
        return False
    return not row.get("without") or bool(missing(row["without"]))


def _short(row: Row) -> str:
    text = json.dumps({name: value for name, value in row.items() if name not in ("cases", "top")})
    return text if len(text) < 240 else text[:240] + " ..."


def _log(text: str) -> None:
    """Keeps the last of what a process wrote to stderr, in the file that ON_DEVICE_LOG names."""
    if os.environ.get("ON_DEVICE_LOG"):
        with open(os.environ["ON_DEVICE_LOG"], "a") as out:
            out.write(text[-6000:] + "\n----\n")


def _name(args: argparse.Namespace) -> int:
    """Finds what `fits` is to try on a target of `jaxpeft plan`, which takes its compiler minutes and no device."""
    import jax

    from experiments.on_device import fits
    from jaxpeft.memory import targets

    jax.config.update("jax_platforms", "cpu")
    target = targets.target(args.name)
    if target.platform == "cpu" or target.chips > 1:
        raise ValueError(f"--name {args.name}: one GPU or TPU is tried; name its kind, such as h100 or v5e")
    device = TARGETS[target.kind].names[0]
    record = Record(args.out or _folder(device), "fits")
    record.begin(record.header or {"device": device})
    if record.header["device"] not in TARGETS[target.kind].names:
        raise ValueError(f"{record.file}: figures of a {record.header['device']}, not of {target.name}")
    for key in fits.keys(False):
        if re.search(args.match, json.dumps(key)) and (args.again or record.find({"key": key}) is None):
            named = fits.largest(key, key["extent"], target)
            record.add({"key": key, "target": target.name, "named": named, "named_at": args.commit or commit()})
            print(f"fits: {' '.join(key.values())}: {named}", file=sys.stderr, flush=True)
    return 0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other run is at a folder's figures.

    Raises:
      ValueError: if one is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is measuring into it; wait for it, or use another --out") from None
    finally:
        os.close(handle)


def _folder(device: str) -> Path:
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _write_tiles(table: dict[str, Any], folder: Path, figures: bool) -> None:
    """Tiles beside the figures, and where the library reads them."""
    from pallas_kernels import tune, tuning

    tune.write(table, folder / "tuned.json")
    if figures and os.access(tuning.STORED.parent, os.W_OK):
        stored = tuning.read(tuning.STORED) if tuning.STORED.exists() else {}
        tune.write({**stored, **table}, tuning.STORED)


if __name__ == "__main__":
    sys.exit(main())
