"""Batches for several adapters that are trained at once: each has rows of its own (see `jaxpeft.adapters`).

An example's `source` is the number, from 1, of the adapter that its row names. Each adapter has batches of its examples
alone, as `make_batches` makes them, which are never packed together with another's; a batch of the run is one of each,
one below the other:

    rows of adapter g    its share of the batch's rows, at least one, in proportion to the positions of its examples
                         (packed) or to their number
    adapter (B,)         int32, the row's adapter from 0 on

So that in every step an adapter sees what it would see in a run of its own with that many rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxpeft.data.batches import Batch, Batches, Lines, eval_batches
from jaxpeft.data.examples import Examples
from jaxpeft.data.records import ADAPTER
from jaxpeft.errors import InputError

Make = Callable[[Examples, int], Batches]  # (an adapter's examples, rows) -> batches


class Several(Batches):
    """Iterator of (batch, lines), as `Batches`, of the batches of several adapters."""

    def __init__(self, examples: Examples, numbers: Sequence[int], make: Make, rows: Sequence[int]):
        """Batches of adapters by their numbers, each of so many rows."""
        self._numbers = {g: np.flatnonzero(examples.sources == g + 1) for g in numbers}
        self._parts = {g: make(examples.of_source(g + 1), own) for g, own in zip(numbers, rows, strict=True)}
        whole = [(g, part.get_state()["identity"]) for g, part in self._parts.items()]
        self._identity = hashlib.blake2b(repr(whole).encode(), digest_size=8).hexdigest()
        self._held: Sequence[int] | None = None
        self.tokens = 0

    def used(self) -> npt.NDArray[np.int32]:
        """The ids of tokens in any of its batches, padding's 0 too, ascending."""
        return np.unique(np.concatenate([part.used() for part in self._parts.values()]))

    def __next__(self) -> tuple[Batch, Lines]:
        found = {g: next(part) for g, part in self._parts.items()}
        self.tokens = sum(part.tokens for part in self._parts.values())
        batch = _below({g: self._named(g, own) for g, (own, _) in found.items()})
        return self._of_held(batch), [row for _, lines in found.values() for row in lines]

    def _of_held(self, batch: Batch) -> Batch:
        return batch if self._held is None else {name: x[list(self._held)] for name, x in batch.items()}

    def _named(self, g: int, batch: Batch) -> Batch:
        """An adapter's batch, whose `example_ids` are those of all examples."""
        numbers = np.array([0, *(self._numbers[g] + 1)], np.int32)
        whose = np.full(len(batch["tokens"]), g, np.int32)
        return {**batch, "example_ids": numbers[batch["example_ids"]], ADAPTER: whose}

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch; plain JSON."""
        return {"identity": self._identity, "parts": [part.get_state() for part in self._parts.values()]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of `get_state`.

        Raises:
          InputError: the state is of other examples or other settings.
        """
        self._check_same(state)
        for part, own in zip(self._parts.values(), state["parts"], strict=True):
            part.set_state(own)


class InTurn(Several):
    """One pass over the examples of one adapter after the other; a batch is of one of them."""

    def __init__(self, examples: Examples, numbers: Sequence[int], make: Make, rows: int):
        super().__init__(examples, numbers, make, [rows] * len(numbers))
        self._left = self._in_turn()

    def _in_turn(self) -> Iterator[tuple[Batch, Lines]]:
        for g, part in self._parts.items():
            for batch, lines in part:
                self.tokens = part.tokens
                yield self._of_held(self._named(g, batch)), lines

    def __next__(self) -> tuple[Batch, Lines]:
        return next(self._left)


def make(examples: Examples, adapters: Sequence[str], batch_size: int, packed: bool, of: Make, path: str) -> Several:
    """Batches to train several adapters on.

    Args:
      examples: whose sources are the adapters' numbers, from 1.
      adapters: their names.
      batch_size: rows of a batch.
      packed: whether a row holds several examples.
      of: makes an adapter's batches.
      path: of the examples, for messages.

    Raises:
      InputError: for an adapter without examples, or fewer rows than adapters.
    """
    sizes = np.zeros(len(adapters))
    for g in range(len(adapters)):
        own = examples.lengths[examples.sources == g + 1]
        sizes[g] = own.sum() if packed else len(own)
    if missing := [name for name, size in zip(adapters, sizes, strict=True) if not size]:
        raise InputError(f"{path}: no row is left to train adapter {missing[0]!r} on")
    if batch_size < len(adapters):
        raise InputError(
            f"--batch-size {batch_size}: each of {len(adapters)} adapters has a row in each step; give at least as many"
        )
    return Several(examples, range(len(adapters)), of, shares(sizes, batch_size))


def evaluation(examples: Examples, batch_size: int, seq_len: int, **layout: Any) -> InTurn:
    """One pass over examples of several adapters, as `eval_batches` makes it of each."""
    numbers = [int(number) - 1 for number in np.unique(examples.sources)]
    return InTurn(examples, numbers, lambda own, rows: eval_batches(own, rows, seq_len, **layout), batch_size)


def shares(sizes: npt.NDArray[np.floating[Any]], rows: int) -> list[int]:
    """Rows in proportion to sizes, at least one each; what is left over goes to the largest remainders.

    >>> shares(np.array([10.0, 30.0]), 8), shares(np.array([1.0, 99.0]), 8)
    ([2, 6], [1, 7])
    """
    given = np.ones(len(sizes), int)
    while given.sum() < rows:
        given[np.argmax(sizes / sizes.sum() * rows - given)] += 1
    return given.tolist()


def _below(batches: dict[int, Batch]) -> Batch:
    """One batch of several, narrower ones padded with zeros, which are padding in all fields."""
    width = max(batch["tokens"].shape[1] for batch in batches.values())
    wide = lambda x: np.pad(x, [(0, 0), (0, width - x.shape[1])]) if x.ndim == 2 else x
    fields = next(iter(batches.values()))
    return {name: np.concatenate([wide(batch[name]) for batch in batches.values()]) for name in fields}
