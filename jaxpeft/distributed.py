"""Several processes that train one model together, each with the devices that it sees.

    with joined(Place(processes=4, process_id=2, coordinator="host:1234")):  # before anything asks for a device
        mesh = sharding.make_mesh("fsdp=8")                                  # over the devices of all of them
        leaf = shares.placed(leaf, where)                                    # each keeps what its own devices hold
        number = from_first(lambda: ...)                                     # what the first one finds, in all of them

Beside `jax.distributed`, in whose key-value store all of this is said, a thread in each process:

    beat/I     a number that process I changes every other second; the first process looks at them all
    doubt/I    process I has met an error that another's death may have caused
    failure    {"status", "line", "process"}, written once, by whoever is first to fail or to find that another has died
    left/I     process I is about to end

Who finds that another has failed ends itself, whatever it is doing: an operation of the devices waits for ever for a
process that is no more. One of them says why. The first process hosts the store, so that it is the last to end; where
it dies itself, the others hear of it when JAX ends them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxpeft.errors import Elsewhere, InputError, first_line, printable, shown, status_of
from jaxpeft.launched import Place

PERIOD = 2.0  # seconds between two beats
SILENCE = 30.0  # seconds without one after which a process is taken for dead
_SILENCE_AFTER_FAILURE = 8.0  # the same, where an operation between devices has failed
_PARTING = 10.0  # seconds in which a process that has failed, and then the first one, is to end
# JAX's own heartbeat ends all processes without a word of whose fault it was; it comes after ours.
_JAX_HEARTBEAT = 100
_ARRIVAL = 300  # seconds that a process waits for the others at the start
_NOTICE = 20  # seconds after which it says so


# What the processes know of each other.


class Group:
    """The processes of one run, as one of them sees them.

    index, count: which it is, of how many.
    """

    _runs = itertools.count()

    def __init__(self) -> None:
        # JAX has no public name for its key-value store; orbax and Flax take it from here, too.
        from jax._src.distributed import global_state

        self._client, self._address = global_state.client, global_state.coordinator_address
        self.index, self.count = jax.process_index(), jax.process_count()
        self._name = f"jaxpeft/{next(self._runs)}"
        self._told = itertools.count()
        self._ended, self._silence = threading.Event(), SILENCE
        # When this process failed as the first one, which is the one that says why, and of what.
        self._failed: tuple[float, BaseException] | None = None
        self._heard: dict[str, tuple[str, float]] = {}
        self._since = time.monotonic()
        self._say("who", str(self.index), f"process {os.getpid()} on {platform.node()}")
        self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)
        self._thread.start()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.index == 0

    # Said once.

    def from_first(self, find: Callable[[], Any]) -> Any:
        """What `find` gives in the first process, a JSON value; it is called nowhere else. All have to ask at once."""
        name = str(next(self._told))
        if self.is_first:
            value = find()
            self._say("told", name, json.dumps(value))
            return value
        return json.loads(self._wait(f"told/{name}"))

    def agree(self, what: Mapping[str, Any]) -> None:
        """Compares values by name, JSON, in all processes.

        Raises:
          InputError: in the first process, for those that differ. The others end then.
        """
        name = f"agree{next(self._told)}"
        self._say(name, str(self.index), json.dumps(what, sort_keys=True, default=str))
        self.from_first(lambda: self._compare(name))

    def _compare(self, name: str) -> None:
        said = [json.loads(self._wait(f"{name}/{index}")) for index in range(self.count)]
        for field in dict.fromkeys(field for one in said for field in one):
            ours, others = said[0].get(field), {i: one.get(field) for i, one in enumerate(said)}
            for index, theirs in others.items():
                if theirs != ours:
                    raise InputError(
                        f"the processes disagree: {field} is {shown(ours)} in process 0 and {shown(theirs)} in"
                        f" process {index}; start all of them with the same arguments and files"
                    )

    def meet(self) -> None:
        """Waits until all processes are here."""
        name = f"meet{next(self._told)}"
        self._say(name, str(self.index), "")
        self.from_first(lambda: [self._wait(f"{name}/{index}") for index in range(self.count)] and None)

    def _say(self, folder: str, name: str, value: str, again: bool = False) -> None:
        self._client.key_value_set(f"{self._name}/{folder}/{name}", value, allow_overwrite=again)

    def _wait(self, name: str) -> str:
        """A value that another process says; should it never do so, the thread ends this one."""
        while True:
            try:
                return self._client.blocking_key_value_get(f"{self._name}/{name}", 10_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    # Failures.

    def fail(self, error: BaseException) -> bool:
        """Tells the others that this process ends; whether it is the first to fail, and so the one that says why."""
        if not self._failed and not isinstance(error, Elsewhere):
            if _of_another(error):
                self._doubt()
            if self._claim(status_of(error), str(error)):
                self._failed = time.monotonic(), error
        return self._failed is not None

    def _doubt(self) -> None:
        """Leaves time to find whose death has led to an error here; the thread ends this process then."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._say("doubt", str(self.index), "", again=True)
        time.sleep(2 * _SILENCE_AFTER_FAILURE + 4 * PERIOD)

    def _claim(self, status: int, line: str) -> bool:
        try:
            self._say("failure", "0", json.dumps({"status": status, "line": line, "process": self.index}))
        except jax.errors.JaxRuntimeError:  # another one has
            return False
        return True

    def _watch(self) -> None:
        for beat in itertools.count():
            try:
                self._say("beat", str(self.index), str(beat), again=True)
                found = self._client.key_value_dir_get(f"{self._name}/failure/")
                if found and not self._failed:
                    leave(json.loads(found[0][1])["status"], self)
                if self._failed and time.monotonic() - self._failed[0] > _PARTING:  # it waits for those that left
                    print_line(str(self._failed[1]) or type(self._failed[1]).__name__)
                    leave(status_of(self._failed[1]), self)
                if self.is_first and not self._failed and (dead := self._silent()):
                    self._end_for(dead)
            except jax.errors.JaxRuntimeError:
                if not self._ended.is_set() and not self.is_first:
                    self._first_is_gone()
            if self._ended.wait(PERIOD):
                return

    def _silent(self) -> list[str]:
        """Processes that have not been heard of for too long."""
        now = time.monotonic()
        if self._client.key_value_dir_get(f"{self._name}/doubt/"):
            self._silence = _SILENCE_AFTER_FAILURE
        beats = {key.rpartition("/")[2]: value for key, value in self._client.key_value_dir_get(f"{self._name}/beat/")}
        for index in map(str, range(1, self.count)):
            value = beats.get(index, "")
            if self._heard.get(index, ("", self._since))[0] != value:
                self._heard[index] = (value, now)
        return [
            index for index in map(str, range(1, self.count))
            if now - self._heard.get(index, ("", self._since))[1] > self._silence
        ]  # fmt: skip

    def _end_for(self, dead: list[str]) -> None:
        known = {key.rpartition("/")[2]: text for key, text in self._client.key_value_dir_get(f"{self._name}/who/")}
        names = ", ".join(f"process {index} ({known.get(index, 'which never came')})" for index in dead)
        line = f"{names}: died, or hangs; the others have stopped; --resume goes on from the last whole checkpoint"
        if self._claim(1, line):
            print_line(line)
        leave(1, self, without=dead)

    def check_first(self) -> None:
        """Ends this process where the first one is no more."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._first_is_gone()

    def _first_is_gone(self) -> None:
        print_line(
            f"process 0 ({self._address}): died; process {self.index} has stopped; --resume goes on from the last"
            " checkpoint"
        )
        os._exit(1)

    def left(self) -> None:
        """Says, or in the first process waits for what the others say, that this is the end."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._say("left", str(self.index), "", again=True)

    def wait_for_others(self, without: list[str]) -> None:
        """In the first process, waits until the others have left, or too long."""
        until = time.monotonic() + 2 * _PARTING
        while time.monotonic() < until:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                gone = len(self._client.key_value_dir_get(f"{self._name}/left/"))
                if gone >= self.count - 1 - len(without):
                    return
            time.sleep(0.1)

    def close(self) -> None:
        """The end of the run, to which all processes have come."""
        self._ended.set()
        self._thread.join()


