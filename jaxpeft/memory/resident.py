"""What a call adds to the memory of this process, by Linux's count of its resident pages (proc(5))."""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxpeft.errors import InputError

_PROCESS = Path("/proc/self")


def most_resident(call: Callable[[], Any]) -> int:
    """Bytes that are resident at the peak of a call, until its results are ready, above those before it.

    Raises:
      InputError: where there is no such count.
    """
    try:
        _settle()
        with contextlib.suppress(AttributeError):  # freed memory that the allocator keeps would be taken unseen
            ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")  # the peak begins anew
        before = _bytes("VmRSS")
        jax.block_until_ready(call())
        return _bytes("VmHWM") - before
    except OSError as error:
        raise InputError(f"no memory statistics on this cpu: {error}; measure on Linux, a GPU or a TPU") from error


def _settle(polls: int = 40, seconds: float = 0.05) -> None:
    """Waits until threads that run on, as a device's do, give nothing more back."""
    last = _bytes("VmRSS")
    for _ in range(polls):
        time.sleep(seconds)
        now = _bytes("VmRSS")
        if now >= last:
            return
        last = now


def _bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
