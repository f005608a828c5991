"""Worker processes, in waves: all of a wave prepare at one time, then they measure, one by one or as memory allows."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.on_device.record import ROOT

Key = dict[str, Any]
_NESTED = "ON_DEVICE_WORKER"  # set in the environment of workers


class Worker:
    """A process for one row; see worker.py."""

    def __init__(self, step: str, key: Any, toy: bool, device: str, environment: Mapping[str, str]):
        self.key, self.log = key, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.need, self.status = 0, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.on_device.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment, _NESTED: "1"},
            start_new_session=_NESTED not in os.environ,  # a worker's own workers end with it
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._into, self._out = self.process.stdin, self.process.stdout
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.say(json.dumps({"step": step, "key": key, "toy": toy, "device": device}))

    def _read(self) -> None:
        for line in self._out:
            if line.startswith("@"):
                self._lines.put(line[1:].strip())
        self._lines.put(None)

    def say(self, line: str) -> None:
        """Writes a line to its stdin; one that has ended does not read it."""
        with contextlib.suppress(OSError):
            self._into.write(line + "\n")
            self._into.flush()

    def hear(self, seconds: float) -> str | None:
        """Its next line; None if it has ended without one. Raises TimeoutError."""
        try:
            return self._lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            raise TimeoutError from None

    def end(self) -> str:
        """Ends it, and whatever it has started, and gives what it wrote to stderr; "" if it was ended before."""
        if self.log.closed:
            return ""
        if _NESTED in os.environ:
            self.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.status = self.process.wait()
        self._reader.join(10)
        for pipe in (self._into, self._out):
            with contextlib.suppress(OSError):
                pipe.close()
        self.log.seek(0)
        text = self.log.read()
        self.log.close()
        return text


def ask(step: str, key: Any, environment: Mapping[str, str], seconds: float, toy: bool = False) -> Any:
    """What a process of its own finds, at once.

    Raises:
      RuntimeError: with the reason, if it finds nothing.
    """
    worker, until = Worker(step, key, toy, "", environment), time.monotonic() + seconds
    try:
        said = _hear(worker, until)
        if said is not None and said.startswith("ready"):
            worker.say("go")
            said = _hear(worker, until)
        if said is not None and said.startswith("row "):
            return json.loads(said[4:])
        raise RuntimeError(_failure(worker, said, until + 1, lambda key, text: None)["failed"])
    finally:
        worker.end()


def rows(
    step: str,
    keys: Sequence[Key],
    toy: bool,
    device: str,
    environment: Mapping[str, str],
    deadline: float,
    patience: float,
    ahead: Callable[[Key], int],
    room: int | None = None,
    log: Callable[[Key, str], None] = lambda key, text: None,
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """(key, what was measured, or {"failed": why}) of each key, until the deadline.

    A row for which there was not enough memory beside those that wait is measured again, alone.

    Args:
      step: its name.  keys: in the order of their worth.  toy: whether sizes are those for a CPU.
      device: its kind, as JAX names it.
      environment: variables of the processes.
      deadline: of `time.monotonic()`; nothing begins after it, and what runs then is ended.
      patience: seconds for the preparation, and again for the measurement, of a row.
      ahead: how many rows like this one may be prepared at one time.
      room: bytes; rows measure at one time as long as the sum of their needs is below it. None: one by one.
      log: is told what a process wrote to stderr.
    """
    left, alone = list(keys), False
    again: list[Key] = []
    while (left or again) and time.monotonic() < deadline:
        if not left:
            left, again, alone = again, [], True
        wave = [left[0]]
        while not alone and len(wave) < len(left) and len(wave) < min(map(ahead, (*wave, left[len(wave)]))):
            wave.append(left[len(wave)])
        left = left[len(wave) :]
        workers = [Worker(step, key, toy, device, environment) for key in wave]
        for worker, said in _wave(workers, deadline, patience, room):
            if said is not None and said.startswith("row "):
                log(worker.key, worker.end())
                yield worker.key, json.loads(said[4:])
                continue
            found = _failure(worker, said, deadline, log)
            if len(wave) > 1 and _NO_MEMORY.search(found.get("failed", "")):
                again.append(worker.key)
            else:
                yield worker.key, found


_NO_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


def _wave(
    workers: Sequence[Worker], deadline: float, patience: float, room: int | None
) -> Iterator[tuple[Worker, str | None]]:
    """(worker, its last line) of rows that prepare at one time; whatever happens, none of them is left."""
    try:
        yield from _measured(workers, deadline, patience, room)
    finally:
        for worker in workers:
            worker.end()


def _measured(
    workers: Sequence[Worker], deadline: float, patience: float, room: int | None
) -> Iterator[tuple[Worker, str | None]]:
    until = min(deadline, time.monotonic() + patience)
    waiting = []
    for worker in workers:
        said = _hear(worker, until)
        if said is not None and said.startswith("ready"):
            worker.need = int(said.split()[1])
            waiting.append(worker)
        else:
            yield worker, said
    while waiting:
        together = [waiting.pop(0)]
        while waiting and room is not None and sum(w.need for w in (*together, waiting[0])) <= room:
            together.append(waiting.pop(0))
        until = min(deadline, time.monotonic() + patience)
        for worker in together:
            worker.say("go")
        for worker in together:
            yield worker, _hear(worker, until)


def _hear(worker: Worker, until: float) -> str | None:
    try:
        return worker.hear(until - time.monotonic())
    except TimeoutError:
        return "late"


def _failure(worker: Worker, said: str | None, deadline: float, log: Callable[[Key, str], None]) -> dict[str, Any]:
    text = worker.end()
    log(worker.key, text)
    if said == "late":
        return {"late": True} if time.monotonic() >= deadline else {"failed": "took too long"}
    if said is not None and said.startswith("failed "):
        return {"failed": json.loads(said[7:])}
    last = (text.strip().splitlines() or ["no message"])[-1]
    return {"failed": f"ended with status {worker.status}: {last[:300]}"}
