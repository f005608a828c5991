"""A conversation through the tokenizer's chat template, and which part of it the assistant wrote.

Each turn is trained on as the model will write it: behind what it will see then. With g(i) the first i messages and the
generation prompt, and r(i) the first i messages alone, turn i of the assistant is

    seen g(i), written r(i + 1)[len(g(i)) :]

that is, all that the template writes from where the model would start to generate to where the next turn begins: the
content, the end-of-turn token, and a line break after it if there is one. Where r(i + 1) begins otherwise than g(i):

- A generation prompt may open a thought (DeepSeek R1) that r(i + 1) doesn't have. The turn begins behind the header
  that both share; how long that is, a turn of other words tells.
- A template may leave a thought out of the turn (R1 does, of every one), though the model writes it. The turn is then
  g(i), the content as it is in the file behind a thought that g(i) has opened, and the end that the template puts.
- The turn itself may change what stands before it (gpt-oss drops the thoughts before an answer): it is put behind g(i).

Turns whose texts continue each other are one example. A template that rewrites earlier turns (Qwen3 drops their
thoughts, others move the system's words) makes the conversation several examples; each turn is trained on in one.

A template that marks the assistant's words with `{% generation %}` decides for itself which of r(i + 1) they are.
"""

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxpeft import template as text
from jaxpeft.data.messages import Conversation, Messages, check_text
from jaxpeft.errors import InputError
from jaxpeft.template import Spans, Template

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

# Fields of a turn that the model writes, or is to read; transformers gives the last three each other's value.
_SAID = ("tool_calls", "reasoning_content", "thinking", "reasoning")
_PROBE = "\u2402"  # a character that no template begins a turn with
_THOUGHT_ENDS = re.compile(r"(</[\w:-]+>|\[/\w+\])\s*$")


class Chat(NamedTuple):
    """A rendered conversation and the [first, end) characters that are trained on, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
    """Raises InputError if the tokenizer has no chat template or cannot locate characters."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: a messages row needs a chat template and the tokenizer has none: name a file with"
            " --template, put a chat_template.jinja beside the tokenizer, or use the prompt, completion shape"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"{where}: a messages row needs a fast tokenizer (tokenizer.json), and this is"
            f" {type(tokenizer).__name__}: convert it, or use the prompt, completion shape"
        )


