"""The tokens of a model that begin and end a text: one answer for training, which teaches them, and for decoding.

    ends    what decoding stops at: the EOS of config.json, of generation_config.json and of the tokenizer, and the
            token with which the chat template ends an assistant's turn
    end     what training appends: the tokenizer's EOS, else the first of config.json's or generation_config.json's
    before  what both put before a text: the tokenizer's BOS where the tokenizer puts it there by itself
    begin   what stands for an empty text: the tokenizer's BOS, else config.json's

A field may hold a token id or a list of them; a negative one stands for none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxpeft import limits, template
from jaxpeft.errors import InputError
from jaxpeft.tokenizing import tokenize

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

_SECONDS = 1.0  # to write a conversation of two words; a template that takes longer is refused where it is needed
# What may follow the end of a text in a file; a text that ends so has ended.
_BLANKS = ("\n", "\n\n", "\r\n", " ")


class SpecialTokens(NamedTuple):
    """Token ids that begin and end a text, as above; `blanks` are those of white space."""

    before: tuple[int, ...] = ()
    begin: int | None = None
    end: int | None = None
    ends: tuple[int, ...] = ()
    blanks: frozenset[int] = frozenset()

    def opening(self, ids: Sequence[int]) -> list[int]:
        """What goes before a text of these ids: BOS, unless the text begins with it."""
        return [] if ids and (ids[0],) == self.before else list(self.before)

    def closing(self, ids: Sequence[int]) -> list[int]:
        """What goes after a text of these ids: EOS, unless the text ends with a token that ends it, or has none."""
        last = next((token for token in reversed(ids) if token not in self.blanks), None)
        return [] if self.end is None or last in self.ends else [self.end]


def special_tokens(model: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of a checkpoint.

    Args:
      model: folder or hub id.
      tokenizer: its tokenizer, with the chat template that is going to be used.

    Raises:
      InputError: for no such checkpoint, or a field of its files that should hold token ids and holds others.
    """
    from jaxpeft import hf

    return from_parts(tokenizer, hf.load_config(model), hf.load_generation_config(model))


def from_parts(
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> SpecialTokens:
    """The special tokens that a tokenizer and the parsed files of its checkpoint name.

    Raises:
      InputError: for a field that should hold token ids and holds something else.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = list(tokenize(tokenizer, ["a"])["input_ids"][0])[:1]
    named = [*([] if eos is None else [eos]), *eos_ids(config or {}, generation_config or {})]
    turn = turn_end(tokenizer)
    encoded = tokenize(tokenizer, _BLANKS, add_special_tokens=False)["input_ids"]
    return SpecialTokens(
        before=(bos,) if bos is not None and first == [bos] else (),
        begin=next((x for x in (bos, *token_ids(config or {}, "bos_token_id", "config.json")) if x is not None), None),
        end=named[0] if named else None,
        ends=tuple(dict.fromkeys([*named, *([] if turn is None else [turn])])),
        blanks=frozenset(token for ids in encoded for token in ids) - {tokenizer.unk_token_id},
    )


def eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The EOS of config.json and of generation_config.json, each once.

    Raises:
      InputError: for an eos_token_id that is neither a whole number nor a list of them.
    """
    files = {"config.json": config, "generation_config.json": generation_config}
    return tuple(dict.fromkeys(x for name, file in files.items() for x in token_ids(file, "eos_token_id", name)))


def token_ids(file: Mapping[str, Any], field: str, where: str) -> list[int]:
    """A field that holds a token id or a list of them; none where it is absent, null or negative.

    Raises:
      InputError: if it holds something else.
    """
    value = file.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise InputError(f"{where}: {field} {value!r} should be a token id or a list of them")
    return [token for token in ids if token >= 0]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after the assistant's words; None without one.

    A base model's EOS need not be it: Qwen2.5's ends texts, and another token ends a turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    said = "words"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": said}]
    try:
        with limits.bounded(_SECONDS):
            text = template.render(messages, tokenizer, template.Template("chat", template.today()))
    except InputError:  # a template for other conversations
        return None
    after = text.rpartition(said)[2].lstrip()
    written = said in text and bool(after)
    ids = tokenize(tokenizer, [after], add_special_tokens=False)["input_ids"][0] if written else []
    return ids[0] if ids and ids[0] in _special(tokenizer) else None


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {token for token, said in tokenizer.added_tokens_decoder.items() if said.special}
    return added | set(tokenizer.all_special_ids)


def check_vocabulary(model: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Refuses a tokenizer that can give an id for which the model has no row; ids may have holes between them.

    Args:
      model: folder or hub id, which opens the line.
      size: the model's vocab_size.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= size:
        raise InputError(
            f"{os.fspath(model)}: the tokenizer gives {token[:60]!r} the id {largest}; the model's vocab_size is {size}"
        )
