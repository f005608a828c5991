"""SIGINT and SIGTERM end the command: one line on stderr, the exit status 128 + the signal's number, no traceback.

The first one raises `Interrupted` in the main thread, so that `finally` and context managers have their turn. Four
things can keep it from ending the process, and none of them may:

    Python drops what is raised in a callback of the garbage collector (JAX has one) or in a `__del__`, says "Exception
    ignored in ...", and goes on: it is silent then, and raised anew a moment later, by a signal of ours;
    C code that is being imported prints it, or crashes over it, and JAX's look for plugins logs it: there it waits;
    somebody else swallows it, or the main thread is in a compiler, where Python runs no handler: a thread that reads
    the numbers of signals as they come (`signal.set_wakeup_fd`) ends the process GRACE_SECONDS after the first;
    what is undone takes its time: the thread ends the process at the second.

While a run trains, `jaxpeft.train.signals` has the signals, and what it took over afterwards is this again. Imports are
few, as what comes before is not ours.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import types

GRACE_SECONDS = 5.0
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
# Functions, by their qualified names, in which nothing is raised.
_WAITS = ("ExtensionFileLoader.create_module", "ExtensionFileLoader.exec_module", "discover_pjrt_plugins")
_AGAIN, _ANSWERED = b"\0", b"\xff"  # which are no signals' numbers


class Interrupted(KeyboardInterrupt):
    """A signal, `number`, that is to end the command."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class EndTheCommand:
    """A context, of the command's own process alone, in which the signals end it as above.

    After it the handlers stay: a signal while Python itself ends is one line, too, instead of a traceback of its parts.
    """

    number: int | None = None  # what the command is to end by

    def __enter__(self) -> "EndTheCommand":
        global _within
        _open_standard()
        self._main = threading.get_ident()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # as `set_wakeup_fd` demands
        threading.Thread(target=self._listen, name="interrupts", daemon=True).start()
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _NUMBERS:
            signal.signal(number, self._raise)
        os.register_at_fork(after_in_child=_as_python_has_them)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._dropped
        self._over = False
        _within = self
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        if (
            self.number
        ):  # whatever an `except` has made of it; Python's own end could only stumble over what is half done
            _end(self.number)

    def answered(self) -> None:
        """See `answered` below."""
        self.number = None
        self._tell(_ANSWERED)

    def _raise(self, number: int, frame: types.FrameType | None) -> None:
        if self._over:
            _end(number)
        self.number = number
        while frame:
            if frame.f_code.co_qualname in _WAITS:
                return self._tell(_AGAIN)
            frame = frame.f_back
        raise Interrupted(number)

    def _dropped(self, what: "sys.UnraisableHookArgs") -> None:
        if isinstance(what.exc_value, Interrupted):
            self._tell(_AGAIN)
        elif what.exc_type.__name__ != "OutOfTime":  # of `jaxpeft.limits`, which raises it again
            self._unraisable(what)

    def _tell(self, byte: bytes) -> None:
        with contextlib.suppress(BlockingIOError):  # thousands of signals are in it
            os.write(self._write, byte)

    def _listen(self) -> None:
        """The thread: a byte for each signal of any kind, and for what the main thread has to say."""
        first, ours, timer = 0, 0, None
        while byte := os.read(self._read, 1):
            number = byte[0]
            if byte == _AGAIN:
                ours += 1
                time.sleep(0.02)  # out of the callback
                signal.pthread_kill(self._main, first)
            elif byte == _ANSWERED and timer:
                timer.cancel()
                timer = None
            elif number in _NUMBERS and ours:
                ours -= 1
            elif number in _NUMBERS and timer:
                _end(number)
            elif number in _NUMBERS:
                first, timer = number, threading.Timer(GRACE_SECONDS, _end, (number,))
                timer.daemon = True
                timer.start()


_within: EndTheCommand | None = None
_ending = threading.RLock()  # never given back


def answered() -> None:
    """Says that an `Interrupted` was caught and has done what it was for: the command goes on."""
    if _within:
        _within.answered()


def _open_standard() -> None:
    """Opens what of stdin, stdout and stderr is closed, so that no file of ours gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _as_python_has_them() -> None:
    """In a process that was forked, whose signals are none of the command's: its pool may end it by one."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int) -> None:
    """Says the line and ends the process; written without `sys.stderr`, which the main thread may hold."""
    line = f"jaxpeft: interrupted by {signal.Signals(number).name}\n"
    _ending.acquire()
    try:
        # In a terminal ^C stands before it, and a bar may have hidden the cursor.
        os.write(2, (f"\x1b[?25h\n{line}" if os.isatty(2) else line).encode())
    finally:
        os._exit(128 + number)
