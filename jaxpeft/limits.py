"""Limits of time and memory on what a checkpoint's files decide: its chat template, its tokenizer, its patterns.

`bounded` is for Python code (a template), which is stopped after its time, and may allocate so much and no more;
`waited` for code of another language (a tokenizer), which nothing stops: it is left alone after its time.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

MOST_BYTES = 2**30  # that `bounded` code may allocate beyond what the process has
_TICK = 0.05  # seconds between looks at the clock
_LOOK = 0.05  # between looks at the memory
_local = threading.local()  # span: the thread's _Span

T = TypeVar("T")

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None


class OutOfTime(BaseException):
    """What code in `bounded` meets when its time is over; no `except Exception` holds it up."""


class bounded:
    """Runs Python code with a deadline and, where the system can (Linux), a limit on its memory.

    In the main thread the deadline is a signal, which also ends a product of huge numbers; elsewhere it is found
    between two steps of the interpreter. The memory limit is the process's: other threads meet it meanwhile.

    Args:
      seconds: until OutOfTime; never later than one outside of it says.

    Raises:
      OutOfTime: when the time is over.
      MemoryError: for more than MOST_BYTES.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> None:
        self._own: contextlib.AbstractContextManager[_Span] | None = None
        span = getattr(_local, "span", None)
        if span is None:
            self._own = many()
            span = self._own.__enter__()
        self._span, self._before = span, span.deadline
        span.look()
        span.deadline = min(self._before, time.monotonic() + self._seconds)

    def __exit__(self, *error: Any) -> None:
        span = self._span
        span.deadline = self._before
        if span.stopped:
            span.take_back()
        if self._own is not None:
            self._own.__exit__(*error)


@contextlib.contextmanager
def many() -> Iterator[_Span]:
    """Makes every `bounded` in it cheap: what they need of the system is asked for once.

    The memory limit holds throughout: what is next to a `bounded` has to call `look` of what is given, often.
    """
    if (outer := getattr(_local, "span", None)) is not None:
        yield outer
        return
    span = _Span()
    _local.span = span
    clock = _alarm if _has_alarm() else _watched
    try:
        with _memory(), clock(span):
            span.look()
            yield span
    finally:
        _local.span = None


class _Span:
    """What `many` watches: a thread that may run until `deadline` (of `time.monotonic`)."""

    def __init__(self) -> None:
        self.deadline, self.thread, self.stopped, self._next_look = math.inf, threading.get_ident(), False, 0.0

    def look(self) -> None:
        """Sets the memory limit anew, above what the process has by now."""
        if (now := time.monotonic()) > self._next_look:
            self._next_look = now + _LOOK
            _set_limit()

    def take_back(self) -> None:
        """Takes back an OutOfTime that is on its way and comes too late."""
        with _lock:
            self.stopped = False
            _throw(self.thread, None)


def waited(seconds: float, call: Callable[[], T]) -> T:
    """What `call()` gives, or raises, run in a thread of its own.

    Raises:
      TimeoutError: if that takes longer; the thread is left behind and holds up nothing, the process's end included.
    """
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=run, daemon=True, name="jaxpeft-waited").start()
    try:
        good, value = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"took longer than {seconds:.3g} s") from None
    if not good:
        raise value
    return value


# Time.


def _has_alarm() -> bool:
    own = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    return own and signal.getsignal(signal.SIGALRM) is not None  # one that Python can put back


@contextlib.contextmanager
def _alarm(span: _Span) -> Iterator[None]:
    def over(number: int, frame: Any) -> None:
        if time.monotonic() > span.deadline:
            raise OutOfTime

    started, handler = time.monotonic(), signal.signal(signal.SIGALRM, over)
    left, interval = signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
    try:
        yield
    finally:
        if left:  # somebody's own alarm
            left = max(left - (time.monotonic() - started), 1e-3)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


_watching: set[_Span] = set()
_lock = threading.Lock()
_guard: list[threading.Thread] = []  # the thread that looks at the clock, while there is something to watch


@contextlib.contextmanager
def _watched(span: _Span) -> Iterator[None]:
    with _lock:
        _watching.add(span)
        if not _guard:
            _guard.append(threading.Thread(target=_watch, daemon=True, name="jaxpeft-limits"))
            _guard[0].start()
    try:
        yield
    finally:
        with _lock:
            _watching.discard(span)


def _watch() -> None:
    while True:
        time.sleep(_TICK)
        with _lock:
            for span in _watching:
                if time.monotonic() > span.deadline:
                    span.stopped = True
                    _throw(span.thread, OutOfTime)
            if not _watching:
                _guard.clear()
                return


def _throw(thread: int, error: type[BaseException] | None) -> None:
    """Raises an error in a thread at its next step; None takes back one that it has not met yet."""
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)


# Memory.

_holders = 0
_before: list[tuple[int, int]] = []  # the process's own limits, while there is one of ours
_statm: dict[int, int] = {}  # process -> descriptor


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """At its end, the process has its own limit again; of several at a time, when the last one ends."""
    global _holders
    with _lock:
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders and _before:
                resource.setrlimit(resource.RLIMIT_AS, _before.pop())


def _set_limit() -> None:
    """Limits the process's memory to what it has and MOST_BYTES, where the system has such a limit."""
    if resource is None:
        return
    with contextlib.suppress(OSError, ValueError), _lock:
        soft, hard = _before[0] if _before else resource.getrlimit(resource.RLIMIT_AS)
        wanted = _mapped() + MOST_BYTES
        if soft == resource.RLIM_INFINITY or wanted < soft:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
            if not _before:
                _before.append((soft, hard))


def _mapped() -> int:
    """Bytes of the process's address space that are in use.

    Raises:
      OSError: where the system does not say.
    """
    pid = os.getpid()
    if pid not in _statm:  # opened once, as rows are rendered by the thousand
        _statm.clear()
        _statm[pid] = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    return int(os.pread(_statm[pid], 64, 0).split(None, 1)[0]) * os.sysconf("SC_PAGE_SIZE")
