"""A JSONL file to examples in memory, with an account of every line that is not one of them."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpeft.data.chat import Chat, check_tokenizer, has_lost_words, render_chat, unread_fields
from jaxpeft.data.encode import Encoded, encode_chats, encode_texts
from jaxpeft.data.formats import (
    Content,
    Instruction,
    Text,
    ignored_fields,
    instruction_messages,
    instruction_prompt,
    read_record,
)
from jaxpeft.data.jsonl import parse_line, read_lines
from jaxpeft.data.messages import Conversation
from jaxpeft.errors import InputError
from jaxpeft.special import SpecialTokens, from_parts
from jaxpeft.template import Template, choose

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CALL = 1000  # rows given to the tokenizer at once; only their text is in memory


class Example(NamedTuple):
    """One document to train on: n positions predict ids[1:], those of them that are completion.

    ids: int32 (n + 1,);  completion: bool (n + 1,), true somewhere after its first entry;
    line: the source line, from 1.
    """

    ids: npt.NDArray[np.int32]
    completion: npt.NDArray[np.bool_]
    line: int

    @property
    def positions(self) -> int:
        """n."""
        return len(self.ids) - 1

    def tobytes(self) -> bytes:
        """All that it holds."""
        return self.ids.tobytes() + self.completion.tobytes() + b"%d;" % self.line


@dataclasses.dataclass
class Report:
    """What became of a file's lines:  lines + split = examples + bad_lines + dropped_too_long
    + dropped_without_target.
    """

    path: str
    lines: int = 0
    examples: int = 0
    formats: Counter[str] = dataclasses.field(default_factory=Counter)  # shape -> lines of it
    bad_lines: int = 0
    first_bad_line: str = ""  # the message that the first of them would have stopped with
    truncated: int = 0  # kept, but cut to seq_len positions
    dropped_too_long: int = 0
    dropped_without_target: int = 0  # nothing to predict, or all of it cut off by truncation
    positions: int = 0  # over the examples
    target_tokens: int = 0  # positions that count in the loss
    labels: int = 0  # that rows are classified as; 0 for examples to continue
    templated: int = 0  # lines that a template made text of: conversations and instructions
    split: int = 0  # examples beyond one a line: of conversations whose earlier turns the template rewrites
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)  # field that nothing is made of -> lines with it
    without_end: int = 0  # texts that no EOS ends, as the model names none

    def summary(self) -> str:
        """One line for people; what did not happen is left out."""
        shapes = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items()))
        goal = f"{self.labels} labels" if self.labels else f"{self.target_tokens} trained on"
        parts = [f"{self.examples} examples ({shapes}) with {self.positions} tokens, {goal}"]
        if self.split:
            parts.append(f"{self.split} of them as the chat template rewrites earlier turns")
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.dropped_too_long:
            parts.append(f"{self.dropped_too_long} too long and dropped")
        if self.dropped_without_target:
            parts.append(f"{self.dropped_without_target} dropped with nothing left to train on")
        if self.without_end:
            parts.append(f"{self.without_end} end without EOS, as neither the tokenizer nor the checkpoint names one")
        if self.ignored:
            parts.append(f"ignored fields: {', '.join(sorted(self.ignored))}")
        if self.bad_lines:
            parts.append(f"{self.bad_lines} bad lines skipped (first: {self.first_bad_line})")
        return f"{self.path}: " + "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return dataclasses.asdict(self) | {"formats": dict(self.formats), "ignored": dict(self.ignored)}


class _Row(NamedTuple):
    line: int
    content: Text | Chat


def load_examples(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    seq_len: int,
    *,
    skip_bad_lines: bool = False,
    too_long: Literal["truncate", "drop"] = "truncate",
    special: SpecialTokens | None = None,
    template: Template | None = None,
) -> tuple[list[Example], Report]:
    """Reads and tokenizes a JSONL file (shapes: see `formats.py`).

    Args:
      path: the file.
      tokenizer: a Hugging Face tokenizer.
      seq_len: most positions of an example; n + 1 ids make n positions.
      skip_bad_lines: count a faulty line in the report rather than stop at it.
      too_long: cut a longer example at its end, or drop it; both are counted. An example whose
        completion is cut off whole has nothing to train on and is dropped either way.
      special: the model's special tokens (`jaxpeft.special`); None: those that the tokenizer names.
      template: what makes conversations and instructions text (`jaxpeft.template`); None: what `auto` chooses, today.

    Returns:
      The examples in the file's order, and the report.

    Raises:
      InputError: the file cannot be read; a line is faulty; a `messages` row meets a tokenizer
        without a chat template; or no example is left.
    """
    if seq_len < 1:
        raise InputError(f"sequence length must be at least 1, got {seq_len}")
    special = from_parts(tokenizer) if special is None else special
    template = choose("auto", tokenizer) if template is None else template
    report = Report(str(path))
    examples = []
    rows = _read_rows(path, tokenizer, template, skip_bad_lines, report)
    while chunk := list(itertools.islice(rows, ROWS_PER_CALL)):
        if special.end is None:
            report.without_end += sum(isinstance(row.content, Text) for row in chunk)
        for line, encoded in _encode(chunk, tokenizer, special):
            example = _fit(line, encoded, seq_len, too_long, report)
            if example is not None:
                examples.append(example)
    report.examples = len(examples)
    report.positions = sum(example.positions for example in examples)
    report.target_tokens = sum(int(example.completion[1:].sum()) for example in examples)
    if not examples:
        why = f"; first bad line: {report.first_bad_line}" if report.bad_lines else ""
        raise InputError(
            f"{path}: no example left of {report.lines} lines: {report.bad_lines} bad,"
            f" {report.dropped_too_long} longer than {seq_len} tokens,"
            f" {report.dropped_without_target} with nothing to train on{why}"
        )
    return examples, report


def _read_rows(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    skip_bad_lines: bool,
    report: Report,
) -> Iterator[_Row]:
    """The good lines as rows to tokenize; counts lines, shapes, bad lines and what else there is to say of them."""
    checked = False
    for line, raw in read_lines(path):
        report.lines += 1
        where = f"{path}:{line}"
        try:
            record = parse_line(raw, where)
            shape, content = read_record(record, where)
        except InputError as error:
            count_bad_line(error, skip_bad_lines, report)
            continue
        if not checked and (_is_chat(content, template)):
            check_tokenizer(tokenizer, where)  # the tokenizer's fault, not the line's: never skipped
            checked = True
        try:
            rows, unread = _as_text(content, tokenizer, template, where)
        except InputError as error:
            count_bad_line(error, skip_bad_lines, report)
            continue
        report.formats[shape] += 1
        report.ignored.update({*ignored_fields(record, shape, content), *unread})
        report.templated += not isinstance(content, Text)
        report.split += len(rows) - 1
        for row in rows:
            yield _Row(line, row)


def _is_chat(content: Content, template: Template) -> bool:
    return isinstance(content, Conversation) or (isinstance(content, Instruction) and template.kind == "chat")


def _as_text(
    content: Content, tokenizer: "PreTrainedTokenizerBase", template: Template, where: str
) -> tuple[Sequence[Text | Chat], Sequence[str]]:
    """What a record is tokenized as, and its fields that the chat template doesn't read."""
    if isinstance(content, Text):
        return [content], ()
    if isinstance(content, Instruction):
        if template.kind == "alpaca":
            if content.system:
                raise InputError(f"{where}: field system has no place under the headings of alpaca: see --template")
            return [Text(instruction_prompt(content.instruction, content.input), content.output)], ()
        messages = instruction_messages(content)
        content = Conversation(messages, tuple(turn["role"] == "assistant" for turn in messages))
    unread = unread_fields(content, tokenizer, where)
    chats = render_chat(content, tokenizer, template, where)
    return chats, [*unread, *(("messages.content in part",) if has_lost_words(content, chats) else ())]


