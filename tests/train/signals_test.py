"""Two signals while the main thread is inside a compiled program, where Python runs no handler."""

import ctypes
import io
import os
import signal
import threading

import pytest

from jaxpeft.train.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_answered_and_the_second_ends_at_once(number):
    """A locked mutex stands for the program: waiting for it, no signal gives Python its turn."""
    lib, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    ended, said, heard = [], io.StringIO(), threading.Event()

    class Stream(io.StringIO):
        def write(self, text):
            heard.set()
            return said.write(text)

    def end(status):
        ended.append(status)
        lib.pthread_mutex_unlock(mutex)

    def send():
        os.kill(os.getpid(), number)
        heard.wait(60)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    lib.pthread_mutex_lock(mutex)
    with Signals(Stream(), end) as signals:
        threading.Timer(0.05, send).start()
        lib.pthread_mutex_lock(mutex)  # until `end`
    assert ended[0] == 128 + number and signals.received == number
    first, second = said.getvalue().splitlines()
    assert "waits for the end of this step" in first and "a second signal ends it at once" in first
    assert "ended at once" in second and first.startswith(signal.Signals(number).name)
    assert signal.getsignal(number) is before
