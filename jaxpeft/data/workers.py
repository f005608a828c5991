"""Rows encoded by several processes: templates are rendered, and rows read and checked, by Python, one core a process.

A worker is another Python that calls `main`, started afresh, as a process that computes with JAX cannot be forked, and
one that Python's multiprocessing starts runs the user's script again. It is told the tokenizer, as the folder that
`save_pretrained` writes, and says whether what it loaded is the same (see `cache.identify`); then it answers parts of a
file, in frames on its two pipes:

    length (8 bytes), JSON      what is asked, or an account of the part
    length, bytes; six times    the arrays of a chunk, behind an account without an "error"
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jaxpeft.data import cache
from jaxpeft.data.encodings import DTYPES, Chunk
from jaxpeft.data.records import Record
from jaxpeft.data.sources import Source
from jaxpeft.errors import InputError

if TYPE_CHECKING:  # importing transformers takes seconds
    from jaxpeft.data.examples import Encoder, Report

# A worker takes three seconds of a core to start, and a MiB of short rows one second (texts) or two (conversations).
LEAST_BYTES = 2**23
_MOST = 16


def count(source: Source, encoder: Encoder) -> int:
    """How many processes a source is worth; 1 means none besides this one."""
    size = source.bytes()
    if size is None or size < LEAST_BYTES or not encoder.tokenizer.is_fast or not sys.executable:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, size // (LEAST_BYTES // 2), _MOST)


def encode(parts: Iterable[Sequence[Record]], encoder: Encoder, processes: int) -> Iterator[tuple[Chunk, Report]]:
    """What `encoder.part` gives for each part, in their order; a few parts are in memory at a time.

    Raises:
      InputError: as `encoder.part` does, for the first part that does.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxpeft-tokenizer-"))
        with contextlib.suppress(Exception):  # one that cannot be saved; the workers say that theirs differs
            encoder.tokenizer.save_pretrained(folder)
        told = {"tokenizer": folder, "settings": encoder.settings()}
        workers = [stack.enter_context(_Worker(told)) for _ in range(processes)]
        same = cache.identify(encoder.tokenizer)
        if not all(worker.tokenizer() == same for worker in workers):  # it takes more than its files to make this one
            yield from map(encoder.part, parts)
            return
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def ask(part: Sequence[Record]) -> tuple[Chunk, Report]:
            worker = free.get()
            try:
                return worker.part(part, encoder)
            finally:
                free.put(worker)

        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(processes))
        stack.callback(pool.shutdown, cancel_futures=True)
        asked: collections.deque[concurrent.futures.Future[tuple[Chunk, Report]]] = collections.deque()
        for part in parts:
            asked.append(pool.submit(ask, part))
            if len(asked) > 2 * processes:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()


class _Worker:
    """A process that encodes; it ends when its pipe is closed."""

    def __init__(self, told: Mapping[str, Any]):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # a core is a process's
            "JAX_PLATFORMS": "cpu",  # which is not used
        }
        command = [sys.executable, "-P", "-c", "from jaxpeft.data.workers import main; main()"]
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL  # what a worker fails at is done here again
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=quiet, env=environment, start_new_session=True
        )
        with contextlib.suppress(OSError):
            _send(_given(self._process.stdin), told)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                _given(pipe).close()
        self._process.wait()

    def tokenizer(self) -> Any:
        """What it has for a tokenizer (see `cache.identify`), asked once; None if it has failed."""
        try:
            return _receive(_given(self._process.stdout))
        except (OSError, EOFError):
            return None

    def part(self, records: Sequence[Record], encoder: Encoder) -> tuple[Chunk, Report]:
        """`encoder.part`, by the process; here where it is gone, or the records are no JSON (dates in a column)."""
        from jaxpeft.data.examples import Report

        try:
            asked = json.dumps([_plain(record) for record in records]).encode()
        except (TypeError, ValueError):
            return encoder.part(records)
        pipe_in, pipe_out = _given(self._process.stdin), _given(self._process.stdout)
        try:
            _send_bytes(pipe_in, asked)
            found = _receive(pipe_out)
            if "error" in found:
                raise InputError(found["error"])
            arrays = [np.frombuffer(_receive_bytes(pipe_out), dtype) for dtype in DTYPES]
        except (OSError, EOFError):
            return encoder.part(records)
        return Chunk(*arrays), Report.of_json(found)


def _given(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _plain(record: Record) -> list[Any]:
    content = record.content
    if isinstance(content, bytes):
        return [record.number, record.where, record.file, "line", content.decode("utf-8", "surrogateescape")]
    if isinstance(content, InputError):
        return [record.number, record.where, record.file, "fault", str(content)]
    return [record.number, record.where, record.file, "fields", content]


def _record(number: int, where: str, file: str, kind: str, content: Any) -> Record:
    if kind == "line":
        return Record(number, where, content.encode("utf-8", "surrogateescape"), file)
    return Record(number, where, InputError(content) if kind == "fault" else content, file)


def _send(pipe: IO[bytes], value: Any) -> None:
    _send_bytes(pipe, json.dumps(value).encode())


def _receive(pipe: IO[bytes]) -> Any:
    return json.loads(_receive_bytes(pipe))


def _send_bytes(pipe: IO[bytes], raw: bytes) -> None:
    pipe.write(len(raw).to_bytes(8, "little"))
    pipe.write(raw)
    pipe.flush()


def _receive_bytes(pipe: IO[bytes]) -> bytes:
    """What the next frame holds.

    Raises:
      EOFError: the other side is gone.
    """
    head = pipe.read(8)
    length = int.from_bytes(head, "little")
    raw = pipe.read(length) if len(head) == 8 else b""
    if len(head) < 8 or len(raw) < length:
        raise EOFError
    return raw


def _work(pipe_in: IO[bytes], pipe_out: IO[bytes]) -> None:
    """What a worker does until its pipe is closed."""
    import transformers

    from jaxpeft.data.examples import Encoder

    told = _receive(pipe_in)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        Path(told["tokenizer"]), trust_remote_code=False, local_files_only=True
    )
    encoder = Encoder.of_settings(tokenizer, told["settings"])
    _send(pipe_out, cache.identify(tokenizer))
    while True:
        records = [_record(*plain) for plain in _receive(pipe_in)]
        try:
            chunk, report = encoder.part(records)
        except InputError as error:
            _send(pipe_out, {"error": str(error)})
            continue
        _send(pipe_out, report.to_json())
        for array in chunk:
            _send_bytes(pipe_out, array.tobytes())


def main() -> None:
    """A worker's life."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it, which takes four seconds
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(EOFError, BrokenPipeError):
        _work(sys.stdin.buffer, answers)
