"""A run in its folder, begun or continued: from a `Run` to its report.

    OUT/config.json      how the run was begun
    OUT/metrics.jsonl    a row per step and evaluation; as events in OUT/tensorboard/, as a picture in OUT/loss.png
    OUT/checkpoints/     see `jaxpeft.checkpoint`
    OUT/adapter/         the result, in PEFT's form or, where PEFT has none, in ours (see `jaxpeft.peft`); OUT/model/, a
                         whole checkpoint, where the base itself trained; OUT/adapters/NAME/, of each of several
    OUT/trace/           what the devices did in the steps of --profile-steps
    OUT/report.json      written last: the run is finished

A run is a function of its configuration alone: killed at any moment and resumed, it ends with the same bits (see
`jaxpeft.train.loop`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import time
from pathlib import Path
from typing import Any

import jax

from jaxpeft import distributed, files, hf, models
from jaxpeft.checkpoint import Checkpoints, on_disk
from jaxpeft.errors import InputError, RunError, out_of_memory
from jaxpeft.peft import adapter_rope_scaling
from jaxpeft.train import config, folder, several
from jaxpeft.train.checks import flag
from jaxpeft.train.loop import Loop
from jaxpeft.train.prepare import asked_method, prepare, sources
from jaxpeft.train.progress import say
from jaxpeft.train.run import Run
from jaxpeft.train.signals import Signals

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(args: Run) -> dict[str, Any]:
    """Trains, or continues, and returns the report (see `jaxpeft.train.report`).

    Args:
      args: the run, settled and checked, with `out` set (`jaxpeft.train.run.run` sees to these). Without a dtype it has
        that of the run to be continued, else `models.compute_dtype`'s.

    Raises:
      InputError: for arguments or files that cannot be used; nothing has been written then.
      RunError: for a run that cannot go on: a loss that is not finite (status 1), a full disk (2), SIGTERM (143),
        SIGINT (130), a folder that is gone (2).
    """
    assert args.out is not None
    out = args.out
    if args.adapter is not None:
        args = dataclasses.replace(args, rope_scaling=adapter_rope_scaling(args.adapter, args.rope_scaling))
    if args.adapters:
        args = dataclasses.replace(args, rope_scaling=several.scaling_of(args))
    old = finished = None
    if args.resume:
        old = config.read(out)
        day = args.template_date or config.stored_date(old)
        args = dataclasses.replace(args, dtype=args.dtype or old.get("arguments", {}).get("dtype"), template_date=day)
        method = asked_method(args)
        asked = config.describe(args, method.specs if method and not args.adapters else (), {})
        config.check_arguments(out, old, asked)
        finished = _report_of(out, args.steps)
        if finished is not None and not config.named_otherwise(old, asked):
            return _said(finished)
        old = config.with_steps(old, args.steps)
    elif distributed.is_first():  # which is making it, while others may look
        config.check_folder(out)
    try:
        with folder.alone(out):
            return _alone(args, out, old, finished)
    except OSError as error:
        if isinstance(error.__context__, RunError):  # a log that could not be closed after it
            raise error.__context__ from None
        if error.errno in _NO_ROOM:
            raise RunError(f"{error.filename or out}: not written: {error.strerror}; {_good(out)}", 2) from error
        if isinstance(error, PermissionError | NotADirectoryError) or error.errno == errno.EROFS:
            raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
        raise


def _alone(args: Run, out: Path, old: dict[str, Any] | None, finished: dict[str, Any] | None) -> dict[str, Any]:
    """`train`, where no other process runs in the folder; `old` is the document of a run that is continued.

    `finished`: its report, if it has no more steps to take; its files have other names then, and are compared.
    """
    if old is None and distributed.is_first():
        config.check_new(out)
    if (group := distributed.group()) is not None:
        group.agree(config.shared(args))
    started = time.monotonic()
    if args.dtype is None:
        chosen: Any = models.compute_dtype(hf.load_config(sources(args).model))
        args = dataclasses.replace(args, dtype=chosen)
    continued = args.resume and bool(on_disk(out / "checkpoints"))
    job = prepare(args, continued)
    if group is not None:
        group.agree({flag(name): digest for name, digest in job.document["content"].items()})
    if old is not None:
        config.check_same(out, old, job.document)
    if finished is not None:
        return _said(finished)
    for report in job.data.reports.values():
        say(report.summary())
    loop: Loop | None = None
    try:
        if distributed.is_first():
            files.clear_leftovers(out)
            files.write_json(out / config.FILE, old or job.document, allow_nan=False)
            (out / config.REPORT).unlink(missing_ok=True)  # of fewer steps
        folder.check_shared(out / config.FILE)
        on_mesh = contextlib.nullcontext() if job.mesh is None else jax.set_mesh(job.mesh)
        with (
            Signals() as signals,
            Checkpoints(out / "checkpoints", args.keep) as checkpoints,
            on_mesh,
            distributed.failing(),
        ):
            if continued and checkpoints.latest() is None:  # all of them are damaged
                job = prepare(args)
            loop = Loop(args, job, old or job.document, checkpoints, signals)
            return loop.whole(started)
    except (InputError, MemoryError, jax.errors.JaxRuntimeError) as error:
        # What a step refuses is seen only where it is traced, and that it does not fit where it runs.
        lacking = out_of_memory(error)
        if lacking is None and not isinstance(error, InputError):
            raise
        begun = loop is not None and math.isfinite(loop.loss)  # a step that was called may not have ended
        if old is None and distributed.is_first() and not begun:
            config.take_back(out)
        if lacking is None:
            raise
        if begun:
            raise RunError(f"{lacking}; {_good(out)}", 2) from error
        raise InputError(lacking) from error


def _good(out: Path) -> str:
    """What a run that cannot go on has left to go on from."""
    good = on_disk(out / "checkpoints")
    return f"last good checkpoint: step {good[-1]}" if good else "no checkpoint has been written yet"


def _report_of(out: Path, steps: int) -> dict[str, Any] | None:
    """The report of a run that is finished, wherever it lies by now; None where there is none, a damaged one, which is
    made again, one of fewer steps, or one without what the run has made.
    """
    if not (out / config.REPORT).exists():
        return None
    try:
        report = config.read_report(out)
    except InputError as error:
        say(f"{error}; it is made again")
        return None
    if report["steps"] < steps:
        return None
    if not any((out / name).exists() for name in config.RESULTS):
        say(f"{out}: what the run wrote is gone; it is made again")
        return None
    return {**report, "out": str(out)}


def _said(report: dict[str, Any]) -> dict[str, Any]:
    say(f"{report['out']}: the run is finished; this is its report")
    return report
