"""Examples to batches: shuffled, repeated, padded or bucketed or packed, and resumable anywhere.

grain does the work on *indices* of examples, so that all its elements are small:

    range -> shuffle(seed), anew each epoch -> repeat -> rows of a batch -> collate

An epoch's end is no batch's end: a batch may hold the last examples of one epoch and the first of
the next, so every batch is full except the last of a finite run. The order is a function of (seed,
position) alone, and an iterator's state is a few integers.

Three ways to make rows, all of static shapes:

- plain: one example a row, padded to seq_len.
- buckets: a window of 16 batches is sorted by length and cut into batches, each padded to the
  smallest bucket that holds it; the window's batches are then shuffled.
- pack: first fit of whole examples into rows of seq_len; an example is never split.
"""

import collections
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np
import numpy.typing as npt

from jaxpeft.data.examples import Example, Examples
from jaxpeft.errors import InputError

Batch = dict[str, npt.NDArray[Any]]
Lines = list[list[int]]  # for each row of a batch, the source lines of its documents

_WINDOW_BATCHES = 16  # sorted together: wider pads less, and makes batches less mixed in length
_COUNTED = 4096  # examples whose tokens are looked at together
_PACKING_ROWS = 32  # open at once, at least: more waste less, and reorder more
# grain's own endless repeat overflows in batches of one: sys.maxsize does not survive its division.
_ENDLESS_EXAMPLES = 2**50


class Item(Protocol):
    """What batches are made of; `Example` and `classify.Row` are such.

    ids: its tokens, of which the first `positions` are read.  positions: its length in a row.
    line: its line in the source.  source: the number of the data that it is of.  tobytes: all that it holds, for a
    digest.
    """

    @property
    def ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def positions(self) -> int: ...
    @property
    def line(self) -> int: ...
    @property
    def source(self) -> int: ...
    def tobytes(self) -> bytes: ...


class Batches:
    """Iterator of (batch, lines): a dict of arrays, and the source lines of each of its rows. Of examples:

        tokens        int32   (B, S)  input ids, 0 in padding
        targets       int32   (B, S)  the next token of the same document
        loss_weights  float32 (B, S)  1 where the target is completion, else 0
        positions     int32   (B, S)  0.. in each document
        segment_ids   int32   (B, S)  1.. for the documents of a row, 0 in padding
        example_ids   int32   (B, S)  which example a token is of, counted from 1 in the file's order; 0 in padding
                                      ((B,) where rows are classified): the same in every epoch
        sources       int32   (B,)    which data most of a row's tokens are of (`Record.source`); 0: of none that
                                      is named

    `get_state` gives the position as a small JSON value, and after `set_state` on an iterator made
    with the same arguments the next batch is the one that would have followed.

    After `hold`, arrays are of some of a batch's rows alone, and the others' tokens are not read.

    tokens: that are no padding in all rows of the last batch.
    """

    def __init__(
        self,
        rows: grain.IterDataset[list[list[int]]],
        examples: Sequence[Any],
        collate: Callable[..., Batch],
        identity: str,
        widths: Sequence[int] = (),
    ):
        self._dataset = rows
        self._rows = iter(rows)
        self._examples = examples
        self._collate = collate
        self._identity = identity
        self._widths = widths
        self._lengths = _lengths(examples)
        self._lines = examples.lines if isinstance(examples, Examples) else [example.line for example in examples]
        self._held: Sequence[int] | None = None
        self.tokens = 0

    def used(self) -> npt.NDArray[np.int32]:
        """The ids of tokens in any of its batches, padding's 0 too, ascending."""
        found = {0}
        for start in range(0, len(self._examples), _COUNTED):
            part = [example.ids[: example.positions] for example in self._examples[start : start + _COUNTED]]
            found.update(np.unique(np.concatenate(part)).tolist())
        return np.array(sorted(found), np.int32)

    def hold(self, rows: Sequence[int] | None) -> "Batches":
        """Makes arrays of these rows of each batch alone, ascending numbers; None: of all. Returns itself."""
        self._held = rows
        return self

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Batch, Lines]:
        numbers = next(self._rows)
        lines = [[int(self._lines[i]) for i in row] for row in numbers]
        sizes = [sum(int(self._lengths[i]) for i in row) for row in numbers]
        self.tokens = sum(sizes)
        how = {}
        if self._held is not None:
            numbers = [numbers[row] if row < len(numbers) else [] for row in self._held]
            how = {"batch_size": len(numbers), "widths": [next(width for width in self._widths if width >= max(sizes))]}
        rows = [[self._examples[i] for i in row] for row in numbers]
        batch = self._collate(rows, **how)
        return {**batch, "example_ids": _numbers(batch, rows, numbers), "sources": _sources(batch, rows)}, lines

    def _check_same(self, state: dict[str, Any]) -> None:
        if state.get("identity") != self._identity:
            raise InputError(
                "the saved data position is of other data or other batch settings"
                f" (saved {state.get('identity')}, now {self._identity})"
            )

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch; plain JSON."""
        return {"identity": self._identity, "rows": self._rows.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of `get_state`.

        Raises:
          InputError: the state is of other examples or other settings.
        """
        self._check_same(state)
        # A new iterator: grain's flat map keeps its old buffer if the state is the end of the data.
        self._rows = iter(self._dataset)
        self._rows.set_state(state["rows"])


