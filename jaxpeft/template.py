"""How conversations and instructions become text: the chat template, the day that its clock shows, and where both lie.

`--template` chooses what instruction rows go through: `chat`, the tokenizer's chat template; `alpaca`, the headings of
`jaxpeft.data.instruction_prompt`; a file, which is then the chat template of all rows; `auto`, chat where the tokenizer
has a template, else alpaca.

A template comes with a model or an adapter, and is a program: it may loop for ever, or write gigabytes. It has SECONDS
for a conversation, so much memory (see `jaxpeft.limits`), and MOST_CHARACTERS to write.

A template may ask for the date (`strftime_now`). The clock is stopped at one day, so that a row has the same ids
whenever it is read. The choice and the day are kept beside the result of a run, in FILE:

    {"template": "chat" | "alpaca", "date": "2026-03-01", "source": null | the text of the file}
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NotRequired

import jinja2
import jinja2.ext
from typing_extensions import TypedDict

from jaxpeft import documents, files, limits
from jaxpeft.errors import InputError
from jaxpeft.tokenizing import tokenize

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

FILE = "jaxpeft_text.json"
JINJA = "chat_template.jinja"
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
SECONDS = 10.0  # to write one conversation
MOST_CHARACTERS = 2**24  # of what is written
MOST_SOURCE = 2**20  # characters of a template; the longest in use have 30,000
# What a template raises on messages that it is not for.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError)
_CODES = "aAwdbBmyYHIpMSfjUWcxXGuVeDFTRhC"  # of strftime
_MOST_SAID = 300  # characters of a template's own words in an error
Spans = list[tuple[int, int]]


class Document(TypedDict):
    """What FILE holds, and a run's configuration as "text"."""

    template: Literal["chat", "alpaca"]
    date: documents.Text
    source: NotRequired[documents.Text | None]


@dataclasses.dataclass(frozen=True)
class Template:
    """What text is made with.

    kind: what instruction rows go through.  date: the day of the clock, YYYY-MM-DD.
    source: a chat template that replaces the tokenizer's own; None: it has its own, or none.
    """

    kind: Literal["chat", "alpaca"]
    date: str
    source: str | None = None

    def document(self) -> dict[str, Any]:
        """What FILE holds."""
        return {"template": self.kind, "date": self.date, "source": self.source}

    def digest(self) -> str:
        """Tells templates apart that make other texts of a row, whatever the day."""
        return self.kind if self.source is None else hashlib.sha256(self.source.encode()).hexdigest()

    def beside(self) -> dict[str, str]:
        """{name: text} of the files that belong beside a run's result."""
        own = {} if self.source is None else {JINJA: self.source}
        return {FILE: json.dumps(self.document(), indent=2, ensure_ascii=False) + "\n", **own}


def today() -> str:
    """The day, as `Template.date` has it."""
    return datetime.date.today().isoformat()


def choose(
    choice: str, tokenizer: PreTrainedTokenizerBase, date: str | None = None, stored: Template | None = None
) -> Template:
    """The template that `--template` names; one from a file becomes the tokenizer's.

    Args:
      choice: auto, chat, alpaca or a file.
      tokenizer: that of the model.
      date: of the clock; None: today.
      stored: what `auto` means where the model or the adapter that is trained on has been made with one.

    Raises:
      InputError: for chat where the tokenizer has no template, a file that holds none, or a date that is none.
    """
    date = today() if date is None else _day(date)
    if choice == "auto" and stored is not None:
        return use(dataclasses.replace(stored, date=date), tokenizer)
    if choice in ("auto", "chat", "alpaca"):
        has = bool(tokenizer.chat_template)
        if choice == "chat" and not has:
            raise InputError("--template chat: the tokenizer has no chat template; give a file with one, or alpaca")
        return Template("chat" if has and choice != "alpaca" else "alpaca", date)
    return use(Template("chat", date, _read_jinja(choice)), tokenizer)


