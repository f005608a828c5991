"""Rows to token ids and the mask of what is trained on, by batches through the tokenizer.

A text row becomes

    [BOS] prompt completion [EOS]        mask:  0  0...0  1...1  1

where prompt and completion are tokenized apart. The prompt's ids are then exactly those that the
tokenizer gives for the prompt alone, which is what the model is given when it generates; tokenizing
the joined text would merge characters across the boundary (a line break with the word after it).
A tokenizer that opens every text with a space marker (Llama 2) opens the completion with it too.
BOS is there if the tokenizer puts it before a text, EOS if the model has one, and neither where the
text brings it (see `jaxpeft.special`).

A conversation is tokenized as the one text that its chat template writes (which has its own BOS);
a token counts as completion if any of its characters is in an assistant turn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpeft.data.chat import Chat
from jaxpeft.data.formats import Text
from jaxpeft.special import SpecialTokens, from_parts

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
    (ids,) = _tokenize([prompt], tokenizer)
    return special.opening(ids) + ids


def encode_texts(
    rows: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens | None = None
) -> list[Encoded]:
    """Token ids and masks of text rows, in their order.

    Args:
      rows: the texts.
      tokenizer: a Hugging Face tokenizer.
      special: the model's special tokens; None: those that the tokenizer names.
    """
    special = from_parts(tokenizer) if special is None else special
    prompts = _tokenize([row.prompt for row in rows], tokenizer)
    completions = _tokenize([row.completion for row in rows], tokenizer)
    encoded = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = prompt + completion
        opening, closing = special.opening(text), special.closing(text)
        untrained = max(len(opening) + len(prompt), len(special.before))
        ids = np.array(opening + text + closing, np.int32)
        encoded.append(Encoded(ids, np.arange(len(ids)) >= untrained))
    return encoded


def encode_chats(rows: Sequence[Chat], tokenizer: "PreTrainedTokenizerBase") -> list[Encoded]:
    """Token ids and masks of rendered conversations, in their order (needs a fast tokenizer)."""
    if not rows:
        return []
    encoded = tokenizer(
        [row.text for row in rows],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [
        Encoded(np.array(ids, np.int32), _overlaps(offsets, row.spans))
        for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """(n,) bool: which tokens, given as [first, end) characters, share one with a span."""
    first, end = np.array(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(first), np.bool_)
    for span_first, span_end in spans:
        mask |= (first < span_end) & (end > span_first)
    return mask


def _tokenize(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])
