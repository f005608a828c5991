"""A file of rows of each kind, to records.

    .jsonl .ndjson            JSON Lines, as is a file whose name has no ending             file:line
    .json                     an array of objects, or JSON Lines                            file:line (row N)
    .csv .tsv                 a line of column names, then the rows                         file:line
    .parquet .arrow .feather  columns; Arrow is what `datasets` saves                       file:row N

Text may be compressed by gzip or zstd, which its first bytes tell. Empty lines at the end of a text are none. Where a
kind has columns, each row has all of them: an empty cell of csv and tsv, and a null of the others (in the objects of a
column too), is a field that the row doesn't have. Cells are text; in the column `label` one that spells a number is
that number, and `messages` and `tools` hold JSON.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jaxpeft.data import jsonl
from jaxpeft.data.jsonl import as_object, check_length, number_lines, parse_line
from jaxpeft.errors import InputError, did_you_mean, first_line

_MOST_WHOLE = 2**31  # bytes of an array, which is read whole
ROWS = 1000  # of a columnar file in memory at once
_MOST_CELLS = 4  # of the greatest size in a row
_JSON_COLUMNS = ("messages", "tools")
SOURCE = "source"  # the field that says which data a record is of
ADAPTER = "adapter"  # the field that names the adapter which is trained on it, of several
_WHOLE = re.compile(r"[-+]?(0|[1-9]\d*)")
_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")


class Record(NamedTuple):
    """A record of a file, not yet looked into.

    number: its line, or its row where the kind has no lines; counted on over the files of a folder.
    where: "file:line" or "file:row N", which opens every message about it.
    content: a line of JSON, the fields, or what is wrong with it.
    file: its file's name in a folder; "" of one that is read alone.
    """

    number: int
    where: str
    content: bytes | dict[str, Any] | InputError
    file: str = ""

    def fields(self) -> dict[str, Any]:
        """The fields by name.

        Raises:
          InputError: the record is faulty.
        """
        if isinstance(self.content, InputError):
            raise self.content
        return parse_line(self.content, self.where) if isinstance(self.content, bytes) else self.content

    def source(self, fields: dict[str, Any], adapters: Sequence[str] = ()) -> int:
        """A number, from 1, of the data that a record is of: its field `source`, else its file; 0 without either.

        Where several adapters are trained, it is that of the one which the record names.

        Raises:
          InputError: for a record that names none of them.
        """
        if adapters:
            return 1 + self._adapter(fields, adapters)
        named = fields.get(SOURCE)
        name = named if isinstance(named, str) else self.file
        return 1 + zlib.crc32(name.encode("utf-8", "replace")) % (2**31 - 1) if name else 0

    def _adapter(self, fields: dict[str, Any], adapters: Sequence[str]) -> int:
        name = fields.get(ADAPTER)
        if name is None:
            raise InputError(
                f"{self.where}: field {ADAPTER} is missing: of several, each row names one of {', '.join(adapters)}"
            )
        if not isinstance(name, str):
            raise InputError(f"{self.where}: field {ADAPTER} must be a name, a string, found {jsonl.json_type(name)}")
        if name not in adapters:
            raise InputError(f"{self.where}: no adapter is called {name!r}" + did_you_mean(name, adapters))
        return list(adapters).index(name)


# Text.


def opened(path: Path, name: str) -> IO[bytes]:
    """A file, open; one that cannot be is an InputError that begins with `name`."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error


