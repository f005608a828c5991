"""The accepted shapes of a record, and the text that each becomes.

    shape                      fields                                  trained on
    messages                   [{"role", "content"}, ...]              every assistant turn, its end
    prompt/completion          prompt, completion                      completion, EOS
    instruction/input/output   instruction, input (optional), output   output, EOS
    text                       text                                    everything, EOS

A record that has the fields of several shapes is read as the first of them in this order; other
fields are ignored.
"""

from typing import Any, Literal, NamedTuple, cast

from jaxpeft.data.jsonl import json_type
from jaxpeft.errors import InputError

Format = Literal["messages", "prompt/completion", "instruction/input/output", "text"]

SHAPES = "messages | prompt, completion | instruction, [input,] output | text"


class Text(NamedTuple):
    """A plain row: the loss is on the completion only (for `text` rows the prompt is empty)."""

    prompt: str
    completion: str


class Conversation(NamedTuple):
    """A `messages` row: dicts with the strings "role" and "content"; at least one by assistant."""

    messages: list[dict[str, Any]]


def instruction_prompt(instruction: str, input: str = "") -> str:
    r"""The prompt of an instruction row (Taori et al. 2023, Alpaca, without its preamble).

        ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n

    The Input section is left out where `input` is empty.
    """
    section = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{section}### Response:\n"


def read_record(record: dict[str, Any], where: str) -> tuple[Format, Text | Conversation]:
    """Recognises a record's shape and checks its fields.

    Args:
      record: one parsed line.
      where: "file:line", which opens every message.

    Raises:
      InputError: no shape fits, or a field has the wrong type.
    """
    if "messages" in record:
        return "messages", Conversation(_messages(record["messages"], where))
    if "prompt" in record and "completion" in record:
        return "prompt/completion", Text(read_string(record, "prompt", where), read_string(record, "completion", where))
    if "instruction" in record and "output" in record:
        instruction = read_string(record, "instruction", where)
        input = "" if record.get("input") is None else read_string(record, "input", where)
        output = read_string(record, "output", where)
        return "instruction/input/output", Text(instruction_prompt(instruction, input), output)
    if "text" in record:
        return "text", Text("", read_string(record, "text", where))
    found = ", ".join(list(record)[:8]) or "none"
    raise InputError(f"{where}: fields must be {SHAPES}; this line has: {found}")


def read_string(record: dict[str, Any], field: str, where: str, path: str = "") -> str:
    """A field that must be text which a tokenizer takes; `path` stands before its name in messages."""
    name = path + field
    if field not in record:
        found = ", ".join(record) or "none"
        raise InputError(f"{where}: field {name} is missing; found: {found}")
    value = record[field]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name} must be a string, found {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise InputError(f"{where}: field {name} holds an unpaired surrogate at character {error.start + 1}") from error
    return value


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise InputError(f"{where}: field messages must be an array, found {json_type(value)}")
    for index, message in enumerate(value):
        path = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: field {path} must be an object, found {json_type(message)}")
        for field in ("role", "content"):
            read_string(message, field, where, path + ".")
    if not any(message["role"] == "assistant" for message in value):
        roles = ", ".join(message["role"] for message in value) or "none"
        raise InputError(f"{where}: messages must have a turn whose role is assistant; roles found: {roles}")
    return cast(list[dict[str, Any]], value)