def _numbers(batch: Batch, rows: Sequence[Sequence[Item]], numbers: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """example_ids of a batch."""
    by_token = "loss_weights" in batch
    found = np.full(batch["tokens"].shape if by_token else next(iter(batch.values())).shape[:1], 0, np.int32)
    for r, (row, own) in enumerate(zip(rows, numbers, strict=True)):
        start = 0
        for item, number in zip(row, own, strict=True):
            if by_token:
                found[r, start : start + item.positions] = number + 1
                start += item.positions
            else:
                found[r] = number + 1
    return found


def _sources(batch: Batch, rows: Sequence[Sequence[Item]]) -> npt.NDArray[np.int32]:
    """sources of a batch; of as many tokens of two, the first."""
    found = np.zeros(len(next(iter(batch.values()))), np.int32)
    for r, row in enumerate(rows):
        tokens = collections.Counter[int]()
        for item in row:
            tokens[item.source] += item.positions
        found[r] = max(tokens, key=tokens.__getitem__, default=0)
    return found


def make_batches(
    examples: Sequence[Item],
    batch_size: int,
    seq_len: int,
    seed: int,
    *,
    pack: bool = False,
    buckets: Sequence[int] = (),
    epochs: int | None = None,
    shuffle: bool = True,
    collate: Callable[..., Batch] | None = None,
) -> Batches:
    """Batches to train on.

    Args:
      examples: from `load_examples` or `load_rows`, none longer than seq_len positions.
      batch_size: rows of a batch, B. The last batch of a finite run is filled up with empty rows
        (segment_ids 0, loss_weights 0).
      seq_len: positions of a row, S, without buckets.
      seed: of the order, any integer from 0.
      pack: several whole examples to a row.
      buckets: the lengths that a batch may be padded to; seq_len is added if none reaches it.
      epochs: passes over the examples; None is without end.
      shuffle: a new order for each epoch; False keeps the file's order (up to the sorting of a
        bucket window and the first fit of packing).
      collate: (rows, batch_size, widths) -> batch, `collate_examples` by default.

    Raises:
      InputError: no examples, an argument out of range, pack with buckets, an example too long.
    """
    _check(examples, batch_size, seq_len, seed, pack, buckets, epochs)
    widths = sorted({*buckets, seq_len}) if buckets else [seq_len]
    # grain seeds epoch e with seed + e: neighbouring seeds would share all but one epoch's order.
    mixed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    indices = grain.MapDataset.range(len(examples))
    if shuffle:
        indices = indices.shuffle(seed=mixed_seed)
    indices = indices.repeat(epochs or _ENDLESS_EXAMPLES // len(examples))
    lengths = _lengths(examples)
    if pack:
        rows = _packed_rows(indices, lengths, batch_size, seq_len, mixed_seed, shuffle)
    elif buckets:
        rows = _bucketed_rows(indices, lengths, batch_size, mixed_seed, shuffle)
    else:
        rows = _in_memory(indices.batch(batch_size, batch_fn=_single_rows))
    settings = (batch_size, seq_len, seed, pack, tuple(widths), epochs, shuffle)
    lay = functools.partial(collate or collate_examples, batch_size=batch_size, widths=widths)
    return Batches(rows, examples, lay, _identity(examples, settings), widths)


def eval_batches(
    examples: Sequence[Item],
    batch_size: int,
    seq_len: int,
    *,
    pack: bool = False,
    buckets: Sequence[int] = (),
    collate: Callable[..., Batch] | None = None,
) -> Batches:
    """One pass over every example, always in the same order; the last batch has empty rows."""
    layout: dict[str, Any] = {"pack": pack, "buckets": buckets, "collate": collate}
    return make_batches(examples, batch_size, seq_len, 0, epochs=1, shuffle=False, **layout)


def power_of_two_buckets(seq_len: int, smallest: int = 32) -> tuple[int, ...]:
    """Powers of two from `smallest` below seq_len, and seq_len: about log2 of it shapes."""
    below = []
    width = smallest
    while width < seq_len:
        below.append(width)
        width *= 2
    return (*below, seq_len)


def collate_examples(rows: Sequence[Sequence[Example]], batch_size: int, widths: Sequence[int]) -> Batch:
    """Lays documents into rows.

    Args:
      rows: at most batch_size rows, each of one or more examples, laid one after the other.
      batch_size: B; missing rows stay empty.
      widths: ascending; S is the first that holds the longest row.

    Returns:
      The batch dict (see `Batches`).
    """
    shape = (batch_size, width_of(rows, widths))
    batch: Batch = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "loss_weights": np.zeros(shape, np.float32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    for r, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            length = example.positions
            here = (r, slice(start, start + length))
            batch["tokens"][here] = example.ids[:-1]
            batch["targets"][here] = example.ids[1:]
            batch["loss_weights"][here] = example.completion[1:]
            batch["positions"][here] = np.arange(length)
            batch["segment_ids"][here] = segment
            start += length
    return batch


def width_of(rows: Sequence[Sequence[Item]], widths: Sequence[int]) -> int:
    """The first of the ascending widths that holds the longest row."""
    longest = max(sum(item.positions for item in row) for row in rows)
    return next(width for width in widths if width >= longest)


def _single_rows(indices: Sequence[int]) -> list[list[int]]:
    return [[int(i)] for i in indices]


def _bucketed_rows(
    indices: "grain.MapDataset[int]",
    lengths: npt.NDArray[np.int64],
    batch_size: int,
    seed: int,
    shuffle: bool,
) -> "grain.IterDataset[list[list[int]]]":
    """Rows of batches of similar length; batch i is made from the window it lies in alone."""

    def cut(window: list[int], rng: np.random.Generator) -> list[list[list[int]]]:
        by_length = sorted(window, key=lengths.__getitem__)
        batches = [
            _single_rows(by_length[start : start + batch_size]) for start in range(0, len(by_length), batch_size)
        ]
        return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches

    windows = indices.batch(batch_size * _WINDOW_BATCHES, batch_fn=list).random_map(cut, seed=seed)
    return grain.experimental.FlatMapIterDataset(_in_memory(windows), _Flatten())


class _Flatten(grain.experimental.FlatMapTransform):
    max_fan_out = _WINDOW_BATCHES

    def flat_map(self, element: list[Any]) -> list[Any]:
        return element


def _packed_rows(
    indices: "grain.MapDataset[int]",
    lengths: npt.NDArray[np.int64],
    batch_size: int,
    seq_len: int,
    seed: int,
    shuffle: bool,
) -> "grain.IterDataset[list[list[int]]]":
    """Rows of several examples by first fit; grain packs runs of an example's own index."""

    def run(index: int) -> dict[str, Any]:
        return {"index": np.full(lengths[index], index, np.int64)}

    def documents(row: dict[str, Any]) -> list[int]:
        starts = (row["index_positions"] == 0) & (row["index_segment_ids"] > 0)
        return [int(index) for index in row["index"][starts]]

    packed = grain.experimental.FirstFitPackIterDataset(
        _in_memory(indices.map(run)),
        length_struct={"index": seq_len},
        # A multiple of the batch size, so that a finite run has one short batch at most.
        num_packing_bins=batch_size * -(-_PACKING_ROWS // batch_size),
        seed=seed,
        shuffle_bins=shuffle,
    )
    return packed.map(documents).batch(batch_size, batch_fn=list)


def _in_memory(dataset: "grain.MapDataset[Any]") -> "grain.IterDataset[Any]":
    """Without grain's reader threads: the data are in memory already."""
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def _identity(examples: Sequence[Item], settings: tuple[Any, ...]) -> str:
    """A digest of all that the order of the batches depends on."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    if isinstance(examples, Examples):
        digest.update(examples.digest.encode())
    else:
        for example in examples:
            digest.update(example.tobytes())
    return digest.hexdigest()


def _lengths(examples: Sequence[Item]) -> npt.NDArray[np.int64]:
    """(n,), the positions of each."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([example.positions for example in examples], np.int64)


def _check(
    examples: Sequence[Item],
    batch_size: int,
    seq_len: int,
    seed: int,
    pack: bool,
    buckets: Sequence[int],
    epochs: int | None,
) -> None:
    if not examples:
        raise InputError("no examples to make batches of")
    if batch_size < 1:
        raise InputError(f"batch size must be at least 1, got {batch_size}")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}")
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs must be at least 1, got {epochs}")
    if pack and buckets:
        raise InputError("packing fills rows of the sequence length: give either pack or buckets")
    if any(width < 1 or width > seq_len for width in buckets):
        raise InputError(f"buckets must lie between 1 and the sequence length {seq_len}, got {tuple(buckets)}")
    longest = examples[int(_lengths(examples).argmax())]
    if longest.positions > seq_len:
        raise InputError(
            f"the example of line {longest.line} has {longest.positions} tokens, more than the"
            f" sequence length {seq_len}"
        )