def count_bad_line(error: InputError, skip_bad_lines: bool, report: Report) -> None:
    """Counts a faulty line, or raises its error where such lines are not skipped."""
    if not skip_bad_lines:
        raise error
    report.bad_lines += 1
    report.first_bad_line = report.first_bad_line or str(error)


def _encode(
    rows: Sequence[_Row], tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens
) -> Iterable[tuple[int, Encoded]]:
    """(line, ids and mask) in the rows' order, with one tokenizer call for each kind of row."""
    texts = [row.content for row in rows if isinstance(row.content, Text)]
    chats = [row.content for row in rows if isinstance(row.content, Chat)]
    encoded_texts = iter(encode_texts(texts, tokenizer, special))
    encoded_chats = iter(encode_chats(chats, tokenizer))
    for row in rows:
        yield row.line, next(encoded_texts if isinstance(row.content, Text) else encoded_chats)


def _fit(
    line: int,
    encoded: Encoded,
    seq_len: int,
    too_long: Literal["truncate", "drop"],
    report: Report,
) -> Example | None:
    """The row as an example of at most seq_len positions, or None; counts what it did."""
    ids, completion = encoded
    is_long = len(ids) > seq_len + 1
    if is_long and too_long == "drop":
        report.dropped_too_long += 1
        return None
    if not completion[1 : seq_len + 1].any():
        report.dropped_without_target += 1
        return None
    report.truncated += is_long
    return Example(ids[: seq_len + 1].copy(), completion[: seq_len + 1].copy(), line)
