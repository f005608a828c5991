"""A run's folder, in which one process runs at a time: OUT/.lock, for as long as the process lives."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxpeft import locks
from jaxpeft.errors import InputError, Notice

LOCK = ".lock"


class Taken(InputError):
    """Another process runs in the folder."""


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """A context in which no other process runs in a folder.

    The folder is made where it is not there, and what was made is gone afterwards if nothing was written. Of several
    processes that train one model together, the first has it for all.

    Raises:
      Taken: if another process runs in it; the line says which.
      OSError: if it cannot be made or written in.
    """
    if jax.distributed.is_initialized() and jax.process_index() > 0:
        yield
        return
    whole = out.absolute()
    made = [path for path in (whole, *whole.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        for path in reversed(made):
            stack.callback(_remove_empty, path)
        _lock(out, stack)
        yield


def _lock(out: Path, stack: contextlib.ExitStack) -> None:
    """Makes the folder and takes its lock until the stack's end."""
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
            own = f"process {os.getpid()} on {platform.node()}"
            stack.enter_context(locks.held(out / LOCK, own, remove=True))
        except FileNotFoundError:
            if out.is_dir():
                raise
            continue  # a run that was refused has removed what it made
        except locks.Held as held:
            who = str(held) or "another process"
            raise Taken(f"--out {out}: {who} runs in it; wait for its end, or give another folder") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.EINVAL):
                raise InputError(f"--out {out}: its lock, {out / LOCK}, {error.strerror}; remove it") from None
            if error.errno not in locks.UNSUPPORTED:
                raise
            (out / LOCK).unlink(missing_ok=True)
            warnings.warn(f"{out}: no lock keeps a second run out of it: {error.strerror}", Notice, 4)
        return


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
