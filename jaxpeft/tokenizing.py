"""Tokenizers as files bring them: refused where they multiply text, and called with a deadline.

A tokenizer's code cannot be interrupted, and ends the process where memory is short. So one whose rules can make a text
more than MOST_GROWTH times as long is not loaded, and each call has a time after which it is left alone.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxpeft import limits
from jaxpeft.errors import InputError, first_line

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

SECONDS = 60.0  # of a call, and
CHARACTERS_PER_SECOND = 100_000  # more for long texts; the slowest take a tenth of that time
MOST_GROWTH = 64  # characters that rules may make of one
MOST_ADDED = 1024  # tokens put around a text
_redirects = threading.Lock()
_PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
_INNER = ("normalizers", "pretokenizers", "decoders", "processors")


class Refused(InputError):
    """A call that failed; `row` is the number of the text it failed at, None where that cannot be told."""

    def __init__(self, message: str, row: int | None):
        super().__init__(message)
        self.row = row


def tokenize(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[str], second: Sequence[str] | None = None, **options: Any
) -> Any:
    """What `tokenizer(first, second, **options)` gives.

    Raises:
      Refused: where it fails, or takes longer than SECONDS and the time that long texts take.
    """
    pairs = list(second or [])
    call = lambda one, two: tokenizer(one, two, **options)
    try:
        return _call(call, list(first), pairs or None)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        return _blame(call, first, pairs, error)


@contextlib.contextmanager
def at(where: Callable[[int], str]) -> Iterator[None]:
    """Opens the line of a `Refused` with where its text is from, by the text's number."""
    try:
        yield
    except Refused as error:
        place = "" if error.row is None else f"{where(error.row)}: "
        raise InputError(f"{place}{error}") from error.__cause__


def _call(call: Callable[..., Any], first: list[str], second: list[str] | None) -> Any:
    seconds = SECONDS + sum(map(len, [*first, *(second or [])])) / CHARACTERS_PER_SECOND
    with _quiet():
        return limits.waited(seconds, lambda: call(first, second))


def _blame(call: Callable[..., Any], first: Sequence[str], second: Sequence[str], error: BaseException) -> Any:
    """Raises the error of a call as that of the first text that fails alone, the longest first."""
    said = first_line(error) if isinstance(error, TimeoutError) else f"fails: {first_line(error)[:200]}"
    row = 0 if len(first) == 1 else None
    if row is None:
        row = _first_bad(call, first, second, time.monotonic() + SECONDS)
    raise Refused(f"the tokenizer {said}", row) from (error if isinstance(error, Exception) else None)


