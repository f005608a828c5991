"""Documents and their schemas: what is wrong is one line with the file, the field, its value and what is right."""

import json
from typing import Annotated, Literal

import pytest
from annotated_types import Ge
from typing_extensions import TypedDict

from jaxpeft import documents, files
from jaxpeft.documents import Count, Flag, Number, Text
from jaxpeft.errors import InputError


class Inner(TypedDict, total=False):
    names: list[Text] | Text
    rates: dict[Text, Number]
    ranks: dict[Text, Annotated[Count, Ge(2)]]


class Schema(TypedDict):
    kind: Literal["a", "b"]
    count: Count
    flag: Flag | None
    inner: Inner


class Sizes(TypedDict, total=False):
    sizes: tuple[int, ...]
    rate: float | None


GOOD = {"kind": "a", "count": 3, "flag": None, "inner": {"names": ["x"], "rates": {"x": 1}, "ranks": {"x": 2}}}


def changed(path, value):
    document = json.loads(json.dumps(GOOD))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return document


def test_what_fits_comes_back_as_it_was():
    document = {**GOOD, "more": {"of": ["anything"]}}
    assert documents.checked("file", Schema, document) is document


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["kind"], "c", "kind \"c\" should be 'a' or 'b'"),
        (["count"], "3", 'count "3" should be a whole number'),
        (["count"], True, "count true should be a whole number"),
        (["count"], 0, "count 0 should be at least 1"),
        (["count"], 10**12, "count 1000000000000 should be at most 2147483647"),
        (["flag"], 1, "flag 1 should be true or false"),
        (["inner"], [], "inner [] should be an object"),
        (["inner", "names"], 3, "inner.names 3 should be a list or text"),
        (["inner", "names"], [None], "inner.names.0 null should be text"),
        (["inner", "rates", "x"], float("nan"), "inner.rates.x NaN should be a finite number"),
        (["inner", "rates", "x"], "1", 'inner.rates.x "1" should be a number'),
        (["inner", "ranks", "x"], 1, "inner.ranks.x 1 should be at least 2"),
        (["inner", "rates"], "x" * 500, f'inner.rates "{"x" * 59}... should be an object'),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(path, value, said):
    with pytest.raises(InputError) as error:
        documents.checked("file", Schema, changed(path, value))
    assert str(error.value) == f"file: {said}"


def test_a_field_that_is_lacking():
    lacking = {name: value for name, value in GOOD.items() if name != "count"}
    with pytest.raises(InputError, match="^file: lacks count$"):
        documents.checked("file", Schema, lacking)
    with pytest.raises(InputError, match="^file: lacks inner.count$"):
        documents.checked("file", Schema, lacking, field="inner")


def test_jsons_form_of_a_type():
    documents.checked("file", Sizes, {"sizes": [1, 2], "rate": None}, as_json=True)
    with pytest.raises(InputError, match='^file: arguments.sizes.1 "2" should be a whole number$'):
        documents.checked("file", Sizes, {"sizes": [1, "2"]}, "arguments", as_json=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON: line 1: Expecting value"),
        (b'{"a": 1', "is not JSON: line 1: Expecting ',' delimiter"),
        (b"[]", "should hold a JSON object, not a list"),
        (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
        (b'{"a": ' + b"[" * 100_000, "is JSON nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is JSON that cannot be read: Exceeds the limit"),
    ],
)
def test_a_file_that_holds_no_document(content, said, tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        documents.read_json(file, "missing")
    assert str(error.value).startswith(f"{file}: {said}")


def test_a_file_is_read_up_to_a_bound(tmp_path):
    with pytest.raises(InputError, match="^there is none$"):
        documents.read_json(tmp_path / "file.json", "there is none")
    with pytest.raises(InputError, match="/dev/zero: has more than 1000 bytes"):
        files.read_text(files.Path("/dev/zero"), "there is none", most=1000, pipe=True)
    with pytest.raises(InputError, match="/dev/zero: is no regular file"):
        files.read_text(files.Path("/dev/zero"), "there is none")
    (tmp_path / "file.json").mkdir()
    with pytest.raises(InputError, match="file.json: is no regular file"):
        documents.read_json(tmp_path / "file.json", "there is none")
