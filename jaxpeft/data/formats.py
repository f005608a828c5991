"""The accepted shapes of a record, and what each becomes.

    shape                      fields                                  trained on
    messages                   [{"role", "content"}, ...]              every assistant turn, its end
    conversations              [{"from", "value"}, ...]                the same
    prompt/completion          prompt, completion                      completion, EOS
    prompt/completion          both lists of messages                  assistant turns of the completion
    instruction/input/output   instruction, input (optional), output   output, EOS
    text                       text                                    everything, EOS

A record that has the fields of several shapes is read as the first of them in this order. A text in the field `source`
says which data it is of, for a method that chooses rows by that (`colm`); where several adapters are trained at once,
one in the field `adapter` names a record's own. Of other fields those that would change what is trained on are refused,
and the rest are ignored; which, the file's report says. What turns may hold is in `jaxpeft.data.messages`.
"""

from typing import Any, Literal, NamedTuple

from jaxpeft.data.messages import Conversation, check_text, read_conversation, read_system
from jaxpeft.data.records import ADAPTER, SOURCE
from jaxpeft.errors import InputError

Format = Literal["messages", "conversations", "prompt/completion", "instruction/input/output", "text"]

SHAPES = "messages | conversations | prompt, completion | instruction, [input,] output | text"

_OF_CONVERSATIONS = ("tools", "documents", "chat_template_kwargs", "system")
# Shape -> the fields that it reads.
FIELDS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "output", "input", "system"),
    "text": ("text",),
}
# Fields that would change what a row teaches, and what to do about them; where they say nothing (null, []), they pass.
_REFUSED = {
    "functions": "write them as tools",
    "history": "write earlier turns as messages",
    "images": "rows are text",
    "image": "rows are text",
    "videos": "rows are text",
    "audios": "rows are text",
}


class Text(NamedTuple):
    """A plain row: the loss is on the completion only (for `text` rows the prompt is empty)."""

    prompt: str
    completion: str


class Instruction(NamedTuple):
    """An instruction row, which a chat template or the headings of `instruction_prompt` make a text of."""

    instruction: str
    input: str
    output: str
    system: str = ""


Content = Text | Instruction | Conversation


def instruction_prompt(instruction: str, input: str = "") -> str:
    r"""The prompt of an instruction row (Taori et al. 2023, Alpaca, without its preamble).

        ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n

    The Input section is left out where `input` is empty.
    """
    section = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{section}### Response:\n"


def instruction_messages(row: Instruction) -> list[dict[str, Any]]:
    """An instruction row as a conversation: the input follows the instruction after a blank line."""
    asked = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
    system = [{"role": "system", "content": row.system}] if row.system else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": row.output}]


def read_record(record: dict[str, Any], where: str) -> tuple[Format, Content]:
    """Recognises a record's shape and checks its fields.

    Args:
      record: one parsed line.
      where: "file:line", which opens every message.

    Raises:
      InputError: no shape fits, or a field has the wrong type, or asks for what is not done here.
    """
    if record.get("messages") is not None:
        _refuse(record, where)
        return "messages", read_conversation(record, ("messages",), where)
    for field in ("conversations", "conversation"):
        if record.get(field) is not None:
            _refuse(record, where)
            return "conversations", read_conversation(record, (field,), where)
    if _has(record, "prompt", "completion"):
        _refuse(record, where)
        return "prompt/completion", _prompt_and_completion(record, where)
    if _has(record, "instruction", "output"):
        _refuse(record, where)
        instruction = read_string(record, "instruction", where)
        input = "" if record.get("input") is None else read_string(record, "input", where)
        output = read_string(record, "output", where)
        return "instruction/input/output", Instruction(instruction, input, output, read_system(record, where))
    if "text" in record:
        return "text", Text("", read_string(record, "text", where))
    found = ", ".join(list(record)[:8]) or "none"
    preferences = "; preferences are not trained on: give the chosen text as completion" if "chosen" in record else ""
    raise InputError(f"{where}: fields must be {SHAPES}; this line has: {found}{preferences}")


def ignored_fields(record: dict[str, Any], shape: Format, content: Content, adapters: bool = False) -> list[str]:
    """The fields of a record that reading it made nothing of; `adapters`: whether its adapter is no such."""
    read = (*FIELDS[shape], *(_OF_CONVERSATIONS if isinstance(content, Conversation) else ()))
    named = (SOURCE, ADAPTER) if adapters else (SOURCE,)
    return [
        name
        for name, value in record.items()
        if name not in read and value is not None and not (name in named and isinstance(value, str))
    ]


def read_string(record: dict[str, Any], field: str, where: str, path: str = "") -> str:
    """A field that must be text which a tokenizer takes; `path` stands before its name in messages."""
    name = path + field
    if field not in record:
        found = ", ".join(record) or "none"
        raise InputError(f"{where}: field {name} is missing; found: {found}")
    return check_text(record[field], name, where)


def _has(record: dict[str, Any], *fields: str) -> bool:
    """Whether a record has some fields, and not only because all records of its file name them."""
    return all(field in record for field in fields) and any(record[field] is not None for field in fields)


def _refuse(record: dict[str, Any], where: str) -> None:
    """Raises InputError for the fields that would change what a row teaches."""
    for name, instead in _REFUSED.items():
        if record.get(name) not in (None, "", [], {}):
            raise InputError(f"{where}: field {name} is not read: {instead}")
    if record.get("weight") not in (None, 1):
        raise InputError(f"{where}: field weight {record['weight']!r}: all rows weigh the same; leave it out")
    if record.get("label") is False:
        raise InputError(f"{where}: field label is false: a completion that is not wanted cannot be trained on")


def _prompt_and_completion(record: dict[str, Any], where: str) -> Text | Conversation:
    lists = [isinstance(record[field], list) for field in ("prompt", "completion")]
    if all(lists):
        return read_conversation(record, ("prompt", "completion"), where, trained=("completion",))
    if any(lists):
        raise InputError(f"{where}: prompt and completion must both be text, or both be arrays of messages")
    return Text(read_string(record, "prompt", where), read_string(record, "completion", where))
