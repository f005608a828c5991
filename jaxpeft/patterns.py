"""Regular expressions that a user or a file gives.

They mean what they mean to Python's `re`, which PEFT reads them with; but `re` has no limit, and one such as `(a+)+$`
can keep it busy for ever. So `re` is asked whether an expression is one, and the library `regex`, whose matching can be
stopped, looks for it.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import regex

from jaxpeft import limits
from jaxpeft.errors import InputError, first_line

MOST_CHARACTERS = 10_000  # of an expression
MOST_REPEATED = 2**20  # characters once what is repeated {n} times is written out, as `regex` does
SECONDS = 1.0  # to compile an expression, and to look for it in one text
SECONDS_IN_ALL = 10.0  # of the process's, that slow ones may take together
_SLOW = 1e-3  # honest ones take microseconds
_REPEATS = re.compile(r"\{\s*(\d+)")

_spent = 0.0


class Pattern:
    """An expression; `what` names it in errors, as in "targets 'q_proj'"."""

    def __init__(self, pattern: str, what: str):
        self._compiled, self._what = _compiled(pattern, what), what

    def found(self, text: str) -> bool:
        """Whether it is found anywhere in the text (`re.search`).

        Raises:
          InputError: if that takes too long.
        """
        return self._looked(self._compiled.search, text) is not None

    def begins(self, text: str) -> bool:
        """Whether the text begins with it (`re.match`); raises as `found` does."""
        return self._looked(self._compiled.match, text) is not None

    def is_whole(self, text: str) -> bool:
        """Whether the text is all of it (`re.fullmatch`); raises as `found` does."""
        return self._looked(self._compiled.fullmatch, text) is not None

    def part(self, text: str, group: str) -> str | None:
        """A named group where the text begins with it (`re.match`), None where it does not; raises as `found` does."""
        match = self._looked(self._compiled.match, text)
        return None if match is None else match[group]

    def _looked(self, look: Callable[..., Any], text: str) -> regex.Match[str] | None:
        global _spent
        started = time.thread_time()
        try:
            result = look(text, timeout=SECONDS)
        except TimeoutError:
            raise InputError(f"{self._what}: takes longer than {SECONDS:g} s to look for in {_short(text)}") from None
        except (MemoryError, RecursionError) as error:
            raise InputError(f"{self._what}: cannot be looked for in {_short(text)}: {first_line(error)}") from None
        took = time.thread_time() - started
        if took > _SLOW:
            _spent += took
            if _spent > SECONDS_IN_ALL:
                raise InputError(f"{self._what}: takes {took:.2g} s to look for in {_short(text)}, and is one of many")
        return result


@functools.lru_cache(4096)
def compiled(pattern: str, name: str, form: str = "{}") -> Pattern:
    """An expression.

    Args:
      pattern: as `re` takes it.
      name: of what it was given as, for errors: "targets".
      form: the expression that it is put into, at {}.

    Raises:
      InputError: for what is no regular expression, or is too long or repeats too much.
    """
    return Pattern(form.replace("{}", pattern), f"{name} {_short(pattern)}")


def found(pattern: str, text: str, name: str) -> bool:
    """Whether an expression is found in a text; arguments and errors as `compiled` and `Pattern.found` have them."""
    return compiled(pattern, name).found(text)


def _compiled(pattern: str, what: str) -> regex.Pattern[str]:
    if len(pattern) > MOST_CHARACTERS:
        raise InputError(f"{what}: has {len(pattern)} characters; a regular expression has at most {MOST_CHARACTERS}")
    try:
        with limits.bounded(SECONDS):
            re.compile(pattern)
            counts = [float(count) for count in _REPEATS.findall(pattern)]
            if math.prod(max(count, 1.0) for count in counts) * len(pattern) > MOST_REPEATED:
                raise InputError(f"{what}: not a regular expression that is taken: it repeats too often")
            return regex.compile(pattern)
    except limits.OutOfTime:
        raise InputError(f"{what}: takes longer than {SECONDS:g} s to compile") from None
    except (re.error, regex.error, ValueError, OverflowError, MemoryError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what}: not a regular expression ({first_line(error)})") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")