def read_lines(path: Path, name: str | None = None, arrays: bool = False) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, the line with its end) of a text, unpacked; empty lines at its end are left out.

    Of a line that is too long, the beginning is given (see `jsonl.check_length`). With `arrays`, an array that opens
    the text is given with all that follows it, in one.

    Raises:
      InputError: the file, called `name` where it has another, cannot be read.
    """
    name, number = name or str(path), 0
    with opened(path, name) as file:
        try:
            text = _unpacked(file)
            for number, raw in _without_last_empty(number_lines(text, name)):
                if arrays and raw.strip():
                    raw, arrays = raw + text.read(_MOST_WHOLE) if _is_array(raw) else raw, False
                yield number, raw
        except (OSError, EOFError, zlib.error) as error:
            after = f" after line {number}" if number else ""
            raise InputError(f"{name}: cannot be read{after}: {_reason(error)}") from error


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    head = cast(Any, file).peek(4)[:4]
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return file


def _without_last_empty(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    held: list[tuple[int, bytes]] = []
    for line in lines:
        if not line[1].strip():
            held.append(line)
            continue
        yield from held
        held.clear()
        yield line


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _json_lines(path: Path, name: str) -> Iterator[Record]:
    for number, raw in read_lines(path, name):
        yield Record(number, f"{name}:{number}", raw.rstrip(b"\r\n"))


def _json(path: Path, name: str) -> Iterator[Record]:
    """An array of objects, read whole; or JSON Lines, where the first character opens an object."""
    lines = read_lines(path, name, arrays=True)
    first = list(itertools.islice((line for line in lines if line[1].strip()), 1))
    if first and not _is_array(first[0][1]):
        yield from (Record(n, f"{name}:{n}", raw.rstrip(b"\r\n")) for n, raw in itertools.chain(first, lines))
        return
    raw = b"\n" * (first[0][0] - 1) + first[0][1] if first else b""
    if len(raw) > _MOST_WHOLE:
        raise InputError(f"{name}: an array of more than {_MOST_WHOLE} bytes; write its elements as lines (.jsonl)")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise InputError(f"{name}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at column {column}") from error
    del raw
    yield from _elements(text, name)


def _is_array(raw: bytes) -> bool:
    return raw.lstrip().startswith(b"[")


def _elements(text: str, name: str) -> Iterator[Record]:
    """The elements of an array. What is no JSON ends it, as nothing says where the next element would begin."""
    blanks, decoder = re.compile(r"[ \t\n\r]*"), json.JSONDecoder()
    skip = lambda at: cast(re.Match[str], blanks.match(text, at)).end()
    at = skip(skip(0) + 1)  # behind the bracket
    closed, row, line, counted = text[at : at + 1] == "]", 0, 1, 0
    while not closed:
        row, line, counted = row + 1, line + text.count("\n", counted, at), at
        where = f"{name}:{line} (row {row})"
        try:
            value, at = decoder.raw_decode(text, at)
            at = skip(at)
            if text[at : at + 1] not in (",", "]") or at == len(text):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except json.JSONDecodeError as error:
            what = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            raise InputError(f"{where}: {what}") from error
        except (RecursionError, ValueError) as error:  # nested too deeply; a number too long
            raise InputError(f"{where}: JSON that cannot be read ({error})") from error
        if at - counted > jsonl.MOST_BYTES:
            yield Record(row, where, InputError(f"{where}: longer than {jsonl.MOST_BYTES} characters"))
        else:
            yield Record(row, where, _object(value, where))
        closed = text[at] == "]"
        at = skip(at + 1)
    if rest := text[at if row else at + 1 :].strip():
        raise InputError(f"{name}: not JSON: {rest[:20]!a} after the array's end")


def _object(value: Any, where: str) -> dict[str, Any] | InputError:
    try:
        return as_object(value, where)
    except InputError as error:
        return error


def _csv(path: Path, name: str) -> Iterator[Record]:
    yield from _cells(path, name, ",")


def _tsv(path: Path, name: str) -> Iterator[Record]:
    yield from _cells(path, name, "\t")


def _cells(path: Path, name: str, delimiter: str) -> Iterator[Record]:
    """Rows of cells under a first line of names; a quoted cell may hold line ends, and a row's line is its first."""
    csv.field_size_limit(jsonl.MOST_BYTES)  # a cell may hold a whole book
    broken: list[str] = []  # what is wrong with the lines of the row that is being read
    size = 0  # bytes of these lines

    def texts() -> Iterator[str]:
        nonlocal size
        for number, raw in read_lines(path, name):
            size += len(raw)
            if size > _MOST_CELLS * jsonl.MOST_BYTES:  # cells without an end
                raise InputError(
                    f"{where}: a row of more than {_MOST_CELLS * jsonl.MOST_BYTES} bytes; is a quote open?"
                )
            try:
                check_length(raw, f"{name}:{number}")
                yield raw.decode("utf-8")
            except InputError as error:
                broken.append(str(error))
                yield "\n"
            except UnicodeDecodeError as error:
                column = error.start + 1
                broken.append(f"{name}:{number}: not UTF-8: byte 0x{raw[error.start]:02x} at column {column}")
                yield raw.decode("utf-8", "replace")

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        number = reader.line_num + 1
        where = f"{name}:{number}"
        broken.clear()
        size = 0
        try:
            cells = next(reader)
            fault = broken[0] if broken else ""
        except StopIteration:
            return
        except csv.Error as error:
            cells, fault = [], f"{where}: not {path.suffix.lstrip('.') if names else 'csv'}: {error}"
        if not names:
            if fault or not any(cells):
                raise InputError(fault or f"{where}: an empty line; the first line names the columns")
            names = [cell.strip() for cell in cells]
            if twice := sorted({cell for cell in names if cell and names.count(cell) > 1}):
                raise InputError(f"{where}: the first line names the column {twice[0]!r} twice")
            continue
        if not fault and not cells:
            fault = f"{where}: empty line; every line must hold one row"
        if not fault and len(cells) != len(names):
            fault = f"{where}: {len(cells)} cells, where the first line names {len(names)} columns"
        yield Record(number, where, InputError(fault) if fault else _named(names, cells, where))


