"""A run's folder, in which one process runs at a time: OUT/.lock, for as long as the process lives."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from jaxpeft import distributed, locks
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
    if not distributed.is_first():
        yield
        return
    whole = out.absolute()
    made = [path for path in (whole, *whole.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        for path in reversed(made):
            stack.callback(_remove_empty, path)
        _lock(out, stack)
        yield


def check_shared(file: Path, patience: float = 20.0) -> None:
    """Waits until each of several processes sees the file that the first one has written.

    Raises:
      InputError: if it does not appear within some seconds: the folder is not the same everywhere.
    """
    distributed.meet()
    until = time.monotonic() + patience  # a network's file system may need some
    while distributed.group() is not None and not file.exists():
        if time.monotonic() > until:
            raise InputError(
                f"--out {file.parent}: is another folder on {platform.node()} than on process 0's machine;"
                " several processes need one that all of them see"
            )
        time.sleep(0.2)


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
