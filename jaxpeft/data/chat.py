"""A conversation through the tokenizer's chat template, and which part of it the assistant wrote.

A template that marks the assistant's words with `{% generation %}` decides for itself: its mask is
taken. Any other template is rendered on prefixes of the conversation. With g(i) the first i
messages and the generation prompt, and r(i) the first i messages alone, turn i of the assistant is

    full[len(g(i)) : len(r(i + 1))]

that is, all that the template writes from where the model would start to generate to where the
next turn begins: the content, the end-of-turn token, and a line break after it if there is one.
Both g(i) and r(i + 1) must be prefixes of the full text, which is checked. One departure is common
and allowed: templates that write the *last* turn differently (Qwen3 puts an empty thought before
it), so that r(i + 1) is no prefix; there the end is found by the content and what follows it.
"""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from jaxpeft.errors import InputError

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(NamedTuple):
    """A rendered conversation and the [first, end) characters of each assistant turn, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


def check_template(tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
    """Raises InputError if the tokenizer has no chat template or cannot locate characters."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: a messages row needs a chat template and the tokenizer has none: put a"
            " chat_template.jinja beside it, or use the prompt, completion shape"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"{where}: a messages row needs a fast tokenizer (tokenizer.json), and this is"
            f" {type(tokenizer).__name__}: convert it, or use the prompt, completion shape"
        )


def has_generation_tag(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template marks the assistant's words itself."""
    return bool(_GENERATION_TAG.search(tokenizer.get_chat_template()))


def tokenize_marked(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase", where: str
) -> tuple[list[int], list[bool]]:
    """(ids, completion mask) of a conversation whose template has `{% generation %}`."""
    encoded = _apply(
        tokenizer,
        messages,
        where,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def render_chat(messages: Messages, tokenizer: "PreTrainedTokenizerBase", where: str) -> Chat:
    """The conversation's text and the spans of the assistant's turns, by prefixes (see above).

    Raises:
      InputError: the template refuses the conversation, or is not prefix-consistent on it.
    """

    def render(first: int, **options: bool) -> str:
        return _apply(tokenizer, messages[:first], where, tokenize=False, **options)

    full = render(len(messages))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content, upto = message["content"].strip(), render(i + 1)
        if i == 0:
            prompt = render(1, add_generation_prompt=True).removeprefix(upto)
            start = _opening_turn_start(full, prompt, content)
        else:
            before = render(i, add_generation_prompt=True)
            start = len(before) if full.startswith(before) else None
        end = None if start is None else _turn_end(full, start, upto, content)
        if start is None or end is None:
            raise InputError(
                f"{where}: the chat template writes messages[{i}] differently once later messages"
                " follow, so its tokens cannot be told apart: mark the assistant's words in the"
                " template with {% generation %} ... {% endgeneration %}, or split the conversation"
            )
        spans.append((start, end))
    return Chat(full, tuple(spans))


def _opening_turn_start(full: str, generation_prompt: str, content: str) -> int | None:
    """Where an assistant turn that opens the conversation starts: there is no prefix to render."""
    found = full.find(generation_prompt or content)
    return found + len(generation_prompt) if found >= 0 else None


def _turn_end(full: str, start: int, upto: str, content: str) -> int | None:
    """The character after the assistant turn that starts at `start`, or None if it is not found."""
    if full.startswith(upto):
        return len(upto) if len(upto) >= start else None
    first = upto.rfind(content)
    if not content or first < 0:
        return None
    tail = upto[first:]  # the content and what the template puts after it
    found = full.find(tail, start)
    return found + len(tail) if found >= 0 else None


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: Messages, where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{where}: the chat template refuses the messages: {error}") from error
