"""--adapter, given once or several times: a folder, or NAME=FOLDER for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxpeft.errors import InputError, did_you_mean

NONE = "none"  # the base alone
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)=(?P<folder>.+)", re.DOTALL)


class Given(NamedTuple):
    """The adapters of a command: one that needs no name, or some with names, in order; both may be missing."""

    one: Path | None = None
    named: dict[str, Path] = {}  # noqa: RUF012 - never changed in place

    @property
    def document(self) -> dict[str, object]:
        """What a command's document says of them."""
        return {"adapters": self.named} if self.named else {"adapter": self.one}

    def folder(self, name: str | None) -> Path | None:
        """The folder of a name; None: without a name, or no adapter."""
        return self.named.get(name or NONE) if self.named else self.one

    def known(self, name: str, where: str) -> str:
        """A name as it was given, if it is one, or `none`.

        Raises:
          InputError: for another.
        """
        if name != NONE and name not in self.named:
            raise InputError(f"{where}: no adapter is called {name!r}" + did_you_mean(name, [*self.named, NONE]))
        return name


def read(texts: Sequence[str]) -> Given:
    """The values of --adapter.

    >>> read(["run/adapter"]).one, read(["a=x", "b=y/z"]).named
    (PosixPath('run/adapter'), {'a': PosixPath('x'), 'b': PosixPath('y/z')})

    Raises:
      InputError: for several of which one has no name, a name twice, or one that cannot be.
    """
    named: dict[str, Path] = {}
    plain = [text for text in texts if not _NAMED.fullmatch(text) or Path(text).is_dir()]
    if plain and len(texts) > 1:
        raise InputError(f"--adapter {plain[0]}: of several adapters each has a name; give --adapter NAME=FOLDER")
    if plain:
        return Given(Path(plain[0]))
    for text in texts:
        name, _, folder = text.partition("=")
        if name in named or name == NONE:
            raise InputError(f"--adapter {text}: " + ("the name stands twice" if name in named else "means no adapter"))
        named[name] = Path(folder)
    return Given(None, named)
