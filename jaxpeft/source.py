"""The line of the user's code among the frames of a stack."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Frame(NamedTuple):
    """A place in a Python program: the file's path, the function's name, the line (0: not known)."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        place = f"{self.file.rsplit('/', 1)[-1]}:{self.line}" if self.line else self.file.rsplit("/", 1)[-1]
        return f"{place} {self.function}".strip()


# What stands between the user's code and an array: JAX, the libraries over it, and Python's own library.
_LIBRARIES = re.compile(
    r"/(?:site|dist)-packages/(?:jax|jaxlib|flax|optax|chex|haiku|equinox|orbax|einops|numpy)/"
    r"|/lib/python3[.\d]*/(?!site-packages|dist-packages)|^<(?!stdin|string|ipython)"
)


def nearest(frames: Iterable[Frame]) -> Frame | None:
    """Of frames, innermost first, the first one in the user's code; None if none is."""
    return next((frame for frame in frames if frame.file.endswith(_PYTHON) and not _LIBRARIES.search(frame.file)), None)


_PYTHON = (".py", ">", ".ipynb", ".pyx")  # <stdin> and <string> are a user's, too
