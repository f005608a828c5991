"""Rows to classify: a text or a pair of texts, and the label that it has.

    text       the text
    text2      its second part (hypothesis, answer), optional
    label      a whole number or a name; numbers with a decimal point are values to predict: a regression
    label_name the label's name; `label` then only says its place in the order

A row is tokenized as the checkpoint's tokenizer joins a pair, with its special tokens and token types. One that puts
nothing between the two parts gets a line break there.

Labels are collected over the file that is trained on, in the order of their numbers where all have one, else of their
names; other files are read with these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpeft.data.batches import Batch, width_of
from jaxpeft.data.examples import ROWS_PER_CALL, Report, count_bad_line
from jaxpeft.data.formats import read_string
from jaxpeft.data.jsonl import json_type
from jaxpeft.data.sources import Source, find
from jaxpeft.errors import InputError
from jaxpeft.tokenizing import at, tokenize

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

VALUE = "value"  # the one label of a regression


class Row(NamedTuple):
    """A tokenized row.

    ids: int32 (n,);  token_types: int32 (n,), 1 in the second part where the tokenizer says so;
    label: the label's index, or the value of a regression;  line: the source line, from 1;
    source: which data it is of (see `Record.source`).
    """

    ids: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.int32]
    label: int | float
    line: int
    source: int = 0

    @property
    def positions(self) -> int:
        """n."""
        return len(self.ids)

    def tobytes(self) -> bytes:
        """All that it holds."""
        source = b"%d;" % self.source if self.source else b""
        return self.ids.tobytes() + self.token_types.tobytes() + b"%r;%d;" % (self.label, self.line) + source


class Labels(NamedTuple):
    """What rows are told apart by.

    names: in the order of the classifier's outputs; a single one is a regression.
    numbers: what the file called them by, or () where it gave no numbers.
    """

    names: tuple[str, ...]
    numbers: tuple[int | float, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether rows have a value rather than a label."""
        return len(self.names) == 1

    def ordered_as(self, names: Sequence[str]) -> Labels:
        """The same labels in the order of `names`, if these are the same names."""
        if len(names) != len(self.names) or set(names) != set(self.names):
            return self
        numbers = dict(zip(self.names, self.numbers, strict=True)) if self.numbers else {}
        return Labels(tuple(names), tuple(numbers[name] for name in names) if numbers else ())


class _Record(NamedTuple):
    """A parsed line; `name` is None where the label has a number only, `where` opens messages."""

    line: int
    where: str
    text: str
    text2: str
    label: int | float | None
    name: str | None
    source: int = 0


