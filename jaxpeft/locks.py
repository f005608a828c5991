"""Locks that die with their process: a file that is locked with `flock` and says who holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What file systems without locks answer.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Held(Exception):
    """A living process holds the lock; the text is what it wrote into the file."""


@contextlib.contextmanager
def held(file: Path, text: str | None = None, remove: bool = False) -> Iterator[None]:
    """A context in which this process holds the lock of a file.

    Args:
      file: whoever removes it must hold its lock.
      text: what the file then holds; it is made where there is none. None: it is left as it is, and must be there.
      remove: whether it is removed at the end.

    Raises:
      Held: if another process has it.
      OSError: if the file cannot be opened, or its file system has no locks (UNSUPPORTED).
    """
    handle = _open(file, text is not None)
    try:
        if text is not None:
            os.ftruncate(handle, 0)
            os.pwrite(handle, text.encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            if remove and _is(handle, file):
                os.unlink(file)
        os.close(handle)


def _open(file: Path, make: bool) -> int:
    """A descriptor of the file that has its lock."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(file))
    while True:
        handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if make else 0), 0o644)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "is no regular file", str(file))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(handle, file):
                return handle
        except BlockingIOError:
            text = os.pread(handle, 1000, 0).decode("utf-8", "replace")
            os.close(handle)
            raise Held(text) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has removed it meanwhile


def _is(handle: int, file: Path) -> bool:
    """Whether a descriptor is of the file that has the name now."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False
