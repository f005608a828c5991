"""A file of rows to examples, with an account of every line that is not one of them."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from jaxpeft import limits
from jaxpeft.data import cache as disk
from jaxpeft.data import workers
from jaxpeft.data.chat import Chat, check_tokenizer, has_lost_words, render_chat, unread_fields
from jaxpeft.data.encode import Encoded, encode_chats, encode_texts
from jaxpeft.data.encodings import Chunk, Encodings, pack
from jaxpeft.data.formats import (
    Content,
    Instruction,
    Text,
    ignored_fields,
    instruction_messages,
    instruction_prompt,
    read_record,
)
from jaxpeft.data.messages import Conversation
from jaxpeft.data.records import Record
from jaxpeft.data.sources import Source, find
from jaxpeft.errors import InputError
from jaxpeft.special import SpecialTokens, from_parts
from jaxpeft.template import Template, choose, names
from jaxpeft.tokenizing import at

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CALL = 1000  # rows given to the tokenizer at once; only their text is in memory
BYTES_PER_CALL = 2**25  # fewer rows where they are longer


class Example(NamedTuple):
    """One document to train on: n positions predict ids[1:], those of them that are completion.

    ids: int32 (n + 1,);  completion: bool (n + 1,), true somewhere after its first entry;
    line: the source line (or row) from 1, counted on over the files of a folder;
    source: which data it is of (see `Record.source`).
    """

    ids: npt.NDArray[np.int32]
    completion: npt.NDArray[np.bool_]
    line: int
    source: int = 0

    @property
    def positions(self) -> int:
        """n."""
        return len(self.ids) - 1

    def tobytes(self) -> bytes:
        """All that it holds."""
        source = b"%d;" % self.source if self.source else b""
        return self.ids.tobytes() + self.completion.tobytes() + b"%d;" % self.line + source


class Examples(Sequence[Example]):
    """A file's examples, in its order; each is cut out of the encoded rows when it is asked for.

    lengths: int64 (n,), the positions of each.  lines: int64 (n,), of the source.
    sources: int32 (n,), which data each is of.  digest: of all that they hold.
    """

    def __init__(self, encodings: Encodings, rows: npt.NDArray[np.int64], limit: int):
        """Rows by their numbers, cut to `limit` ids."""
        self._encodings, self._rows, self._limit = encodings, rows, limit
        self.lengths = np.minimum(encodings.lengths[rows], limit).astype(np.int64) - 1
        self.lines, self.sources = encodings.lines[rows], encodings.sources[rows]
        self.digest = hashlib.sha256(f"{encodings.digest}:{limit}:".encode() + rows.tobytes()).hexdigest()

    def of_source(self, number: int) -> "Examples":
        """Those of one source, in this order."""
        return Examples(self._encodings, self._rows[self.sources == number], self._limit)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        line, encoded = self._encodings.row(int(self._rows[index]), self._limit)
        return Example(encoded.ids, encoded.completion, line, int(self.sources[index]))


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

    @classmethod
    def of_json(cls, counts: Mapping[str, Any]) -> "Report":
        """A report whose `to_json` this is."""
        fields: dict[str, Any] = {name: Counter(x) if isinstance(x, dict) else x for name, x in counts.items()}
        return cls(**fields)

    def add(self, other: "Report") -> None:
        """Counts what became of further lines too."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            # Of texts the first counts: the path, the first bad line.
            setattr(self, field.name, mine or theirs if isinstance(mine, str) else mine + theirs)