def _named(names: list[str], cells: list[str], where: str) -> dict[str, Any] | InputError:
    """The cells by their columns' names; empty ones are left out."""
    fields: dict[str, Any] = {column: cell for column, cell in zip(names, cells, strict=True) if column and cell}
    if "label" in fields:
        fields["label"] = _number(fields["label"])
    for column in _JSON_COLUMNS:
        if column in fields:
            try:
                fields[column] = json.loads(fields[column])
            except (ValueError, RecursionError) as error:
                return InputError(f"{where}: column {column} must hold JSON: {first_line(error)}")
    return fields


def _number(cell: str) -> int | float | str:
    """The number that a cell spells, else its text: 7 and 3.5, but not 007."""
    text = cell.strip()
    if len(text) < 1000 and _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else cell


# Columns.


def rows(batches: Iterable[list[dict[str, Any]]], name: str) -> Iterator[Record]:
    """The records of rows that come in batches; `name` opens what is said of them."""
    for number, row in enumerate(itertools.chain.from_iterable(batches), start=1):
        where = f"{name}:row {number}"
        long = [key for key, cell in row.items() if isinstance(cell, str) and len(cell) > jsonl.MOST_BYTES]
        too_long = InputError(f"{where}: column {long[0]}: longer than {jsonl.MOST_BYTES} characters") if long else None
        yield Record(number, where, too_long or _without_null(row))


def _without_null(value: Any) -> Any:
    """A value of a column without the fields that it has only because other rows have them."""
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from rows((_whole(batch).to_pylist() for batch in file.iter_batches(ROWS)), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}: is not Parquet that can be read: {first_line(error)}") from error


def _whole(batch: Any) -> Any:
    """A batch of columns of which a damaged one is refused: it would be read beyond its end otherwise."""
    batch.validate(full=True)
    return batch


def _arrow(path: Path, name: str) -> Iterator[Record]:
    """Arrow's file format, or its stream, which `datasets` writes."""
    import pyarrow

    def batches() -> Iterator[list[dict[str, Any]]]:
        with pyarrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                found = pyarrow.ipc.open_file(file)
                parts: Iterable[Any] = (found.get_batch(i) for i in range(found.num_record_batches))
            else:
                file.seek(0)
                parts = pyarrow.ipc.open_stream(file)
            for part in parts:
                for start in range(0, len(_whole(part)), ROWS):
                    yield part.slice(start, ROWS).to_pylist()

    try:
        yield from rows(batches(), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}: is not Arrow that can be read: {first_line(error)}") from error


TEXTS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    "": _json_lines,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
READERS = {**TEXTS, ".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow}
