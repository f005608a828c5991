"""Limits of time and memory on what a checkpoint's files decide: its chat template, its tokenizer, its patterns.

bounded    Python code (a template): stopped after its time; it may allocate so much and no more
waited     code of another language (a tokenizer), which nothing stops: left alone after its time
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jaxpeft.errors import InputError

MOST_BYTES = 2**30  # that `bounded` code may allocate beyond what the process has
_AGAIN = 0.25  # seconds between the attempts to stop what has not stopped

T = TypeVar("T")


class OutOfTime(BaseException):
    """What code in `bounded` meets when its time is over; no `except Exception` holds it up."""


@contextlib.contextmanager
def bounded(seconds: float, most_bytes: int | None = None) -> Iterator[None]:
    """Runs Python code with a deadline and, where the system can (Linux), a limit on its memory.

    In the main thread the deadline is a signal, which also ends a product of huge numbers; elsewhere it is found
    between two steps of the interpreter. The memory limit is the process's: other threads meet it meanwhile.

    Args:
      seconds: until OutOfTime.
      most_bytes: what may be allocated, MOST_BYTES where it is None.

    Raises:
      OutOfTime: when the time is over.
      MemoryError: for more memory.
    """
    deadline = _alarm if _has_alarm() else _watched
    with _memory(MOST_BYTES if most_bytes is None else most_bytes), deadline(seconds):
        yield


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
        raise TimeoutError(f"took longer than {seconds:g} s") from None
    if not good:
        raise value
    return value


# Time.


def _has_alarm() -> bool:
    own = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    return own and signal.getsignal(signal.SIGALRM) is not None  # one that Python can put back


def _over(number: int, frame: Any) -> None:
    raise OutOfTime


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    started, handler = time.monotonic(), signal.signal(signal.SIGALRM, _over)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        if left:  # somebody's own alarm, or an outer `bounded`
            left = max(left - (time.monotonic() - started), 1e-3)
        try:
            signal.setitimer(signal.ITIMER_REAL, left, interval)
        finally:
            signal.signal(signal.SIGALRM, handler)


class _Watched:
    """A thread that may run until `deadline` (of `time.monotonic`)."""

    def __init__(self, deadline: float):
        self.deadline, self.thread, self.stopped = deadline, threading.get_ident(), False


_all: set[_Watched] = set()
_lock = threading.Lock()
_guard: list[threading.Thread] = []  # the thread that looks at the clock, while there is something to watch


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[None]:
    own = _Watched(time.monotonic() + seconds)
    with _lock:
        _all.add(own)
        if not _guard:
            _guard.append(threading.Thread(target=_watch, daemon=True, name="jaxpeft-limits"))
            _guard[0].start()
    try:
        yield
    finally:
        try:
            _release(own)
        except OutOfTime:  # on its way when the work was done
            _release(own)
            raise


def _release(own: _Watched) -> None:
    with _lock:
        _all.discard(own)
        if own.stopped:
            _throw(own.thread, None)


def _watch() -> None:
    idle = 0
    while idle < 40:  # ten seconds
        time.sleep(_AGAIN)
        with _lock:
            idle = 0 if _all else idle + 1
            for one in _all:
                if time.monotonic() > one.deadline:
                    one.stopped = True
                    _throw(one.thread, OutOfTime)
            if idle >= 40:
                _guard.clear()


def _throw(thread: int, error: type[BaseException] | None) -> None:
    """Raises an error in a thread at its next step; None takes back one that it has not met yet."""
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)


# Memory.

_holders = 0
_before: list[tuple[int, int]] = []
_statm: dict[int, int] = {}  # process -> descriptor


@contextlib.contextmanager
def _memory(most_bytes: int) -> Iterator[None]:
    """Limits the process's memory to what it has and `most_bytes`; of several at a time the first one's holds."""
    global _holders
    with _lock:
        _holders += 1
        if _holders == 1:
            _set_limit(most_bytes)
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders:
                _unset_limit()


def _set_limit(most_bytes: int) -> None:
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = _mapped() + most_bytes
        if soft == resource.RLIM_INFINITY or wanted < soft:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
            _before.append((soft, hard))
    except (ImportError, OSError, ValueError):  # no such limit on this system
        pass


def _unset_limit() -> None:
    if _before:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, _before.pop())


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


def too_long(where: str, size: int, most: int, unit: str = "characters") -> InputError:
    """The error about a text of more than `most` characters or bytes."""
    return InputError(f"{where}: has {size} {unit}; at most {most} are taken")
