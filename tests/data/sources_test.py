"""Every kind of file gives the same records, and every fault is one line that says where."""

import gzip
import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from jaxpeft.cli.prompts import read_prompts
from jaxpeft.data import jsonl, records
from jaxpeft.data.sources import find
from jaxpeft.errors import InputError

ROWS = [{"prompt": "one", "completion": 'two, "three"\nfour'}, {"prompt": "é\u2028", "completion": " five"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def columns(write: Any) -> bytes:
    file = io.BytesIO()
    write(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


def stream(table: pa.Table, file: io.BytesIO) -> None:
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


CSV = b'prompt,completion\r\none,"two, ""three""\nfour"\r\n' + "é\u2028, five\r\n".encode()
FILES = {
    "rows.jsonl": LINES,
    "rows.ndjson": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "rows": LINES.removesuffix(b"\n"),
    "rows.JSONL": LINES + b"\n \r\n\n",
    "rows.json": json.dumps(ROWS).encode(),
    "lines.json": LINES,
    "indented.json": b"\n" + json.dumps(ROWS, indent=2).encode() + b"\n\n",
    "rows.csv": b"\xef\xbb\xbf" + CSV + b"\n\n",
    "rows.tsv": CSV.replace(b"prompt,", b"prompt\t").replace(b"one,", b"one\t").replace(b", five", b"\t five"),
    "rows.parquet": columns(pa.parquet.write_table),
    "rows.feather": columns(pa.feather.write_feather),
    "rows.arrow": columns(stream),
    "rows.jsonl.gz": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "rows.csv.gz": gzip.compress(CSV),
    "rows.json.zst": pa.compress(json.dumps(ROWS).encode(), "zstd", asbytes=True),
    "packed.jsonl": gzip.compress(LINES),  # by what it holds, not by its name
    "unpacked.jsonl.gz": LINES,
}
PLACES = {"rows.json": (":1 (row 1)", ":1 (row 2)"), "indented.json": (":3 (row 1)", ":7 (row 2)")}


def write(folder: Path, name: str, content: bytes | str) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def read(path: Path) -> list[dict[str, Any]]:
    return [record.fields() for record in find(path).records()]


@pytest.mark.parametrize("name", FILES)
def test_kinds(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, FILES[name])
    records = list(find(file).records())
    assert [record.fields() for record in records] == ROWS
    expected = (":1", ":2")
    if ".csv" in name or ".tsv" in name:
        expected = (":2", ":4")  # under the names; the first row has two lines
    elif name.endswith((".parquet", ".arrow", ".feather")):
        expected = (":row 1", ":row 2")
    elif ".json" in name and "lines" not in name and "jsonl" not in name.lower():
        expected = PLACES["indented.json" if name.startswith("indented") else "rows.json"]
    assert [record.where for record in records] == [f"{file}{place}" for place in expected]


def test_lines_are_told_by_their_ends_alone(tmp_path: Path) -> None:
    text = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    assert read(write(tmp_path, "rows.jsonl", text)) == [{"text": "a\u2028b\x85c"}]
    assert read(write(tmp_path, "empty.jsonl", "")) == read(write(tmp_path, "empty.json", "[ ]\n")) == []
    *_, last = find(write(tmp_path, "rows.jsonl", "{}\n\n{}\n\n")).records()
    assert last.number == 3


def test_empty_cells_and_nulls_are_absent_fields(tmp_path: Path) -> None:
    file = write(tmp_path, "rows.csv", "prompt,completion,text\na,b,\n,,c\n")
    assert read(file) == [{"prompt": "a", "completion": "b"}, {"text": "c"}]
    rows: list[dict[str, Any]] = [{"text": "a", "turns": [{"role": "b"}, {"name": "c"}]}, {"label": 3}]
    pa.parquet.write_table(pa.Table.from_pylist([{"label": None, **rows[0]}, rows[1]]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows


def test_cells_are_text_but_labels_may_be_numbers(tmp_path: Path) -> None:
    cells = ["3", "-1", "007", "3.8", "1e3", ".5", "1.", "card", "nan", "1_0", "inf"]
    file = write(tmp_path, "rows.csv", "text,label\n" + "".join(f"7,{cell}\n" for cell in cells))
    labels = [3, -1, "007", 3.8, 1000.0, 0.5, 1.0, "card", "nan", "1_0", "inf"]
    rows = read(file)
    assert [row["label"] for row in rows] == labels
    assert [type(row["label"]) for row in rows] == [type(label) for label in labels]
    assert {row["text"] for row in rows} == {"7"}
    file = write(tmp_path, "chats.tsv", 'messages\n"[{""role"": ""user""}]"\n')
    assert read(file) == [{"messages": [{"role": "user"}]}]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", "{}\n\n{}", ":2: empty line"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "\xff"}', ":2: not UTF-8: byte 0xff at column 8"),
        ("rows.json", "[{},\n 3]", ":2 (row 2): must be a JSON object, found number: '3'"),
        ("rows.json", "[{},\n {]", ":2 (row 2): not JSON: Expecting property name"),
        ("rows.json", "[{}, {}", " (row 2): not JSON: Expecting ',' or ']' at line 1, column 8"),
        ("rows.json", "[{},]", " (row 2): not JSON"),
        ("rows.json", "[{}] {}", ": not JSON: '{}' after the array's end"),
        ("rows.json", b'[{},\n{"a": "\xff"}]', ":2: not UTF-8: byte 0xff at column 8"),
        ("rows.csv", "a,b\n1,2\n3\n", ":3: 1 cells, where the first line names 2 columns"),
        ("rows.csv", "a,b\n1,2\n\n3,4", ":3: empty line"),
        ("rows.csv", 'a,b\n1,"2\n', ":2: not csv: unexpected end of data"),
        ("rows.csv", b"a,b\n1,2\n1,\xff\n", ":3: not UTF-8: byte 0xff at column 3"),
        ("rows.csv", "a,a\n", ":1: the first line names the column 'a' twice"),
        ("rows.csv", "messages\nhello\n", ":2: column messages must hold JSON"),
        ("rows.parquet", "PAR1", ": is not Parquet that can be read"),
        ("rows.arrow", "{}", ": is not Arrow that can be read"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], ": cannot be read"),
        ("rows.jsonl.zst", pa.compress(LINES, "zstd", asbytes=True)[:-4], ": cannot be read"),
        ("rows.xlsx", "PK", "kinds: .jsonl, .json (an array, or lines), .csv, .tsv"),
        ("rows.parquet.gz", "PK", "kinds: .jsonl"),
    ],
)
def test_faults(tmp_path: Path, name: str, content: bytes | str, says: str) -> None:
    file = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        read(file)
    assert str(caught.value).startswith(str(file))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_behind_a_faulty_one_is_read(tmp_path: Path) -> None:
    for name, content in {"a.csv": 'a\n"1" 2\n3\n', "a.tsv": "a\tb\n1\n3\t4\n", "a.json": '[1, {"a": "3"}]'}.items():
        _, good = find(write(tmp_path, name, content)).records()
        assert good.fields()["a"] == "3"


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in {"b.csv": "text\nc\n\n", "a.csv": 'text\na\n"b\nb"\n', "README.md": "x", ".c.csv": "x"}.items():
        write(tmp_path, name, text)
    records = list(find(f"{tmp_path}/").records())
    assert [record.fields()["text"] for record in records] == ["a", "b\nb", "c"]
    assert [record.where for record in records] == [
        f"{tmp_path}/{place}" for place in ("a.csv:2", "a.csv:3", "b.csv:2")
    ]
    assert len({record.number for record in records}) == 3
    first, second, third = (record.source(record.fields()) for record in records)
    assert first == second != third and first > 0
    assert next(iter(find(tmp_path / "a.csv").records())).source({}) == 0
    assert {records[0].source({"source": "b.csv"}), records[0].source({"source": None})} == {first, third}
    write(tmp_path, "c.jsonl", "{}")
    with pytest.raises(InputError, match=r"holds files of several kinds \(\.csv, \.jsonl\)"):
        find(tmp_path)
    (tmp_path / "other" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds no file of rows \(folders in it: train\); kinds: \.jsonl"):
        find(tmp_path / "other")


def test_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in (tmp_path / "absent.jsonl", tmp_path / "file" / "rows.jsonl", "absent/rows.jsonl", "absent", ""):
        with pytest.raises(InputError, match="no such file"):
            find(name)


class Table:
    """What `datasets` returns, as far as it is asked."""

    def with_format(self, name: str) -> "Table":
        assert name == "arrow"
        return self

    def iter(self, batch_size: int) -> Any:
        return iter(pa.Table.from_pylist([row]) for row in ROWS)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:main:test[:10%]", ("owner/name", "main", "test[:10%]")),
    ],
)
def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch, given: str, asked: tuple[str | None, ...]) -> None:
    calls = []
    load = lambda name, config, split: calls.append((name, config, split)) or Table()
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    records = list(find(given).records())
    assert calls == [asked]
    assert [record.fields() for record in records] == ROWS
    assert records[1].where == f"{given}:row 2"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"no such file or folder; .* pip install 'jaxpeft\[datasets\]'"):
        find(given)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of at most 100 bytes."""
    monkeypatch.setattr(jsonl, "MOST_BYTES", 100)
    monkeypatch.setattr(jsonl, "MOST_PASSED", 1000)
    monkeypatch.setattr(records, "_MOST_WHOLE", 1000)


def faults(path: Path) -> list[str]:
    """What is wrong with each record, "" where it is good."""
    found = []
    for record in find(path).records():
        try:
            record.fields()
            found.append("")
        except InputError as error:
            found.append(str(error).removeprefix(f"{path}"))
    return found


LONG = json.dumps({"text": "x" * 500})
SHORT = json.dumps({"text": "x"})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_line_that_is_too_long_is_a_fault_and_passed_over(tmp_path: Path, short: None, name: str) -> None:
    content = f"{SHORT}\n{LONG}\n{SHORT}\n".encode()
    packed = {".gz": gzip.compress, ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True)}
    path = write(tmp_path, name, packed.get(Path(name).suffix, lambda raw: raw)(content))
    assert faults(path) == ["", ":2: longer than 9.54e-05 MiB, the most that a row may have", ""]


def test_the_longest_line_is_read(tmp_path: Path, short: None) -> None:
    line = json.dumps({"text": "x" * 88})
    assert len(line) == 100
    assert faults(write(tmp_path, "rows.jsonl", f"{line}\r\n{line}\n{line}")) == ["", "", ""]
    assert faults(write(tmp_path, "rows.jsonl", f"{line} \n{SHORT}"))[0].startswith(":1: longer than 9.54e-05 MiB")


def test_elements_and_cells_that_are_too_long(tmp_path: Path, short: None) -> None:
    assert faults(write(tmp_path, "rows.json", f"[{SHORT}, {LONG},\n{SHORT}]")) == [
        "", ":1 (row 2): longer than 100 characters", ""
    ]  # fmt: skip
    rows = f"text,label\nx,1\n{'x' * 500},1\nx,1\n"
    assert [fault[:20] for fault in faults(write(tmp_path, "rows.csv", rows))] == ["", ":3: longer than 9.54", ""]
    cell = "y\n" * 60
    rows = f'text,label\nx,1\n"{cell}",1\n'
    assert "field larger than field limit (100)" in faults(write(tmp_path, "rows.csv", rows))[1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", SHORT + "\n" + "x" * 2000, ":2: longer than 0.000954 MiB; is it a text of lines"),
        (
            "rows.json",
            f"[{', '.join([SHORT] * 200)}]",
            ": an array of more than 1000 bytes; write its",
        ),
        ("rows.csv", "a,b\n" + '"y\n",' * 200, ":2: a row of more than 400 bytes; is a quote open"),
    ],
)
def test_what_is_not_read_to_its_end(tmp_path: Path, short: None, name: str, content: str, says: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=f"{name}{re.escape(says)}"):
        list(find(path).records())


def test_a_device_without_lines_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MOST_PASSED", 2**26)
    with pytest.raises(InputError, match=r"^/dev/zero:1: longer than 64 MiB"):
        list(find("/dev/zero").records())


def test_a_prompt_that_is_too_long(tmp_path: Path, short: None) -> None:
    with pytest.raises(InputError, match=r"prompts.txt:2: longer than"):
        read_prompts(write(tmp_path, "prompts.txt", f"one\n{'x' * 500}\n"))


@pytest.mark.usefixtures("short")
def test_a_cell_of_a_table_that_is_too_long(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": "b" * 101}, {"text": "c"}]), file)
    assert faults(file) == ["", ":row 2: column text: longer than 100 characters", ""]
