"""SIGTERM and SIGINT as a request that the loop reads, so that a run ends between two steps.

A step may take minutes, in which Python runs no handler: its main thread waits inside the compiled program. So a thread
of ours reads the numbers of signals as they come (`signal.set_wakeup_fd`), says of the first that it has been heard,
and ends the process at the second. What a run has written by then stays: a checkpoint appears whole or not at all, and
rows of metrics are flushed one by one.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """A context in which SIGTERM and SIGINT are noted in `received` instead of ending the process.

    A second one ends it at once, with the exit status 128 + its number; where somebody types Python, a second SIGINT
    is a KeyboardInterrupt instead, as soon as Python has its turn. Outside the main thread, where Python allows no
    handlers, nothing is changed.

    Args:
      stream: where the answers are written; None: stderr.
      end: is called with the exit status.
    """

    received: int | None = None

    def __init__(self, stream: TextIO | None = None, end: Callable[[int], Any] = os._exit):
        self._stream, self._end = stream, end

    def __enter__(self) -> Signals:
        self._old: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)  # as `set_wakeup_fd` demands
        self._thread = threading.Thread(target=self._answer, name="signals", daemon=True)
        self._thread.start()
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._note) for number in _NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        if not self._old:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._write.close()
        self._thread.join()
        self._read.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.received and _typed():
            raise KeyboardInterrupt
        self.received = self.received or number

    def _answer(self) -> None:
        """The thread: a byte for each signal of any kind, until the other end is closed."""
        first = True
        while byte := self._read.recv(1):
            number = byte[0]
            if number not in _NUMBERS:
                continue
            name = signal.Signals(number).name
            if first:
                self._say(
                    f"{name}: waits for the end of this step (the first one compiles), to save the run there; "
                    "a second signal ends it at once"
                )
                first = False
            elif not (number == signal.SIGINT and _typed()):
                self._say(f"{name} again: ended at once; what was saved stays, and --resume goes on from it")
                self._end(128 + number)

    def _say(self, text: str) -> None:
        stream = self._stream or sys.stderr
        shown = "\x1b[?25h" if stream.isatty() else ""  # the cursor, which a progress bar hides
        stream.write(f"{shown}\n{text}\n" if shown else f"{text}\n")
        stream.flush()

    @property
    def name(self) -> str:
        """The name of what was received."""
        return signal.Signals(self.received).name if self.received else ""


def _typed() -> bool:
    """Whether this is a session in which somebody types Python, whose process is not ours to end."""
    return hasattr(sys, "ps1")