def load_rows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    labels: Labels | None = None,
    *,
    order: Sequence[str] = (),
    skip_bad_lines: bool = False,
    too_long: Literal["truncate", "drop"] = "truncate",
) -> tuple[list[Row], Labels, Report]:
    """Reads and tokenizes rows to classify.

    Args:
      path: a file, a folder of files, or the name of a dataset of the hub (see `sources.py`).
      tokenizer: a Hugging Face tokenizer.
      seq_len: most tokens of a row, special ones included.
      labels: of the file that is trained on; None collects them over this one.
      order: names of the checkpoint's own labels, whose order collected ones take if they are the same.
      skip_bad_lines: count a faulty line in the report rather than stop at it.
      too_long: cut the longer part of a longer row, token by token, or drop the row; both are counted.

    Returns:
      The rows in the file's order, the labels, and the report.

    Raises:
      InputError: the file cannot be read; a line is faulty, or has a label that is not among `labels`; no two labels
        are left to tell apart, or no row.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if seq_len <= special:
        raise InputError(f"--seq-len {seq_len}: leaves no room for text beside {special} special tokens")
    source = find(path)
    report = Report(source.name)
    records = list(_read_records(source, skip_bad_lines, report))
    if labels is None:
        records, labels = _collect(path, records, skip_bad_lines, report)
        labels = labels.ordered_as(order)
    report.labels = len(labels.names)
    rows = []
    remaining = _labelled(records, labels, skip_bad_lines, report)
    while chunk := list(itertools.islice(remaining, ROWS_PER_CALL)):
        rows += _encode(chunk, tokenizer, seq_len, too_long, report)
    report.examples = len(rows)
    report.positions = sum(row.positions for row in rows)
    if not rows:
        why = f"; first bad line: {report.first_bad_line}" if report.bad_lines else ""
        raise InputError(
            f"{path}: no row left of {report.lines} lines: {report.bad_lines} bad, {report.dropped_too_long} longer "
            f"than {seq_len} tokens, {report.dropped_without_target} without text{why}"
        )
    return rows, labels, report


def collate_rows(
    rows: Sequence[Sequence[Row]], batch_size: int, widths: Sequence[int], regression: bool | None = None
) -> Batch:
    """Lays rows into a batch, one each, padded on the right.

    Args:
      rows: at most batch_size lists of one row, or none.
      batch_size: B; missing rows stay empty.
      widths: ascending; S is the first that holds the longest row.
      regression: whether labels are values; None: as that of the first row is.

    Returns:
      tokens, positions, segment_ids (1, and 0 in padding), token_types: int32 (B, S); labels: int32 (B,), or float32
      for a regression; weights: float32 (B,), 0 for empty rows.
    """
    shape = (batch_size, width_of(rows, widths))
    if regression is None:
        regression = isinstance(rows[0][0].label, float)
    kind = np.float32 if regression else np.int32
    batch: Batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "token_types")}
    batch |= {"labels": np.zeros(batch_size, kind), "weights": np.zeros(batch_size, np.float32)}
    for r, row in ((r, row) for r, one in enumerate(rows) for row in one):
        here = (r, slice(0, row.positions))
        batch["tokens"][here] = row.ids
        batch["positions"][here] = np.arange(row.positions)
        batch["segment_ids"][here] = 1
        batch["token_types"][here] = row.token_types
        batch["labels"][r] = row.label
        batch["weights"][r] = 1
    return batch


def _read_records(source: Source, skip_bad_lines: bool, report: Report) -> Iterator[_Record]:
    """The good lines; counts lines, shapes and bad lines in the report."""
    for found in source.records():
        report.lines += 1
        try:
            record = _record(fields := found.fields(), found.where, found.number, found.source(fields))
        except InputError as error:
            count_bad_line(error, skip_bad_lines, report)
            continue
        report.formats["text, text2" if record.text2 else "text"] += 1
        yield record


def _record(fields: dict[str, Any], where: str, line: int, source: int) -> _Record:
    given = {name for name in ("text2", "label", "label_name") if fields.get(name) is not None}
    if "text" not in fields or not given & {"label", "label_name"}:
        found = ", ".join(list(fields)[:8]) or "none"
        raise InputError(f"{where}: fields must be text, [text2,] label or label_name; this line has: {found}")
    name = read_string(fields, "label_name", where) if "label_name" in given else None
    label = fields["label"] if "label" in given else None
    if isinstance(label, str):
        name, label = (read_string(fields, "label", where) if name is None else name), None
    if isinstance(label, bool | list | dict) or (isinstance(label, float) and not math.isfinite(label)):
        shown = label if isinstance(label, float) else json_type(label)
        raise InputError(f"{where}: field label must be a number or a name, found {shown}")
    text2 = read_string(fields, "text2", where) if "text2" in given else ""
    return _Record(line, where, read_string(fields, "text", where), text2, label, name, source)


def _collect(
    path: str | Path, records: Sequence[_Record], skip_bad_lines: bool, report: Report
) -> tuple[list[_Record], Labels]:
    """The labels of a file, and the records without those that contradict earlier ones."""
    if any(isinstance(record.label, float) and record.name is None for record in records):
        return list(records), Labels((VALUE,))
    numbers: dict[str, tuple[int | float | None, int]] = {}  # name -> number and line where it was seen first
    names: dict[int | float, str] = {}
    kept = []
    for record in records:
        name = _name(record)
        number, line = numbers.setdefault(name, (record.label, record.line))
        owner = name if record.label is None else names.setdefault(record.label, name)
        if number == record.label and owner == name:
            kept.append(record)
            continue
        before = f"line {line} has it with label {number}" if number != record.label else f"{owner!r} has it before"
        error = InputError(f"{record.where}: label {record.label} with the name {name!r}; {before}")
        count_bad_line(error, skip_bad_lines, report)
    found = [(number, name) for name, (number, _) in numbers.items()]
    if len(found) < 2:
        what = f"all have the label {found[0][1]!r}" if found else "there are none"
        raise InputError(f"{path}: rows must have at least two labels to be told apart by; {what}")
    if any(number is None for number, _ in found):
        return kept, Labels(tuple(sorted(numbers)))
    ordered = sorted((number, name) for number, name in found if number is not None)
    return kept, Labels(tuple(name for _, name in ordered), tuple(number for number, _ in ordered))


def _name(record: _Record) -> str:
    return str(record.label) if record.name is None else record.name


def _labelled(
    records: Iterable[_Record], labels: Labels, skip_bad_lines: bool, report: Report
) -> Iterator[tuple[_Record, int | float]]:
    """(record, index of its label or its value)."""
    by_name = {name: i for i, name in enumerate(labels.names)}
    by_number = {number: i for i, number in enumerate(labels.numbers)}
    for record in records:
        if labels.regression:
            found: int | float | None = None if record.label is None else float(record.label)
            wanted = "should be a number, like those trained on"
        else:
            by_its_number = by_number.get(record.label) if record.label is not None and record.name is None else None
            found = by_name.get(_name(record), by_its_number)
            shown = ", ".join(labels.names[:8]) + (", ..." if len(labels.names) > 8 else "")
            wanted = f"is not one of those trained on: {shown}"
        if found is None:
            error = InputError(f"{record.where}: label {_name(record)!r} {wanted}")
            count_bad_line(error, skip_bad_lines, report)
            continue
        yield record, found


def _encode(
    rows: Sequence[tuple[_Record, int | float]],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    too_long: Literal["truncate", "drop"],
    report: Report,
) -> list[Row]:
    """The rows that fit, in their order; counts what became of the others."""
    encoded: dict[int, tuple[list[int], list[int]]] = {}
    for paired in (False, True):
        records = [record for record, _ in rows if bool(record.text2) == paired]
        tokens = _tokenize(records, tokenizer)
        long = [record for record in records if len(tokens[record.line][0]) > seq_len]
        if too_long == "truncate":
            report.truncated += len(long)
            tokens |= _tokenize(long, tokenizer, truncation="longest_first", max_length=seq_len)
        encoded |= tokens
    made = []
    for record, label in rows:
        ids, token_types = encoded[record.line]
        report.dropped_too_long += len(ids) > seq_len
        report.dropped_without_target += not ids
        if 0 < len(ids) <= seq_len:
            arrays = np.array(ids, np.int32), np.array(token_types, np.int32)
            made.append(Row(*arrays, label, record.line, record.source))
    return made


def _tokenize(
    records: Sequence[_Record], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> dict[int, tuple[list[int], list[int]]]:
    """{line: (ids, token types)} of records that all are pairs, or all are not."""
    if not records:
        return {}
    first, second = [record.text for record in records], None
    if records[0].text2:
        joined = tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(pair=False)
        second = [("\n" if joined else "") + record.text2 for record in records]
    with at(lambda row: records[row].where):
        found = tokenize(tokenizer, first, second, return_attention_mask=False, verbose=False, **options)
    token_types = found.get("token_type_ids") or [[0] * len(ids) for ids in found["input_ids"]]
    return {r.line: (ids, types) for r, ids, types in zip(records, found["input_ids"], token_types, strict=True)}
