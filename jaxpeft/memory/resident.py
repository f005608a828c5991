"""What a call takes of memory: of an accelerator's by its allocator, of a process's by Linux's count (proc(5))."""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError

_PROCESS = Path("/proc/self")


def measured_peak(function: Callable[..., Any], *args: Any) -> int:
    """Bytes in use at the peak, on the attached device, after `function(*args)` has run.

    An accelerator's allocator counts from the start of the process: measure in a fresh one, whose arguments are what
    the plan has. A CPU's memory is the process's, of which Linux says the most that was resident: what `function`,
    compiled (`jax.stages.Compiled`), adds to its arguments while it runs.

    Raises:
      InputError: if neither keeps such statistics.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        jax.block_until_ready(function(*jax.tree.map(jnp.copy, args)))  # the code comes into memory, too, once
        return sum(x.nbytes for x in jax.tree.leaves(args)) + most_resident(lambda: function(*args))
    jax.block_until_ready(function(*args))
    statistics = device.memory_stats()
    if not statistics or "peak_bytes_in_use" not in statistics:
        raise InputError(f"no memory statistics on {device.platform}: measure on an attached GPU or TPU")
    return int(statistics["peak_bytes_in_use"])


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