class _Row(NamedTuple):
    line: int
    source: int
    where: str
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
    cache: bool = True,
    adapters: Sequence[str] = (),
) -> tuple[Examples, Report]:
    """Reads and tokenizes rows (kinds of files: see `records.py`; shapes of rows: `formats.py`).

    Args:
      path: a file, a folder of files, or the name of a dataset of the hub.
      tokenizer: a Hugging Face tokenizer.
      seq_len: most positions of an example; n + 1 ids make n positions.
      skip_bad_lines: count a faulty line in the report rather than stop at it.
      too_long: cut a longer example at its end, or drop it; both are counted. An example whose
        completion is cut off whole has nothing to train on and is dropped either way.
      special: the model's special tokens (`jaxpeft.special`); None: those that the tokenizer names.
      template: what makes conversations and instructions text (`jaxpeft.template`); None: what `auto` chooses, today.
      cache: keep the tokens of long data in the user's cache folder, and take them from there (see `cache.py`).
      adapters: of which each row has to name its own; an example's `source` is then that one's number, from 1.

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
    source, encoder = find(path), Encoder(tokenizer, special, template, skip_bad_lines, tuple(adapters))
    folder = disk.place(source, tokenizer, encoder.identity()) if cache else None
    encodings, report = _read(source, encoder, folder)
    examples = _fit(encodings, seq_len, too_long, report)
    if not examples:
        why = f"; first bad line: {report.first_bad_line}" if report.bad_lines else ""
        raise InputError(
            f"{path}: no example left of {report.lines} lines: {report.bad_lines} bad,"
            f" {report.dropped_too_long} longer than {seq_len} tokens,"
            f" {report.dropped_without_target} with nothing to train on{why}"
        )
    return examples, report


def _read(source: Source, encoder: "Encoder", folder: Path | None) -> tuple[Encodings, Report]:
    """All rows of a source, uncut, and what became of its lines so far; through a folder of the cache if there is one.

    A cached report names its first bad line without the source's name, which may be another by now.
    """

    def make() -> tuple[Iterator[Chunk], Callable[[], dict[str, Any]]]:
        report = Report(source.name)
        chunks = _chunks(source, encoder, report)
        return chunks, lambda: {**report.to_json(), "first_bad_line": report.first_bad_line.removeprefix(source.name)}

    if folder is None:
        chunks, made = make()
        encodings, stored = Encodings.in_memory(chunks), made()
    else:
        encodings, stored = disk.read_or_make(folder, make)
    report = Report.of_json({**stored, "path": source.name})
    if report.bad_lines:
        report.first_bad_line = source.name + report.first_bad_line
        if not encoder.skip_bad_lines:
            raise InputError(report.first_bad_line)
    return encodings, report


def _chunks(source: Source, encoder: "Encoder", report: Report) -> Iterator[Chunk]:
    """The good rows as tokens; fills the report."""
    parts = _parts(source.records())
    processes = workers.count(source, encoder)
    done = workers.encode(parts, encoder, processes) if processes > 1 else map(encoder.part, parts)
    for chunk, own in done:
        report.add(own)
        yield chunk


def _parts(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records by as many as are encoded at once."""
    part: list[Record] = []
    size = 0
    for record in records:
        part.append(record)
        size += _size(record.content)
        if len(part) == ROWS_PER_CALL or size > BYTES_PER_CALL:
            yield part
            part, size = [], 0
    if part:
        yield part


def _size(content: object) -> int:
    """About how many bytes of text a record's content has."""
    if isinstance(content, bytes | str):
        return len(content)
    items = content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ()
    return sum(map(_size, items))