def use(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Makes a template's own source the tokenizer's; returns the template."""
    if template.source is not None:
        tokenizer.chat_template = template.source
    return template


def read(
    tokenizer: PreTrainedTokenizerBase, *folders: str | os.PathLike[str] | None, date: str | None = None
) -> Template:
    """The template that a result was made with, which becomes the tokenizer's where it is not its own.

    Args:
      tokenizer: that of the model.
      folders: where FILE may lie, the first one counts: the adapter's, then the model's; None is passed over.
      date: of the clock instead of the stored day.

    Returns:
      What is stored; what `auto` chooses, with today's date, where nothing is.

    Raises:
      InputError: for a FILE that is damaged.
    """
    stored = find(*folders)
    return choose("auto", tokenizer, date or (stored.date if stored else None), stored)


def find(*folders: str | os.PathLike[str] | None) -> Template | None:
    """The template that the first folder with a FILE stores; None where none has one.

    Raises:
      InputError: for a FILE that is damaged.
    """
    for folder in folders:
        if folder is not None and (file := files.expanded(folder) / FILE).is_file():
            return from_document(documents.read_json(file, f"{file}: no such file"), str(file))
    return None


def from_document(document: Mapping[str, Any], where: str) -> Template:
    """The template that `Template.document` describes.

    Raises:
      InputError: for a document that is none; the line begins with `where`.
    """
    said = documents.checked(where, Document, document)
    return Template(said["template"], _day(said["date"], f"{where}: date"), said.get("source"))


def beside(folder: str | os.PathLike[str] | None) -> dict[str, str]:
    """`Template.beside` of the template that a folder stores; {} where it stores none."""
    stored = find(folder)
    return {} if stored is None else stored.beside()


def source_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The chat template's text; some tokenizers have another one for conversations with tools.

    Raises:
      InputError: for one that is too long, or none.
    """
    try:
        source = str(tokenizer.get_chat_template(tools=list(tools) if tools else None))
    except ValueError as error:  # it has none
        raise _refusal(error) from error
    if len(source) > MOST_SOURCE:
        raise InputError(f"the chat template has {len(source)} characters; at most {MOST_SOURCE} are taken")
    return source


def is_marked(source: str) -> bool:
    """Whether a template marks the assistant's words itself, with `{% generation %}`."""
    return bool(_GENERATION_TAG.search(source))


def names(source: str, field: str) -> bool:
    """Whether a template speaks of a field at all."""
    return bool(re.search(rf"\b{re.escape(field)}\b", source))


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> str:
    """The text that the chat template writes of a conversation.

    Args:
      messages: "role", "content" and what else the template reads.
      tokenizer: with the template.  template: for its clock.  tools: what the assistant may call.
      options: further words for the template, add_generation_prompt among them.

    Raises:
      InputError: if the template refuses them.
    """
    return _render(messages, tokenizer, template, tools, options)[0]


def render_marked(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> tuple[str, Spans]:
    """`render`, and the [first, end) characters of what the template marks as the assistant's words."""
    return _render(messages, tokenizer, template, tools, options, marked=True)


def prompt_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> list[int]:
    """The ids that training shows before the assistant's next turn.

    Args:
      messages: the turns so far.
      tokenizer, template, tools, options: as `render` takes them.

    Raises:
      InputError: if the template refuses the messages; under the headings of alpaca, for anything but one user turn.
    """
    if template.kind == "alpaca":
        from jaxpeft.data.encode import encode_prompt
        from jaxpeft.data.formats import instruction_prompt

        if [message["role"] for message in messages] != ["user"] or tools:
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise InputError(f"this model knows single instructions (alpaca), no conversation; turns given: {roles}")
        return encode_prompt(instruction_prompt(messages[0]["content"]), tokenizer)
    text = render(messages, tokenizer, template, tools, add_generation_prompt=True, **options)
    return list(tokenize(tokenizer, [text], add_special_tokens=False)["input_ids"][0])


def _render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    marked: bool = False,
) -> tuple[str, Spans]:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = list(tools) if tools else None
    source = source_of(tokenizer, given)
    if names(source, "strftime_now"):
        source = stopped_clock(template.date) + source

    def write(turns: Sequence[Mapping[str, Any]]) -> tuple[str, Spans]:
        texts, spans = render_jinja_template(
            conversations=[[{name: item for name, item in turn.items() if item is not None} for turn in turns]],
            tools=given,
            chat_template=source,
            return_assistant_tokens_mask=marked,
            **{**tokenizer.special_tokens_map, **options},
        )
        if len(texts[0]) > MOST_CHARACTERS:
            raise InputError(
                f"the chat template writes {len(texts[0])} characters; at most {MOST_CHARACTERS} are taken"
            )
        return texts[0], [(first, end) for first, end in spans[0]] if marked else []

    try:
        try:
            with limits.bounded(SECONDS):
                return write(messages)
        except _REFUSALS:
            spelt = _with_json_arguments(messages)
            if spelt != list(messages):  # some templates want the JSON of a call's arguments, not the object
                with contextlib.suppress(*_REFUSALS), limits.bounded(SECONDS):
                    return write(spelt)
            raise
    except InputError:
        raise
    except (Exception, limits.OutOfTime) as error:  # a template is a program, which may do anything
        raise _refusal(error) from error


def _refusal(error: BaseException) -> InputError:
    """What a template raises, as one line."""
    if isinstance(error, limits.OutOfTime):
        said = f"it has not written them after {SECONDS:g} s"
    elif isinstance(error, MemoryError):
        said = "it needs more memory than a template gets"
    else:
        said = " ".join(str(error)[:_MOST_SAID].split()) or type(error).__name__
        said = "".join(character if character.isprintable() else " " for character in said)
    return InputError(f"the chat template refuses the messages: {said}")


@functools.cache
def stopped_clock(date: str) -> str:
    """A line of jinja before a template, for which it is always the first second of that day.

    Its `strftime_now` hides the one that transformers provides, which asks the machine's clock.
    """
    day = datetime.datetime.fromisoformat(date)
    said = [[f"%{flag}{code}", day.strftime(f"%{flag}{code}")] for code in _CODES for flag in ("", "-")]
    pairs = json.dumps([["%%", "\0"], *said, ["\0", "%"]])
    return (
        f"{{%- macro strftime_now(format) -%}}{{%- set said = namespace(text=format) -%}}{{%- for pair in {pairs} -%}}"
        "{%- set said.text = said.text.replace(pair[0], pair[1]) -%}{%- endfor -%}{{- said.text -}}{%- endmacro %}\n"
    )


def _with_json_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of their tool calls as JSON in a string."""

    def spelt(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**turn, "tool_calls": [spelt(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else dict(turn)
        for turn in messages
    ]


def _day(value: object, name: str = "--template-date") -> str:
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise InputError(f"{name} {value}: must be a day, YYYY-MM-DD") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, parsed and no more."""

    tags = {"generation"}  # noqa: RUF012 - as the class declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _read_jinja(path: str) -> str:
    """A chat template from a file.

    Raises:
      InputError: for no such file, or one that is no jinja template.
    """
    try:
        with files.expanded(path).open(encoding="utf-8") as file:
            text = file.read(MOST_SOURCE + 1)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"--template {path}: must be auto, chat, alpaca or a file; {reason}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--template {path}: not UTF-8 at byte {error.start}") from None
    if len(text) > MOST_SOURCE:
        raise InputError(f"--template {path}: has more than {MOST_SOURCE} characters")
    try:
        with limits.bounded(SECONDS):
            jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"--template {path}: line {error.lineno}: no chat template: {error.message}") from None
    except (RecursionError, MemoryError, limits.OutOfTime) as error:
        raise InputError(f"--template {path}: no chat template: cannot be parsed ({type(error).__name__})") from None
    if "messages" not in text:
        raise InputError(f"--template {path}: no chat template: it never names messages")
    return text