def _first_bad(call: Callable[..., Any], first: Sequence[str], second: Sequence[str], until: float) -> int | None:
    for i in sorted(range(len(first)), key=lambda i: -len(first[i])):
        left = min(SECONDS / 4, until - time.monotonic())
        if left <= 0:
            break
        try:
            with _quiet():
                limits.waited(left, functools.partial(call, [first[i]], [second[i]] if second else None))
        except KeyboardInterrupt:
            raise
        except BaseException:
            return i
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is written to stderr is held back, and dropped where code of Rust has panicked: its error says it."""
    if not _redirects.acquire(blocking=False):  # another thread's call
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(_redirects.release)
        try:
            before, file = os.dup(2), stack.enter_context(tempfile.TemporaryFile())
        except OSError:  # no stderr, or no place
            yield
            return
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            if (said := file.read(2**20)) and b"panicked at" not in said:
                os.write(2, said)


# What rules can make of a text.


def check_rules(where: Any, tokenizer: Mapping[str, Any]) -> None:
    """Refuses rules that multiply text.

    Args:
      where: the file, which opens the line.
      tokenizer: what tokenizer.json holds, or some of it.

    Raises:
      InputError: for rules that can make more than MOST_GROWTH characters of one, or put more than MOST_ADDED tokens
        around a text.
    """
    rules = [rule for name in _PARTS[:2] for rule in _flat(tokenizer.get(name))]
    for what, size in (("rules", _grown(rules)), ("decoder", _grown(_flat(tokenizer.get("decoder"))))):
        if size > MOST_GROWTH:
            raise InputError(f"{where}: the tokenizer's {what} can make a text {size:.3g} times as long; refused")
    model = tokenizer.get("model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        affix = model.get(name) if isinstance(model, Mapping) else None
        if isinstance(affix, str) and len(affix) > MOST_GROWTH:
            raise InputError(f"{where}: the tokenizer's {name} has {len(affix)} characters; refused")
    if (added := sum(map(_added, _flat(tokenizer.get("post_processor"))))) > MOST_ADDED:
        raise InputError(f"{where}: the tokenizer puts {added} tokens around a text; refused")


def rules_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `check_rules` looks at, of a loaded tokenizer; {} of one that is Python's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {name: getattr(backend, name, None) for name in _PARTS}
    return {name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}


def _flat(rule: Any) -> list[Mapping[str, Any]]:
    """A rule, or those of a sequence of them, in order."""
    found: list[Mapping[str, Any]] = []
    waiting = [rule]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, Mapping):
            continue
        inner = next((one[name] for name in _INNER if name in one), None)
        if isinstance(inner, list):
            waiting += reversed(inner)
        else:
            found.append(one)
    return found


def _grown(rules: Sequence[Mapping[str, Any]]) -> float:
    """The most characters that rules make of a text of one. What Unicode's own forms add is not counted."""
    size = 1.0
    for rule in rules:
        kind = rule.get("type")
        if kind == "Replace":
            size *= _factor(rule.get("pattern"), str(rule.get("content", "")))
        elif kind == "Prepend":
            size += len(str(rule.get("prepend", "")))
        elif kind == "Precompiled":
            size *= 1 + _longest(rule.get("precompiled_charsmap")) // MOST_GROWTH
        elif kind == "ByteLevel":  # each byte of a character above 127 becomes one of two bytes
            size *= 2
    return size


def _factor(pattern: Any, content: str) -> float:
    """How many characters a replacement makes of one."""
    text = pattern.get("String") if isinstance(pattern, Mapping) else None
    if isinstance(text, str) and text:
        return max(1.0, math.ceil(len(content) / len(text)))
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if isinstance(expression, str) and _takes_some(expression):
        return max(1.0, len(content))
    return 1.0 + len(content)


def _takes_some(expression: str) -> bool:
    """Whether an expression is one of the plain ones that cannot match an empty text: characters, classes, + and {n."""
    character = r"\\[dDwWsSnrtfpP](?:\{\w+\})?|\\[^a-zA-Z0-9]|[^\\()\[\]{}|?*+^$.]|\."
    item = rf"(?:\[\^?\]?[^\[\]\\]*(?:\\.[^\[\]\\]*)*\]|{character})"
    return re.fullmatch(rf"\^?{item}(?:\+|\{{[1-9]\d*,?\d*\}})?(?:{item}[+*?]?)*\$?", expression) is not None


def _longest(charsmap: Any) -> int:
    """Bytes of the longest text that a SentencePiece table of characters has for one."""
    try:
        table = base64.b64decode(charsmap)
    except (ValueError, TypeError):
        return 0
    return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")), default=0)


def _added(rule: Mapping[str, Any]) -> int:
    """Tokens that a template of special tokens has, for one text or a pair."""
    tokens = rule.get("special_tokens")
    known = tokens if isinstance(tokens, Mapping) else {}
    size = lambda token: len(token.get("ids", ())) if isinstance(token, Mapping) else 1
    pieces = [piece for name in ("single", "pair") for piece in rule.get(name) or () if isinstance(piece, Mapping)]
    named = [piece["SpecialToken"].get("id") for piece in pieces if isinstance(piece.get("SpecialToken"), Mapping)]
    return sum(size(known.get(name, {})) for name in named)