class Encoder(NamedTuple):
    """What makes tokens of records."""

    tokenizer: "PreTrainedTokenizerBase"
    special: SpecialTokens
    template: Template
    skip_bad_lines: bool
    adapters: tuple[str, ...] = ()

    def part(self, records: Sequence[Record]) -> tuple[Chunk, Report]:
        """The good rows among a file's records as tokens, and what became of all of them.

        Raises:
          InputError: a record is faulty, and these are not skipped; a `messages` row meets a tokenizer without a chat
            template.
        """
        report = Report("")
        with limits.many() as span:
            rows = list(_read_rows(records, self, report, span.look))
        if self.special.end is None:
            report.without_end += sum(isinstance(row.content, Text) for row in rows)
        return pack(_encode(rows, self.tokenizer, self.special)), report

    def settings(self) -> dict[str, Any]:
        """All but the tokenizer, as plain JSON."""
        special = {name: sorted(x) if isinstance(x, frozenset) else x for name, x in self.special._asdict().items()}
        template = dataclasses.asdict(self.template)
        own = {"skip_bad_lines": self.skip_bad_lines, "adapters": list(self.adapters)}
        return {"special": special, "template": template, **own}

    @classmethod
    def of_settings(cls, tokenizer: "PreTrainedTokenizerBase", settings: dict[str, Any]) -> "Encoder":
        special: dict[str, Any] = dict(settings["special"])
        special |= {name: tuple(x) for name, x in special.items() if isinstance(x, list)}
        special["blanks"] = frozenset(special["blanks"])
        template = Template(**settings["template"])
        own = settings["skip_bad_lines"], tuple(settings["adapters"])
        return cls(tokenizer, SpecialTokens(**special), template, *own)

    def identity(self) -> dict[str, Any]:
        """What good rows' tokens follow from besides the tokenizer; the day only where a template asks for it."""
        settings = self.settings()
        del settings["skip_bad_lines"]
        if not names(str(self.tokenizer.chat_template), "strftime_now"):
            settings["template"]["date"] = None
        return settings


def _read_rows(records: Iterable[Record], encoder: Encoder, report: Report, look: Callable[[], None]) -> Iterator[_Row]:
    """The good lines as rows to tokenize; counts lines, shapes, bad lines and what else there is to say of them.

    `look` is called before each (see `limits.many`).
    """
    tokenizer, template, skip_bad_lines = encoder.tokenizer, encoder.template, encoder.skip_bad_lines
    checked = False
    for source_record in records:
        look()
        line, where = source_record.number, source_record.where
        report.lines += 1
        try:
            record = source_record.fields()
            shape, content = read_record(record, where)
            source = source_record.source(record, encoder.adapters)
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
        report.ignored.update({*ignored_fields(record, shape, content, bool(encoder.adapters)), *unread})
        report.templated += not isinstance(content, Text)
        report.split += len(rows) - 1
        for row in rows:
            yield _Row(line, source, where, row)


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
) -> Iterable[tuple[int, int, Encoded]]:
    """(line, source, ids and mask) in the rows' order, with one tokenizer call for each kind of row."""
    texts = [(row.where, row.content) for row in rows if isinstance(row.content, Text)]
    chats = [(row.where, row.content) for row in rows if isinstance(row.content, Chat)]
    with at(lambda i: texts[i][0]):
        encoded_texts = iter(encode_texts([text for _, text in texts], tokenizer, special))
    with at(lambda i: chats[i][0]):
        encoded_chats = iter(encode_chats([chat for _, chat in chats], tokenizer))
    for row in rows:
        yield row.line, row.source, next(encoded_texts if isinstance(row.content, Text) else encoded_chats)


def _fit(encodings: Encodings, seq_len: int, too_long: Literal["truncate", "drop"], report: Report) -> Examples:
    """The rows as examples of at most seq_len positions; counts what became of all of them."""
    limit = seq_len + 1
    targets = encodings.targets(limit)
    is_long = encodings.lengths > limit
    if too_long == "drop":
        dropped, is_long = is_long, np.zeros_like(is_long)
    else:
        dropped = np.zeros_like(is_long)
    kept = ~dropped & (targets > 0)
    examples = Examples(encodings, np.flatnonzero(kept), limit)
    report.dropped_too_long = int(dropped.sum())
    report.dropped_without_target = int((~dropped & (targets == 0)).sum())
    report.truncated = int((is_long & kept).sum())
    report.examples = len(examples)
    report.positions = int(examples.lengths.sum())
    report.target_tokens = int(targets[kept].sum())
    return examples
