"""New tokens as text: what they read after the prompt, all at once or as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

_BEFORE = 16  # tokens of the prompt that the reading of the next ones may depend on
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes are decoded to that are not a whole character


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new ids as it reads after the prompt's, without special tokens.

    Tokenizers drop a space where a text begins, so that new ids alone may decode to another text.
    """
    near = list(prompt[-_BEFORE:])
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (near, [*near, *new]))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(new), skip_special_tokens=True)


class TextStream:
    """The pieces of a `continuation` as its tokens come; together they are the whole of it.

    A character of which some bytes are yet to come is held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]):
        self._tokenizer, self._prompt = tokenizer, list(prompt[-_BEFORE:])
        self.ids: list[int] = []
        self.text = ""

    def add(self, ids: Sequence[int]) -> str:
        """What can be said after these ids, "" where it has to wait."""
        self.ids += ids
        return self._said(continuation(self._tokenizer, self._prompt, self.ids).rstrip(_BROKEN))

    def rest(self) -> str:
        """What was held back and is not going to be completed."""
        return self._said(continuation(self._tokenizer, self._prompt, self.ids))

    def _said(self, text: str) -> str:
        if not text.startswith(self.text):  # bytes not whole yet may spoil those before them
            return ""
        piece = text[len(self.text) :]
        self.text = text
        return piece
