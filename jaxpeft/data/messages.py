"""The turns of a conversation, as other tools write them, in the one form that a chat template is given.

    turn      role, content                 OpenAI's; content is text, or a list of {"type": "text", "text"}
              from, value                   ShareGPT's: human, gpt, system, tool and their other names
              tool_calls                    beside them content may be absent; arguments may be JSON in a string
              weight 0 | 1                  OpenAI's
              train, training, loss         axolotl's, ms-swift's: false is not trained on
              masked, mask                  torchtune's: true is not trained on
    row       tools, documents              what the template is given besides, also as JSON in a string
              chat_template_kwargs          TRL's: further words for the template
              system                        a first turn

What would change what is trained on, and is none of these, is refused; what is left over is ignored, and counted by
name in the file's report.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpeft.data.jsonl import json_type
from jaxpeft.errors import InputError

Messages = list[dict[str, Any]]

# Fields of a turn that say whether it is trained on, and the value with which it is.
_FLAGS = {"weight": 1, "train": True, "training": True, "loss": True, "masked": False, "mask": False}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# Fields of a turn that would change what is trained on -> what to write instead.
_REFUSED = {
    "function_call": "write it as tool_calls",
    "train_detail": "a turn is trained on whole, or with train: false not at all",
    "training_detail": "a turn is trained on whole, or with training: false not at all",
    "loss_scale": "a turn is trained on whole, or with loss: false not at all",
    "refusal": "write it as content",
    "audio": "turns are text",
    "images": "turns are text",
    "image": "turns are text",
}
# What a template is given by its own names.
_RESERVED = {"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}


class Conversation(NamedTuple):
    """A conversation as a chat template takes it.

    messages: dicts with the strings "role" and "content", and what else the file has; tool calls in OpenAI's form,
      their arguments objects.
    trained: for each message, whether it is a turn of the assistant's that is trained on.
    tools: definitions of what the assistant may call; () for none.
    options: further words for the template.
    """

    messages: Messages
    trained: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] = ()
    options: Mapping[str, Any] = {}


def read_conversation(
    record: Mapping[str, Any], fields: Sequence[str], where: str, trained: Sequence[str] | None = None
) -> Conversation:
    """The conversation that some fields of a record hold, one list of turns after the other.

    Args:
      record: of a file; `tools`, `documents`, `chat_template_kwargs` and `system` of it are read besides.
      fields: with the turns.
      where: "file:line", which opens every message.
      trained: those of the fields whose turns may be trained on; None: all.

    Raises:
      InputError: for turns that are none, that no assistant has, or that ask for what is not done here.
    """
    found = [
        (*_turn(turn, f"{field}[{i}]", where), field)
        for field in fields
        for i, turn in enumerate(_list(record[field], field, where))
    ]
    messages = [turn for turn, _, _ in found]
    flags = tuple(flag and (trained is None or field in trained) for _, flag, field in found)
    asked = [turn["role"] for turn, _, field in found if trained is None or field in trained]
    if "assistant" not in asked:
        name = " and ".join(trained or fields)
        raise InputError(
            f"{where}: {name} must have a turn whose role is assistant; roles found: {', '.join(asked) or 'none'}"
        )
    if system := read_system(record, where):
        if messages[0]["role"] == "system":
            raise InputError(f"{where}: field system: {fields[0]}[0] is a system turn already")
        messages, flags = [{"role": "system", "content": system}, *messages], (False, *flags)
    tools = tuple(_objects(record.get("tools"), "tools", where))
    options = dict(_json(record.get("chat_template_kwargs"), "chat_template_kwargs", where) or {})
    if named := sorted(_RESERVED & set(options)):
        raise InputError(f"{where}: field chat_template_kwargs.{named[0]}: belongs to the row itself")
    if documents := _objects(record.get("documents"), "documents", where):
        options["documents"] = documents
    return Conversation(messages, flags, tools, options)


def read_system(record: Mapping[str, Any], where: str) -> str:
    """The text of a row's `system` field; "" without one."""
    return "" if record.get("system") is None else check_text(record["system"], "system", where)


def check_text(value: object, name: str, where: str) -> str:
    """A field's value, which must be text that a tokenizer takes.

    Raises:
      InputError: if it is not.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name} must be a string, found {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise InputError(f"{where}: field {name} holds an unpaired surrogate at character {error.start + 1}") from error
    return value


def _turn(value: object, path: str, where: str) -> tuple[dict[str, Any], bool]:
    """(the message, whether it is trained on) of one turn; fields that are null are absent."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: field {path} must be an object, found {json_type(value)}")
    turn = {name: item for name, item in value.items() if item is not None}
    for name, instead in _REFUSED.items():
        if turn.get(name) not in (None, "", [], {}):
            raise InputError(f"{where}: field {path}.{name} is not read: {instead}")
        turn.pop(name, None)
    role, words = _role(turn, value, path, where)
    flag = _flag(turn, role, path, where)
    calls = _calls(turn.pop("tool_calls", None), role, f"{path}.tool_calls", where)
    if words not in value and not calls:
        raise InputError(f"{where}: field {path}.{words} is missing; found: {', '.join(value) or 'none'}")
    content = "" if words not in turn and calls else _content(value[words], f"{path}.{words}", where)
    rest = {name: item for name, item in turn.items() if name not in (*_FLAGS, "role", "from", words)}
    message = {"role": role, "content": content, **rest, **({"tool_calls": calls} if calls else {})}
    return message, flag


