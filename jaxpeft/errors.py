"""What the command line prints as one line, without a traceback or a place in code; and what such lines are made of."""

import difflib
import json
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Bad arguments or bad input: one line that says what, where, the offending value, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str):
        super().__init__(_line(message))


class RunError(RuntimeError):
    """A job that began well and could not be finished: one line that says what happened and what is left to go on from.

    The command line prints it without a traceback and exits with `status`.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(_line(message))
        self.status = status


class Elsewhere(RunError):
    """The end of a process because another one has failed, which says why: the command line prints nothing."""

    def __init__(self, status: int):
        super().__init__("another process has failed, and says why", status)


def status_of(error: BaseException) -> int:
    """The exit status that an error leads to."""
    return error.status if isinstance(error, RunError) else 2 if isinstance(error, InputError) else 1


_LONGEST = 1500  # characters of a line
_WORD = re.compile(r"\S{301,}")


def _line(message: str) -> str:
    """A message as one line that can be read: the middle of what is very long is left out."""
    text = _WORD.sub(lambda word: f"{word[0][:160]}...{word[0][-80:]}", " ".join(str(message).split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} ... {text[-300:]}"


class Notice(UserWarning):
    """A warning for the user of a command: one line, which leads to no line of code."""


def first_line(error: BaseException) -> str:
    """What another library's error says, as part of one line: its first line, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def in_one_line(error: BaseException, most: int = 300) -> str:
    """All that another library's error says, on one line of at most `most` characters."""
    text = " ".join(str(error).split())
    return (text[:most] + "..." if len(text) > most else text) or type(error).__name__


_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|failed to allocate|unable to allocate", re.IGNORECASE)


def out_of_memory(error: BaseException) -> str | None:
    """The line for an error by which XLA or NumPy says that there is not the memory; None for any other."""
    if not isinstance(error, MemoryError) and type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return None
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
        return None
    advice = "`jaxpeft plan` says what a step takes, and fits one into a --budget"
    return f"out of memory: {first_line(error)[:300].rstrip('.')}; {advice}"


def shown(value: object, width: int = 60) -> str:
    """A value as an error shows it: JSON, or its type where JSON has no such thing, of at most `width` characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= width else text[:width] + "..."


def printable(text: str) -> str:
    """A text on one line in which control characters, which could move the cursor, are spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def is_utf8(text: str) -> bool:
    """Whether a text can be written: bytes that were none, and halves of characters, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known ones, or all of them.

    >>> did_you_mean("lorra", ["lora", "lora_fa", "full"])
    '; did you mean lora or lora_fa?'
    """
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known: {', '.join(known)}" if known else ""
