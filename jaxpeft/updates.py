"""State that a forward pass leaves behind beside its result: batch statistics, caches.

A model puts it where whoever asked for it finds it. What traces a forward pass by itself must hand it on, as values of
that trace mean nothing outside.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from jaxpeft import tree

_found: contextvars.ContextVar[tree.Flat | None] = contextvars.ContextVar("updates", default=None)


def wanted() -> bool:
    """Whether anyone has asked."""
    return _found.get() is not None


def leave(state: tree.Flat) -> None:
    """{path: leaf}, for whoever has asked."""
    if (found := _found.get()) is not None:
        found.update(state)


@contextlib.contextmanager
def handed_on() -> Iterator[tree.Flat]:
    """As `collected`, but nothing is collected where nobody outside has asked."""
    if not wanted():
        yield {}
        return
    with collected() as found:
        yield found


@contextlib.contextmanager
def collected() -> Iterator[tree.Flat]:
    """The state that models leave behind while this is entered."""
    found: tree.Flat = {}
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)