def _role(turn: Mapping[str, Any], value: Mapping[str, Any], path: str, where: str) -> tuple[str, str]:
    """(the role of a turn, the field that its words are in)."""
    if "role" in turn or "from" not in turn:
        if "role" not in value:
            raise InputError(f"{where}: field {path}.role is missing; found: {', '.join(value) or 'none'}")
        return check_text(value["role"], f"{path}.role", where), "content"
    speaker = check_text(turn["from"], f"{path}.from", where)
    if speaker not in _ROLES:
        raise InputError(f"{where}: field {path}.from {speaker!r}: must be one of {', '.join(_ROLES)}")
    return _ROLES[speaker], "value"


def _flag(turn: Mapping[str, Any], role: str, path: str, where: str) -> bool:
    """Whether a turn is trained on: what its flags say, or else whether it is the assistant's."""
    said = {name: turn[name] for name in _FLAGS if name in turn}
    for name, value in said.items():
        if name == "weight" and not (isinstance(value, int | float) and value in (0, 1)):
            raise InputError(f"{where}: field {path}.weight must be 0 or 1, found {json.dumps(value)}")
        if name != "weight" and not isinstance(value, bool):
            raise InputError(f"{where}: field {path}.{name} must be true or false, found {json.dumps(value)}")
    wanted = {name: value == _FLAGS[name] for name, value in said.items()}
    if len(set(wanted.values())) > 1:
        raise InputError(f"{where}: {path} is trained on by one of {', '.join(wanted)}, and not by another")
    if role == "assistant":
        return all(wanted.values())
    # Data that masks nothing by rule says `masked: false` of every turn; only an express wish is refused.
    asked = [name for name, yes in wanted.items() if yes and name not in ("masked", "mask")]
    if asked:
        raise InputError(f"{where}: field {path}.{asked[0]}: only turns of the assistant are trained on, not {role}'s")
    return False


def _content(content: object, name: str, where: str) -> str:
    """A turn's text: as it is, or the joined text of its parts."""
    if not isinstance(content, list):
        return check_text(content, name, where)
    texts = []
    for i, part in enumerate(content):
        at = f"{name}[{i}]"
        if not isinstance(part, dict):
            raise InputError(f"{where}: field {at} must be an object, found {json_type(part)}")
        kind = part.get("type", "text")
        if kind != "text":
            raise InputError(f"{where}: field {at}.type {json.dumps(kind)}: only parts of type text are read")
        if "text" not in part:
            raise InputError(f"{where}: field {at}.text is missing; found: {', '.join(part) or 'none'}")
        texts.append(check_text(part["text"], f"{at}.text", where))
    return "".join(texts)


def _calls(value: object, role: str, path: str, where: str) -> list[dict[str, Any]]:
    """Tool calls in the form {"type": "function", "function": {"name", "arguments": an object}, ...}."""
    calls = []
    for i, call in enumerate(_objects(value, path, where)):
        at = f"{path}[{i}]"
        nested = call.get("function")
        function = dict(nested if isinstance(nested, dict) else call)
        check_text(function.get("name"), f"{at}.function.name", where)
        arguments = _json(function.get("arguments"), f"{at}.function.arguments", where)
        if not isinstance(arguments, dict | None):
            raise InputError(f"{where}: field {at}.function.arguments must be an object, found {json_type(arguments)}")
        function["arguments"] = arguments or {}
        around = {name: item for name, item in call.items() if item is not None} if nested is not None else {}
        calls.append({"type": "function", **around, "function": function})
    if calls and role != "assistant":
        raise InputError(f"{where}: field {path}: only the assistant calls tools, not {role}")
    return calls


def _objects(value: object, name: str, where: str) -> list[dict[str, Any]]:
    """A field with a list of objects; the list, or an object, may be JSON in a string."""
    items = _list(_json(value, name, where) or [], name, where)
    found = [_json(item, f"{name}[{i}]", where) for i, item in enumerate(items)]
    for i, item in enumerate(found):
        if not isinstance(item, dict):
            raise InputError(f"{where}: field {name}[{i}] must be an object, found {json_type(item)}")
    return found


def _list(value: object, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{where}: field {name} must be an array, found {json_type(value)}")
    return value


def _json(value: object, name: str, where: str) -> Any:
    """A value, parsed where it is a string with JSON; an empty one is nothing."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: field {name} is a string and no JSON: {error}") from None
