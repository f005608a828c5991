"""What the devices do in some steps, recorded by JAX's profiler for XProf or Perfetto."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from jaxpeft import distributed
from jaxpeft.errors import InputError


def parse(text: str) -> tuple[int, int]:
    """(first, last) of "3-5", or of "3".

    Raises:
      InputError: for what is none.
    """
    found = re.fullmatch(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if last < first:
        raise InputError(f"--profile-steps {text}: should be a step or FIRST-LAST, counted from 1, as 10-12")
    return first, last


class Trace:
    """Records steps of a run.

    Args:
      folder: where the trace is written.
      steps: as `parse` reads them; None records nothing.
      process: which of several processes records.
    """

    def __init__(self, folder: Path, steps: str | None, process: int = 0):
        group = distributed.group()
        here = group is None or group.index == process
        self._folder, self._goes_on = folder, False
        self._first, self._last = parse(steps) if steps and here else (0, 0)

    def before(self, step: int) -> None:
        """Begins where this step is the first of those that are left."""
        if not self._goes_on and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._goes_on = True

    def after(self, step: int, results: Any) -> None:
        """Ends with the last step, once its results are there."""
        if self._goes_on and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what has been recorded."""
        if self._goes_on:
            self._goes_on = False
            jax.profiler.stop_trace()
