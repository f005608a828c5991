"""Cached rows are those that would be made anew, at every sequence length, and the report is the same."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from jaxpeft import data
from jaxpeft.data import cache, encodings, examples
from jaxpeft.data.encode import Encoded
from jaxpeft.errors import InputError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}] * 3
ROWS: list[Any] = [
    *({"prompt": f"{i} plus one is", "completion": " so" * (i % 9)} for i in range(40)),
    {"oops": 1},
    {"text": "Once upon a time there was a little dog. " * 5},
    {"messages": CHAT},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, for files of any size; chunks hold few rows."""
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(examples, "ROWS_PER_CALL", 7)
    return tmp_path / "cache" / "data"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def load(file: Path, tokenizer: Any, seq_len: int = 32, **options: Any) -> tuple[list[bytes], dict[str, Any], str]:
    """All that a reading gives: the examples, the report, the identity of batches."""
    found, report = data.load_examples(file, tokenizer, seq_len, skip_bad_lines=True, **options)
    identity = data.make_batches(found, 2, seq_len, 0).get_state()["identity"]
    return [example.tobytes() for example in found], report.to_json(), identity


def no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "encode_texts", None)


@pytest.mark.parametrize("seq_len", [9, 200])
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_the_second_reading_is_the_first(
    folder: Path, rows: Path, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, seq_len: int, too_long: Any
) -> None:
    plain = load(rows, chat_tokenizer, seq_len, too_long=too_long, cache=False)
    assert not folder.exists()
    load(rows, chat_tokenizer)  # at another length
    assert len(list(folder.iterdir())) == 1
    no_tokens(monkeypatch)
    assert load(rows, chat_tokenizer, seq_len, too_long=too_long) == plain
    counts = plain[1]
    assert counts["bad_lines"] == 1 and counts["first_bad_line"].startswith(f"{rows}:41: fields must be")
    assert (counts["truncated"] > 0) == (seq_len == 9 and too_long == "truncate")


def test_bad_lines_of_a_cached_file_stop_as_before(folder: Path, rows: Path, chat_tokenizer: Any) -> None:
    load(rows, chat_tokenizer)
    moved = rows.rename(rows.with_name("moved.jsonl"))
    assert load(moved, chat_tokenizer)[1]["first_bad_line"].startswith(f"{moved}:41: fields must be")
    assert len(list(folder.iterdir())) == 1
    with pytest.raises(InputError, match=r"moved\.jsonl:41: fields must be"):
        data.load_examples(moved, chat_tokenizer, 32)


def test_nothing_is_left_of_a_reading_that_stopped(folder: Path, rows: Path, chat_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="fields must be"):
        data.load_examples(rows, chat_tokenizer, 32)
    assert list(folder.iterdir()) == []


def test_the_key_is_all_that_rows_follow_from(folder: Path, rows: Path, chat_tokenizer: Any) -> None:
    def count() -> int:
        load(rows, chat_tokenizer)
        return len(list(folder.iterdir()))

    counts = [count()]
    chat_tokenizer(["a b c"], truncation=True, max_length=1)  # no property of the tokenizer
    counts.append(count())
    chat_tokenizer.chat_template += " "
    counts.append(count())
    chat_tokenizer.add_tokens(["plus one"])
    counts.append(count())
    chat_tokenizer.eos_token = "plus one"
    counts.append(count())
    rows.write_text(rows.read_text().replace("dog", "cat"))
    counts.append(count())
    assert counts == [1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", ["cut", "changed", "no rows", "no report", "other report"])
def test_a_damaged_folder_is_made_again(folder: Path, rows: Path, chat_tokenizer: Any, damage: str) -> None:
    before = load(rows, chat_tokenizer)
    (own,) = folder.iterdir()
    held = (own / cache.ROWS).read_bytes()
    if damage == "cut":
        (own / cache.ROWS).write_bytes(held[:-100])
    elif damage == "changed":
        (own / cache.ROWS).write_bytes(held[:3000] + bytes([held[3000] ^ 1]) + held[3001:])
    elif damage == "no rows":
        (own / cache.ROWS).unlink()
    elif damage == "no report":
        (own / cache.ABOUT).unlink()
    else:
        (own / cache.ABOUT).write_text("[]")
    with pytest.warns(UserWarning, match="the cached data are damaged and made again"):
        assert load(rows, chat_tokenizer) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(rows, chat_tokenizer) == before


def test_without_a_place_to_write_rows_stay_in_memory(
    folder: Path, rows: Path, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(rows, chat_tokenizer, cache=False)
    monkeypatch.setenv("JAXPEFT_CACHE", str(rows))  # a file
    with pytest.warns(UserWarning, match="the tokenized data are not cached: "):
        assert load(rows, chat_tokenizer) == before


def test_small_files_and_slow_tokenizers_are_not_cached(
    rows: Path, chat_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = examples.find(rows)
    assert cache.place(source, chat_tokenizer, {}) is None
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    assert cache.place(source, chat_tokenizer, {}) != cache.place(source, chat_tokenizer, {"template": "alpaca"})
    assert cache.place(source._replace(files=()), chat_tokenizer, {}) is None


def test_runs_are_masks() -> None:
    """Chunks give back the masks they were made from, and count what is trained on at every length."""
    rng = np.random.default_rng(0)
    made = []
    for line in range(50):
        length = int(rng.integers(0, 6))
        made.append((line, line % 3, Encoded(rng.integers(0, 99, length).astype(np.int32), rng.random(length) < 0.5)))
    whole = encodings.Encodings.in_memory([encodings.pack(made)])
    parts = encodings.Encodings.in_memory(encodings.pack(made[i : i + 8]) for i in range(0, 50, 8))
    assert whole.digest == parts.digest
    assert parts.sources.tolist() == [source for _, source, _ in made]
    unnamed = encodings.Encodings.in_memory([encodings.pack((line, 0, encoded) for line, _, encoded in made)])
    assert unnamed.digest != whole.digest
    for limit in (1, 3, 9):
        expected = [int(encoded.completion[1:limit].sum()) for *_, encoded in made]
        assert parts.targets(limit).tolist() == whole.targets(limit).tolist() == expected
        for number, (line, encoded) in enumerate((line, encoded) for line, _, encoded in made):
            found, (ids, mask) = parts.row(number, limit)
            assert (found, ids.tolist(), mask.tolist()) == (
                line,
                encoded.ids[:limit].tolist(),
                encoded.completion[:limit].tolist(),
            )