def unread_fields(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", where: str) -> list[str]:
    """Fields of the turns that the chat template never names, as "messages.name".

    Raises:
      InputError: if the template has no words for something that the conversation is about: tools, calls, thoughts.
    """
    source = text.source_of(tokenizer, conversation.tools)
    for name in (*(("tools",) if conversation.tools else ()), *conversation.options):
        if not text.names(source, name):
            raise InputError(f"{where}: the chat template has no words for {name}: it would be lost")
    unread = []
    for i, message in enumerate(conversation.messages):
        for name, value in message.items():
            known = _SAID[1:] if name in _SAID[1:] else (name,)
            if name in ("role", "content") or any(text.names(source, other) for other in known):
                continue
            if name in _SAID and value:
                raise InputError(f"{where}: the chat template has no words for messages[{i}].{name}: it would be lost")
            unread.append(f"messages.{name}")
    return unread


def render_chat(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", template: Template, where: str
) -> list[Chat]:
    """The examples that a conversation makes (see above); one without spans where no turn is to be trained on.

    Args:
      conversation: from a file.
      tokenizer: with a chat template.  template: for its clock.
      where: "file:line", which opens every message.

    Raises:
      InputError: the template refuses the conversation, or writes turns so that they cannot be told apart.
    """
    writer = _Writer(conversation, tokenizer, template, where)
    chats: list[Chat] = []
    for i, trained in enumerate(conversation.trained):
        if not trained:
            continue
        turn = writer.turn(i)
        if chats and turn.text.startswith(chats[-1].text):
            chats[-1] = Chat(turn.text, (*chats[-1].spans, *turn.spans))
        else:
            chats.append(turn)
    whole = writer.write(len(conversation.messages))
    if chats and whole.startswith(chats[-1].text):
        chats[-1] = chats[-1]._replace(text=whole)
    return chats or [Chat(whole, ())]


def has_lost_words(conversation: Conversation, chats: list[Chat]) -> bool:
    """Whether the template leaves out words of a turn that is trained on, as some do beside tool calls."""
    turns = zip(conversation.messages, conversation.trained, strict=True)
    said = [turn["content"].strip() for turn, trained in turns if trained]
    missing = [words for words in said if not any(words in chat.text for chat in chats)]
    written = [_squeeze(chat.text) for chat in chats] if missing else []
    return any(not any(_squeeze(words) in text for text in written) for words in missing)


class _Writer:
    """A conversation's template, and what it writes of the first messages."""

    def __init__(
        self, conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", template: Template, where: str
    ):
        self.messages, self.tools, self.options = conversation.messages, conversation.tools, conversation.options
        self.tokenizer, self.template, self.where = tokenizer, template, where
        self.marked = text.is_marked(text.source_of(tokenizer, self.tools))

    def write(self, first: int, **options: Any) -> str:
        """r(first), or with add_generation_prompt g(first); of no messages nothing."""
        return self._render(self.messages[:first], **options)[0] if first else ""

    def turn(self, i: int) -> Chat:
        """Message i, which is the assistant's: all up to its end, and which part of that it wrote."""
        if self.marked:
            before = self._render(self.messages[:i], marked=True)[1] if i else []
            upto, spans = self._render(self.messages[: i + 1], marked=True)
            return Chat(upto, tuple(spans[len(before) :]))
        seen, upto = self._seen(i), self.write(i + 1)
        start = len(seen)
        if not upto.startswith(seen):
            start = min(shared(seen, self._probe(i)), shared(seen, upto))
            if start < len(self.write(i)):
                upto = seen + upto[self._start(i, seen, upto) :]
                start = len(seen)
        return self._with_thought(i, seen, upto, start) or Chat(upto, ((start, len(upto)),))

    def _seen(self, i: int) -> str:
        """g(i): what the model sees when it writes message i."""
        if i:
            return self.write(i, add_generation_prompt=True)
        # There is no empty conversation to render: what a generation prompt adds to one that is there.
        prompt = self.write(1, add_generation_prompt=True).removeprefix(self.write(1))
        header = self._header(0)
        return header[: _end_of(prompt, header) or len(header)]

    def _start(self, i: int, seen: str, upto: str) -> int:
        """Where message i starts in r(i + 1), where this rewrites what comes before: behind the generation prompt."""
        header = self._header(i)
        prompt = seen.removeprefix(self.write(i))
        start = _end_of(prompt, header) if prompt != seen else None
        if start is None or not upto.startswith(header[:start]):
            raise InputError(
                f"{self.where}: the chat template writes what comes before messages[{i}] differently once that"
                " follows, so its tokens cannot be told apart: mark the assistant's words in the template with"
                " {% generation %} ... {% endgeneration %}, or split the conversation"
            )
        return start

    def _header(self, i: int) -> str:
        """What r(i + 1) puts before the words of message i."""
        header, found, _ = self._probe(i).partition(_PROBE)
        return header if found else ""

    def _probe(self, i: int) -> str:
        """r(i + 1) if message i had other words."""
        return self._render([*self.messages[:i], {**self.messages[i], "content": _PROBE}])[0]

    def _with_thought(self, i: int, seen: str, upto: str, start: int) -> Chat | None:
        """Turn i with the thought that the template leaves out of it; None where it leaves none out."""
        content = self.messages[i]["content"].strip()
        lost = _characters_lost(content, upto[start:])
        if not lost or not _THOUGHT_ENDS.search(content[:lost]):
            return None
        _, probed, end = self._probe(i).partition(_PROBE)
        if not probed:
            return None
        opened = seen[start:].strip()
        rest = content.removeprefix(opened).lstrip("\n") if opened else content
        return Chat(seen + rest + end, ((len(seen), len(seen + rest + end)),))

    def _render(self, messages: Messages, marked: bool = False, **options: Any) -> tuple[str, Spans]:
        arguments: dict[str, Any] = {"tools": self.tools, **self.options, **options}
        try:
            if marked:
                written, spans = text.render_marked(messages, self.tokenizer, self.template, **arguments)
            else:
                written, spans = text.render(messages, self.tokenizer, self.template, **arguments), []
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from error.__cause__
        return check_text(written, "messages", self.where), spans


def _end_of(prompt: str, header: str) -> int | None:
    """Where the last generation prompt in a turn's header ends; None without one."""
    at = header.rfind(prompt) if prompt else -1
    return None if at < 0 else at + len(prompt)


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _characters_lost(content: str, written: str) -> int:
    """How many characters at the beginning of a turn are not in what the template wrote, white space apart."""
    if content in written:
        return 0
    squeezed = _squeeze(written)
    low, high = 0, len(content)
    while low < high:  # the longest end of the content that is there
        middle = (low + high) // 2
        low, high = (low, middle) if _squeeze(content[middle:]) in squeezed else (middle + 1, high)
    return low


def _squeeze(words: str) -> str:
    return "".join(words.split())