def leave(status: int, group: Group, without: list[str] | None = None) -> None:
    """Ends this process, the first one after the others."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    if group.is_first:
        group.wait_for_others(without or [])
    else:
        group.left()
    os._exit(status)


def _of_another(error: BaseException | None) -> bool:
    """Whether an error may have come of another process's death, as of an operation between devices."""
    words = ("Gloo", "NCCL", "barrier", "coordination")
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        if not isinstance(error, InputError) and any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def print_line(text: str) -> None:
    """Prints an error's line from where no exception would be heard."""
    with contextlib.suppress(OSError):
        os.write(2, f"jaxpeft: error: {printable(text)}\n".encode())


# Joining.

_group: Group | None = None


def group() -> Group | None:
    """The processes of the run that is going on; None where there is only this one."""
    return _group


def is_first() -> bool:
    """Whether this is the process that writes and speaks, as the only one is."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_first(find: Callable[[], Any]) -> Any:
    """`Group.from_first`; what `find` gives where there is one process."""
    return find() if _group is None else _group.from_first(find)


def meet() -> None:
    """`Group.meet`."""
    if _group is not None:
        _group.meet()


@contextlib.contextmanager
def joined(where: Place | None) -> Iterator[Group | None]:
    """A context in which the processes know of each other; None where there is one.

    Where `jax.distributed` is set up already, it is used as it is.

    Raises:
      InputError: if they cannot be connected.
      Elsewhere: after an error that another process says.
    """
    global _group
    if not jax.distributed.is_initialized():
        if where is None:
            yield None
            return
        _initialize(where)
    if jax.process_count() == 1:
        yield None
        return
    _group = own = Group()
    if not own.is_first:
        _hear_aborts(own.check_first)
    try:
        with failing(), _one_voice():
            yield own
            own.meet()
        own.close()
    except BaseException as error:
        atexit.register(leave, status_of(error), own)  # JAX's own farewell would wait for those that are gone
        if own.fail(error):
            raise
        raise Elsewhere(status_of(error)) from None
    finally:
        _group = None
        _hear_aborts(None)


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Notices are the first process's, and stdout is not for what the libraries of collectives print there."""
    sys.stdout.flush()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        if not is_first():
            warnings.simplefilter("ignore")
        with contextlib.suppress(OSError):
            kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
        yield


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """A context whose errors are told the other processes at once, before anything waits for them."""
    try:
        yield
    except BaseException as error:
        if _group is not None:
            _group.fail(error)
        raise


