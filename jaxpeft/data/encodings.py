"""Encoded rows, one behind the other in a few arrays: in memory, or mapped from a file (see `cache.py`).

What is trained on is kept as runs of tokens rather than as a mask, so that what becomes of rows at a sequence length is
counted without a look at their tokens.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpeft.data.encode import Encoded


class Chunk(NamedTuple):
    """n rows with t tokens and r runs.

    lines: int64 (n,), where each row is from.
    ids: int32 (t,).  at: int32 (n + 1,): row i has ids[at[i] : at[i + 1]].
    runs: int32 (2 r,), pairs of [first, end) among the tokens of a row.  runs_at: int32 (n + 1,), as `at`.
    sources: int32 (n,), which data each row is of (`Record.source`).
    """

    lines: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    at: npt.NDArray[np.int32]
    runs: npt.NDArray[np.int32]
    runs_at: npt.NDArray[np.int32]
    sources: npt.NDArray[np.int32]


DTYPES = (np.int64, np.int32, np.int32, np.int32, np.int32, np.int32)  # of a chunk's arrays


def pack(rows: Iterable[tuple[int, int, Encoded]]) -> Chunk:
    """(line, source, ids and mask) of rows as a chunk."""
    rows = list(rows)
    lengths = np.array([len(encoded.ids) for *_, encoded in rows], np.int64)
    at = _ends(lengths)
    ids = np.concatenate([np.empty(0, np.int32), *(encoded.ids for *_, encoded in rows)])
    mask = np.concatenate([np.empty(0, np.bool_), *(encoded.completion for *_, encoded in rows)])
    opens = np.zeros(len(ids) + 1, np.bool_)  # where a row begins, and behind the last
    opens[at] = True
    first = np.flatnonzero(mask & (opens[:-1] | ~np.append(False, mask[:-1])))
    last = np.flatnonzero(mask & (opens[1:] | ~np.append(mask[1:], False)))
    owner = np.searchsorted(at, first, side="right") - 1
    runs = np.stack([first - at[owner], last + 1 - at[owner]], axis=1).reshape(-1)
    return Chunk(
        lines=np.array([line for line, *_ in rows], np.int64),
        ids=ids.astype(np.int32),
        at=at.astype(np.int32),
        runs=runs.astype(np.int32),
        runs_at=_ends(2 * np.bincount(owner, minlength=len(rows))).astype(np.int32),
        sources=np.array([source for _, source, _ in rows], np.int32),
    )


def _ends(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


class Digest:
    """A fingerprint of rows, however they are cut into chunks; of rows of no source, what it was without sources."""

    def __init__(self) -> None:
        self._columns = [hashlib.sha256() for _ in range(6)]
        self._named = False

    def update(self, chunk: Chunk) -> None:
        lengths, counts = np.diff(chunk.at), np.diff(chunk.runs_at)
        arrays = (chunk.lines, chunk.ids, lengths, chunk.runs, counts, chunk.sources)
        for column, values in zip(self._columns, arrays, strict=True):
            column.update(np.ascontiguousarray(values))
        self._named = self._named or bool(chunk.sources.any())

    def hexdigest(self) -> str:
        columns = self._columns if self._named else self._columns[:-1]
        return hashlib.sha256(b"".join(column.digest() for column in columns)).hexdigest()


class Encodings:
    """Rows of tokens in chunks.

    lengths: int32 (n,), tokens of each row.  lines: int64 (n,), where each is from.
    sources: int32 (n,), which data each is of.  digest: `Digest` of the chunks.
    """

    def __init__(self, chunks: Sequence[Chunk], digest: str):
        self._chunks = [chunk for chunk in chunks if len(chunk.lines)]
        self._starts = list(itertools.accumulate((len(chunk.lines) for chunk in self._chunks), initial=0))
        self.lengths = np.concatenate([np.empty(0, np.int32), *(np.diff(chunk.at) for chunk in self._chunks)])
        self.lines = np.concatenate([np.empty(0, np.int64), *(chunk.lines for chunk in self._chunks)])
        self.sources = np.concatenate([np.empty(0, np.int32), *(chunk.sources for chunk in self._chunks)])
        self.digest = digest

    @classmethod
    def in_memory(cls, chunks: Iterable[Chunk]) -> "Encodings":
        """All chunks, kept."""
        digest, kept = Digest(), []
        for chunk in chunks:
            digest.update(chunk)
            kept.append(chunk)
        return cls(kept, digest.hexdigest())

    def row(self, number: int, limit: int) -> tuple[int, Encoded]:
        """(line, the first `limit` ids and their mask) of a row; the ids are a view."""
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        chunk, i = self._chunks[which], number - self._starts[which]
        ids = chunk.ids[chunk.at[i] : min(chunk.at[i + 1], chunk.at[i] + limit)]
        completion = np.zeros(len(ids), np.bool_)
        for first, end in chunk.runs[chunk.runs_at[i] : chunk.runs_at[i + 1]].reshape(-1, 2).tolist():
            completion[first:end] = True
        return int(chunk.lines[i]), Encoded(ids, completion)

    def targets(self, limit: int) -> npt.NDArray[np.int64]:
        """int64 (n,): how many of each row's tokens are trained on, of the first `limit` without the very first."""
        return np.concatenate([np.empty(0, np.int64), *(_targets(chunk, limit) for chunk in self._chunks)])


def _targets(chunk: Chunk, limit: int) -> npt.NDArray[np.int64]:
    first, end = chunk.runs.reshape(-1, 2).T.astype(np.int64)
    counted = np.maximum(np.minimum(end, limit) - np.maximum(first, 1), 0)
    return np.diff(_ends(counted)[chunk.runs_at // 2])
