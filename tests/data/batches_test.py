"""Batches hold every token once, in an order that depends on seed and position alone."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from jaxpeft.data import (
    Batch,
    Example,
    eval_batches,
    load_examples,
    make_batches,
    power_of_two_buckets,
)
from jaxpeft.errors import InputError

SEQ_LEN = 32
MODES: list[dict[str, Any]] = [{}, {"pack": True}, {"buckets": (8, 16)}]
modes = pytest.mark.parametrize("mode", MODES, ids=["plain", "pack", "buckets"])


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Examples of 1 to SEQ_LEN positions, whose first id (never a target) is 1000 + its index."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        length = int(rng.integers(1, SEQ_LEN + 1))
        ids = rng.integers(1, 500, length + 1).astype(np.int32)
        ids[0] = 1000 + i
        completion = np.arange(length + 1) > rng.integers(0, length)
        examples.append(Example(ids, completion, line=2 * i + 1))
    return examples


def documents(batch: Batch) -> list[Example]:
    """The documents that a batch holds, read back from its arrays; line is the batch's row."""
    found = []
    for r, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max(initial=0) + 1):
            here = segments == segment
            tokens, targets = batch["tokens"][r, here], batch["targets"][r, here]
            assert (tokens[1:] == targets[:-1]).all()
            assert (batch["positions"][r, here] == np.arange(len(tokens))).all()
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            weights = batch["loss_weights"][r, here]
            assert set(weights.tolist()) <= {0.0, 1.0}
            found.append(
                Example(
                    np.append(tokens, targets[-1]),
                    np.append(False, weights.astype(bool)),
                    r,
                )
            )
    return found


def counts(batches: Any) -> Counter[bytes]:
    """How often each document occurs, by its ids and its mask."""
    return Counter(
        document.ids.tobytes() + document.completion[1:].tobytes()
        for batch, _ in batches
        for document in documents(batch)
    )


def assert_equal_batches(left: Any, right: Any) -> None:
    assert left[1] == right[1]
    assert left[0].keys() == right[0].keys()
    for name in left[0]:
        np.testing.assert_array_equal(left[0][name], right[0][name], strict=True)


@modes
def test_arrays(mode: dict[str, Any]) -> None:
    batch, _ = next(make_batches(make_examples(50), 4, SEQ_LEN, 0, **mode))
    dtypes = {name: array.dtype.name for name, array in batch.items()}
    assert dtypes == {
        "tokens": "int32",
        "targets": "int32",
        "loss_weights": "float32",
        "positions": "int32",
        "segment_ids": "int32",
        "example_ids": "int32",
        "sources": "int32",
    }
    assert batch.pop("sources").shape == (4,)
    assert len({array.shape for array in batch.values()}) == 1
    padding = batch["segment_ids"] == 0
    assert padding.any()
    for name in batch:
        assert not batch[name][padding].any()


@modes
@pytest.mark.parametrize("count", [1, 3, 70])
def test_each_epoch_has_every_example_once(mode: dict[str, Any], count: int) -> None:
    examples = make_examples(count)
    once = Counter(e.ids.tobytes() + e.completion[1:].tobytes() for e in examples)
    assert counts(make_batches(examples, 4, SEQ_LEN, 3, epochs=1, **mode)) == once
    twice = Counter(dict.fromkeys(once, 2))
    assert counts(make_batches(examples, 4, SEQ_LEN, 3, epochs=2, **mode)) == twice
    assert counts(eval_batches(examples, 4, SEQ_LEN, **mode)) == once


def test_every_epoch_of_an_endless_run_is_a_new_permutation() -> None:
    count = 30
    lines = [
        row[0]
        for _, batch_lines in itertools.islice(make_batches(make_examples(count), 4, 32, 0), 45)
        for row in batch_lines
    ]
    epochs = [tuple(lines[start : start + count]) for start in range(0, 4 * 45, count)]
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


@modes
def test_lines_are_those_of_each_rows_documents(mode: dict[str, Any]) -> None:
    examples = make_examples(50)
    for batch, lines in make_batches(examples, 4, SEQ_LEN, 1, epochs=1, **mode):
        rows: list[list[int]] = [[] for _ in lines]
        for document in documents(batch):  # examples name themselves by their first id
            rows[document.line].append(examples[document.ids[0] - 1000].line)
        assert rows == lines
        first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        assert (batch["example_ids"][first] == batch["tokens"][first] - 999).all()
        assert batch["example_ids"].shape == batch["tokens"].shape


