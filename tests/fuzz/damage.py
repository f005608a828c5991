"""What makes damaged and hostile inputs, and what alone may come of one: success, or an InputError of one line.

Inputs follow from a seed alone. Each has a limit of time and of memory; a hang is an error of its own.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxpeft.errors import InputError

FEW, MANY = 20, 300
SECONDS, MIB = 30, 512
# A few in every test run, three hundred of each kind in `make test-slow`.
amounts = pytest.mark.parametrize("amount", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])

ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    10**12,
    10**30,
    0.5,
    -2.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "../../x",
    "zero\0byte",
    "\x1b[2J",
    "\ud800",
    "a" * 5000,
    "(a+)+$",
    "(.*)*(.*)*(.*)*x",
    "a{99999999999}",
    "{{ 'a' * 10 ** 12 }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    [],
    [None],
    ["x", 1],
    [[[[[]]]]],
    {},
    {"": None},
    {"x": "y"},
    {"0": -1},
)


def holds(strategy: st.SearchStrategy, amount: int, try_one: Callable[[Any], Any]) -> None:
    """Tries a number of inputs, in which success and an `InputError` of one line are all that is allowed."""

    @settings(
        max_examples=amount,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def run(one):
        with limited():
            try:
                try_one(one)
            except InputError as error:
                check_line(str(error))

    run()


def check_line(said: str) -> None:
    """Refuses what is not one readable line."""
    assert said.strip() and len(said.splitlines()) == 1, said
    assert len(said) < 1600, said


@contextlib.contextmanager
def limited(seconds: float = SECONDS, mib: int = MIB) -> Iterator[None]:
    """A hang, and memory that grows beyond the limit, become failures."""

    def late(number, frame):
        raise AssertionError(f"hangs: {seconds} s are over")

    before, old = _peak(), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert _peak() - before < mib * 2**20, f"takes {(_peak() - before) / 2**20:.0f} MiB"


def _peak() -> int:
    """The most that the process has had in memory, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Nothing in these folders is another, more or less afterwards."""
    before = [_contents(folder) for folder in folders]
    yield
    assert [_contents(folder) for folder in folders] == before


def _contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Inputs.


def documents(good: Any, odd: tuple[Any, ...] = ODD) -> st.SearchStrategy[bytes]:
    """JSON of a document of which one to three places are others, or whose bytes are damaged."""

    @st.composite
    def damaged(draw):
        document = copy.deepcopy(good)
        for _ in range(draw(st.integers(1, 3))):
            places = list(_places(document))
            at = draw(st.sampled_from(places)) if places else ()
            document = _changed(draw, document, at, copy.deepcopy(odd))
        text = json.dumps(document).encode("utf-8", "surrogatepass")
        return draw(broken(text)) if draw(st.integers(0, 3)) == 0 else text

    return st.one_of(damaged(), damaged(), damaged(), st.sampled_from(HOPELESS))


# What no document is.
HOPELESS = (
    b"",
    b"\0" * 64,
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe{}",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' * 100_000,
    b'{"a": ' + b"9" * 100_000 + b"}",
    b'{"a": NaN, "a": Infinity}',
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:50]:  # of a vocabulary, some
        yield (*at, key)
        yield from _places(item, (*at, key))


def _changed(draw: Any, document: Any, at: tuple[Any, ...], odd: tuple[Any, ...]) -> Any:
    if not at:
        return draw(st.sampled_from(odd))
    parent = document
    for key in at[:-1]:
        parent = parent[key]
    action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "add", "copy")))
    if action == "remove":
        del parent[at[-1]]
    elif action == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(("x", "../x", f"{at[-1]}_", "")))] = parent.pop(at[-1])
    elif action == "add" and isinstance(parent, dict):
        parent[draw(st.sampled_from(("x", "norm/scale", "use_dora", "labels")))] = draw(st.sampled_from(odd))
    elif action == "copy" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[at[-1]]))
    else:
        parent[at[-1]] = draw(st.sampled_from(odd))
    return document


def broken(good: bytes, within: int | None = None) -> st.SearchStrategy[bytes]:
    """Bytes that are cut, changed, repeated or preceded by others, in their first `within` (all of them by default)."""
    end = min(len(good), within or len(good))

    @st.composite
    def damaged(draw):
        at = draw(st.integers(0, max(end - 1, 0)))
        action = draw(st.sampled_from(("cut", "change", "change", "change", "remove", "insert", "repeat")))
        if action == "cut":
            return good[:at]
        if action == "change":
            return good[:at] + bytes([draw(st.integers(0, 255))]) + good[at + 1 :]
        if action == "remove":
            return good[:at] + good[at + draw(st.integers(1, 64)) :]
        if action == "insert":
            return good[:at] + draw(st.binary(min_size=1, max_size=16)) + good[at:]
        return good[:at] + good[: draw(st.integers(1, 64))] + good[at:]

    return damaged()
