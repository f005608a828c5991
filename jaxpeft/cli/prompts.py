"""A file of prompts: a text per line, or rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.errors import InputError


class Prompt(NamedTuple):
    """What is asked: a text to continue, or the turns of a conversation up to the assistant's next, or both.

    An instruction is both: which it becomes depends on the template.

    tools: what the assistant may call.  options: further words for the chat template.  where: opens errors.
    adapter: the row's field, whatever it holds; "" where it has none.
    """

    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = {}
    where: str = "--prompt"
    adapter: Any = ""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order; blank lines at its end are no prompts.

    Rows (see `jaxpeft.data.sources`) have `prompt` (text, or a list of messages), `messages`, `conversations`, or
    `instruction` and `input`. Rows to train on will do: what the assistant says last is left out, and so are
    `completion` and `output`. A row's `adapter` is the name of the one that it is for.

    Raises:
      InputError: for a file that cannot be read, or a line that is none of these.
    """
    from jaxpeft.data import records, sources

    if sources.is_named(path):
        rows = [(record.fields(), record.where) for record in sources.find(path).records()]
        if empty := next((where for fields, where in rows if fields.get("adapter") == ""), None):
            raise InputError(f"{empty}: field adapter is empty; give a name, or null for the base alone")
        prompts = [_of_row(fields, where)._replace(adapter=fields.get("adapter", "")) for fields, where in rows]
    else:
        lines = [(f"{path}:{number}", raw.rstrip(b"\r\n")) for number, raw in records.read_lines(path)]
        prompts = [Prompt(_text(raw, where), where=where) for where, raw in lines]
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def _text(raw: bytes, where: str) -> str:
    from jaxpeft.data.jsonl import check_length

    check_length(raw, where)
    if not raw.strip():
        raise InputError(f"{where}: empty line; every line is a prompt")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from error


def _of_row(record: dict[str, Any], where: str) -> Prompt:
    from jaxpeft.data.formats import Instruction, instruction_messages, instruction_prompt, read_string
    from jaxpeft.data.messages import read_conversation, read_system

    for field in ("messages", "conversations", "conversation", "prompt"):
        if isinstance(record.get(field), list):
            turns = {**record, field: [*record[field], {"role": "assistant", "content": ""}]}  # which is asked for
            read = read_conversation(turns, (field,), where)
            messages = list(read.messages)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise InputError(f"{where}: {field} holds no turn to answer")
            return Prompt("", tuple(messages), read.tools, read.options, where)
    if "prompt" in record:
        return Prompt(read_string(record, "prompt", where), where=where)
    if "instruction" in record:
        asked = "" if record.get("input") is None else read_string(record, "input", where)
        row = Instruction(read_string(record, "instruction", where), asked, "", read_system(record, where))
        text = instruction_prompt(row.instruction, row.input)
        return Prompt(text, tuple(instruction_messages(row)[:-1]), where=where)
    found = ", ".join(list(record)[:8]) or "none"
    raise InputError(f"{where}: fields must be prompt | messages | instruction, [input]; this line has: {found}")