@modes
def test_a_row_is_of_the_source_that_most_of_its_tokens_are_of(mode: dict[str, Any]) -> None:
    examples = [example._replace(source=7 + i % 3) for i, example in enumerate(make_examples(50))]
    for batch, _ in make_batches(examples, 4, SEQ_LEN, 1, epochs=1, **mode):
        for row, source in enumerate(batch["sources"]):
            tokens = Counter(examples[number - 1].source for number in batch["example_ids"][row] if number)
            assert tokens[source] == max(tokens.values(), default=0)


@modes
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
    position=st.integers(0, 40),
    epochs=st.sampled_from([1, 2, None]),
)
def test_restart_from_any_position(
    mode: dict[str, Any],
    count: int,
    batch_size: int,
    seed: int,
    shuffle: bool,
    position: int,
    epochs: int | None,
) -> None:
    def fresh() -> Any:
        return make_batches(examples, batch_size, SEQ_LEN, seed, epochs=epochs, shuffle=shuffle, **mode)

    examples = make_examples(count, seed % 7)
    original = fresh()
    for _ in itertools.islice(original, position):
        pass
    state = json.loads(json.dumps(original.get_state()))
    used = fresh()  # restoring into an iterator that stands elsewhere, too
    next(used)
    restored = fresh()
    for iterator in (restored, used):
        iterator.set_state(state)
    rest = list(itertools.islice(original, 15))
    for iterator in (restored, used):
        again = list(itertools.islice(iterator, 15))
        assert len(again) == len(rest)
        for left, right in zip(rest, again, strict=True):
            assert_equal_batches(left, right)


@modes
def test_order_depends_on_the_seed(mode: dict[str, Any]) -> None:
    examples = make_examples(60)

    def lines(seed: int) -> list[Any]:
        return [line for _, line in make_batches(examples, 4, SEQ_LEN, seed, epochs=1, **mode)]

    assert lines(5) == lines(5)
    assert lines(5) != lines(6)


def test_neighbouring_seeds_share_no_epoch() -> None:
    examples = make_examples(40)

    def epochs(seed: int) -> set[tuple[int, ...]]:
        batches = make_batches(examples, 40, SEQ_LEN, seed, epochs=4)
        return {tuple(row[0] for row in lines) for _, lines in batches}

    assert not epochs(0) & epochs(1)


def test_without_shuffling_the_files_order_is_kept() -> None:
    examples = make_examples(10)
    batches = list(make_batches(examples, 4, SEQ_LEN, 0, epochs=1, shuffle=False))
    assert [row for _, lines in batches for row in lines] == [[e.line] for e in examples]


@modes
def test_last_batch_is_filled_with_empty_rows(mode: dict[str, Any]) -> None:
    batches = list(eval_batches(make_examples(9), 4, SEQ_LEN, **mode))
    assert all(batch["tokens"].shape[0] == 4 for batch, _ in batches)
    batch, lines = batches[-1]
    assert 0 < len(lines) < 4
    assert not batch["segment_ids"][len(lines) :].any()
    assert not batch["loss_weights"][len(lines) :].any()


def test_evaluation_is_the_same_every_time() -> None:
    examples = make_examples(20)
    for left, right in zip(eval_batches(examples, 4, SEQ_LEN), eval_batches(examples, 4, SEQ_LEN), strict=True):
        assert_equal_batches(left, right)


def test_packing_wastes_little_and_never_splits() -> None:
    examples = make_examples(300)
    batches = list(make_batches(examples, 4, SEQ_LEN, 0, pack=True, epochs=1))
    assert all(batch["tokens"].shape == (4, SEQ_LEN) for batch, _ in batches)
    filled = np.mean([(batch["segment_ids"] > 0).mean() for batch, _ in batches])
    plain = np.mean([len(example.ids) - 1 for example in examples]) / SEQ_LEN
    assert filled > 0.85 > 0.6 > plain
    assert max(batch["segment_ids"].max() for batch, _ in batches) > 1