def _initialize(where: Place) -> None:
    known = where.processes is not None
    _check_address(where.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

    def alone() -> None:
        at = f" at {where.coordinator}" if where.coordinator else ""
        count = where.processes or "auto"
        print_line(f"--processes {count}: waited for {_ARRIVAL} seconds{at}, and not all of them have come")
        os._exit(1)

    _hear_aborts(alone)
    at = where.coordinator or "the address that was found"
    line = f"waiting for all processes at {at}, for up to {_ARRIVAL} seconds\n"
    notice = threading.Timer(_NOTICE, sys.stderr.write, [line])
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(
            coordinator_address=where.coordinator,
            num_processes=where.processes,
            process_id=where.process_id,
            local_device_ids=where.device,
            cluster_detection_method="deactivate" if known else None,
            heartbeat_timeout_seconds=_JAX_HEARTBEAT,
            initialization_timeout=_ARRIVAL,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        what = f"--processes {where.processes or 'auto'}"
        hint = "" if known else "; give --processes, --process-id and --coordinator"
        raise InputError(f"{what}: the processes cannot be connected: {first_line(error)}{hint}") from None
    finally:
        notice.cancel()
    _hear_aborts(None)


def _check_address(coordinator: str | None) -> None:
    """JAX would wait for a host that there is not."""
    host = (coordinator or "").rpartition(":")[0].strip("[]")
    try:
        if host:
            socket.getaddrinfo(host, None)
    except OSError as error:
        raise InputError(f"--coordinator {coordinator}: there is no host {host!r}: {error.strerror}") from None


def _hear_aborts(end: Callable[[], None] | None) -> None:
    """Calls a function where JAX aborts this process from a thread of its own, in which Python hears no signal.

    It does so where the first process dies, or some never come. None: nothing is called any more.
    """
    global _on_abort
    if sys.platform == "win32":
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = kind() if end is None else kind(lambda number: end())
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    _on_abort = handler  # kept for as long as it may be called


_on_abort: Any = None
