"""Rows to token ids and the mask of what is trained on, by batches through the tokenizer.

A text row becomes

    [BOS] prompt completion [EOS]        mask:  0  0...0  1...1  1

where prompt and completion are tokenized as the one text that they are. Where the ids of the prompt alone begin those
of the whole, which is the rule, the completion begins behind them: training shows before it what a model is given when
it generates. Otherwise a token lies across the boundary ("foot", "ball" -> "football"), and the completion begins with
the first token that ends in it, so that all of its characters are trained on. A slow tokenizer doesn't say where tokens
end: there the completion begins with the first token that the prompt alone doesn't have.

BOS is there if the tokenizer puts it before a text, EOS if the model has one, and neither where the text brings it (see
`jaxpeft.special`).

A conversation is tokenized as the one text that its chat template writes (which has its own BOS); a token counts as
completion if any of its characters is in an assistant turn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpeft.data.chat import Chat, shared
from jaxpeft.data.formats import Text
from jaxpeft.special import SpecialTokens, from_parts
from jaxpeft.tokenizing import tokenize

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """Token ids of one row and which of them are trained on.

    ids: int32 (n + 1,);  completion: bool (n + 1,).
    """

    ids: npt.NDArray[np.int32]
    completion: npt.NDArray[np.bool_]


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens | None = None) -> list[int]:
    """The ids that a prompt has in training: what to give the model to generate from."""
    special = from_parts(tokenizer) if special is None else special
    (ids,) = _tokenize([prompt], tokenizer)["input_ids"]
    return special.opening(ids) + ids


def encode_texts(
    rows: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens | None = None
) -> list[Encoded]:
    """Token ids and masks of text rows, in their order.

    Args:
      rows: the texts.
      tokenizer: a Hugging Face tokenizer.
      special: the model's special tokens; None: those that the tokenizer names.

    Raises:
      Refused: by the tokenizer, which fails or takes too long.
    """
    if not rows:
        return []
    special = from_parts(tokenizer) if special is None else special
    prompts = _tokenize([row.prompt for row in rows], tokenizer)["input_ids"]
    wholes = _tokenize([row.prompt + row.completion for row in rows], tokenizer, offsets=tokenizer.is_fast)
    encoded = []
    for i, (row, prompt, text) in enumerate(zip(rows, prompts, wholes["input_ids"], strict=True)):
        start = _start(prompt, text, wholes["offset_mapping"][i] if tokenizer.is_fast else None, len(row.prompt))
        opening, closing = special.opening(text), special.closing(text)
        untrained = max(len(opening) + start, len(special.before))
        ids = np.array(opening + text + closing, np.int32)
        encoded.append(Encoded(ids, np.arange(len(ids)) >= untrained))
    return encoded


def encode_chats(rows: Sequence[Chat], tokenizer: "PreTrainedTokenizerBase") -> list[Encoded]:
    """Token ids and masks of rendered conversations, in their order (needs a fast tokenizer)."""
    if not rows:
        return []
    encoded = _tokenize([row.text for row in rows], tokenizer, offsets=True)
    return [
        Encoded(np.array(ids, np.int32), _overlaps(offsets, row.spans))
        for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _start(prompt: list[int], text: list[int], offsets: Sequence[tuple[int, int]] | None, characters: int) -> int:
    """Where the completion begins among the ids of the whole text (see the module's docstring).

    Args:
      prompt: ids of the prompt alone.
      text: of the whole.  offsets: the [first, end) characters of these, None where the tokenizer doesn't know them.
      characters: of the prompt.
    """
    if text[: len(prompt)] == prompt:
        return len(prompt)
    if offsets is not None:
        return next((i for i, (_, end) in enumerate(offsets) if end > characters), len(text))
    return shared(prompt, text)


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """(n,) bool: which tokens, given as [first, end) characters, share one with a span."""
    first, end = np.array(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(first), np.bool_)
    for span_first, span_end in spans:
        mask |= (first < span_end) & (end > span_first)
    return mask


def _tokenize(texts: list[str], tokenizer: "PreTrainedTokenizerBase", offsets: bool = False) -> Any:
    """What the tokenizer gives for texts, without the special tokens that it adds by itself."""
    options: dict[str, Any] = {"return_offsets_mapping": offsets, "verbose": False}
    return tokenize(tokenizer, texts, add_special_tokens=False, return_attention_mask=False, **options)
