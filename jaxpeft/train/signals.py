"""SIGTERM and SIGINT as a request that the loop reads, so that a run ends between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """A context in which SIGTERM and SIGINT are noted in `received` instead of ending the process.

    A second SIGINT ends it. Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    received: int | None = None

    def __enter__(self) -> Signals:
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @property
    def name(self) -> str:
        """The name of what was received."""
        return signal.Signals(self.received).name if self.received else ""