def test_buckets_give_few_shapes_that_fit() -> None:
    examples = make_examples(300)
    widths = set()
    for batch, _ in make_batches(examples, 4, SEQ_LEN, 0, buckets=(8, 16, 24), epochs=1):
        width = batch["tokens"].shape[1]
        widths.add(width)
        smaller = [bucket for bucket in (8, 16, 24) if bucket < width]
        longest = int((batch["segment_ids"] > 0).sum(axis=1).max())
        assert all(bucket < longest for bucket in smaller)
    assert widths == {8, 16, 24, 32}


def test_buckets_mix_lengths_over_time() -> None:
    batches = make_batches(make_examples(300), 4, SEQ_LEN, 0, buckets=(8, 16, 24), epochs=1)
    shapes = [batch["tokens"].shape[1] for batch, _ in batches]
    assert shapes != sorted(shapes)
    assert len(set(shapes[:16])) > 1


def test_power_of_two_buckets() -> None:
    assert power_of_two_buckets(512) == (32, 64, 128, 256, 512)
    assert power_of_two_buckets(100) == (32, 64, 100)
    assert power_of_two_buckets(16) == (16,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "other data or other batch settings"),
        ({"batch_size": 2}, "other data or other batch settings"),
        ({"pack": True}, "other data or other batch settings"),
        ({"examples": make_examples(21)}, "other data or other batch settings"),
    ],
)
def test_state_of_another_run_is_refused(change: dict[str, Any], says: str) -> None:
    arguments = {"examples": make_examples(20), "batch_size": 4, "seq_len": SEQ_LEN, "seed": 0}
    state = make_batches(**arguments).get_state()
    with pytest.raises(InputError, match=says):
        make_batches(**(arguments | change)).set_state(state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"examples": []}, "no examples"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"pack": True, "buckets": (8,)}, "either pack or buckets"),
        ({"buckets": (8, 64)}, r"between 1 and the sequence length 32, got \(8, 64\)"),
        ({"seq_len": 8}, "the example of line .* more than the sequence length 8"),
    ],
)
def test_mistaken_arguments(change: dict[str, Any], says: str) -> None:
    arguments = {"examples": make_examples(20), "batch_size": 4, "seq_len": SEQ_LEN, "seed": 0}
    with pytest.raises(InputError, match=says):
        make_batches(**(arguments | change))


@modes
def test_real_file_loses_no_token(
    shared_data: Path, llama_tokenizer: PreTrainedTokenizerBase, mode: dict[str, Any]
) -> None:
    mode = {"buckets": power_of_two_buckets(512)} if "buckets" in mode else mode
    file = shared_data / "instruct" / "dolly.test.jsonl"
    examples, report = load_examples(file, llama_tokenizer, 512)
    batches = list(make_batches(examples, 8, 512, 0, epochs=1, **mode))
    assert counts(batches) == Counter(e.ids.tobytes() + e.completion[1:].tobytes() for e in examples)
    assert sum((batch["segment_ids"] > 0).sum() for batch, _ in batches) == report.positions
    assert sum(batch["loss_weights"].sum() for batch, _ in batches) == report.target_tokens


class Counted(list):
    """Examples that note which of them are asked for."""

    def __init__(self, examples):
        super().__init__(examples)
        self.asked = set()

    def __getitem__(self, index):
        self.asked.add(index)
        return super().__getitem__(index)


@modes
def test_a_process_makes_its_rows_alone(mode):
    """Arrays of some rows are the whole batch's of these rows; the examples of others are not looked at."""
    examples = Counted(make_examples(30))
    whole, held = (make_batches(examples, 4, SEQ_LEN, 3, epochs=1, **mode) for _ in range(2))
    held.hold([1, 3])
    for batch, lines in whole:
        expected = {example.line for row in (1, 3) for example in documents_of(batch, row, examples)}
        examples.asked.clear()
        part, same = next(held)
        assert same == lines and held.tokens == whole.tokens == int((batch["segment_ids"] > 0).sum())
        assert {examples[i].line for i in sorted(examples.asked)} == expected
        for name, array in batch.items():
            np.testing.assert_array_equal(part[name], array[[1, 3]])


def documents_of(batch, row, examples):
    """The examples in a row of a batch."""
    return [list.__getitem__(examples, number - 1) for number in {*batch["example_ids"][row].tolist()} if number]
