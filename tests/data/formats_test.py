"""Which records are accepted, as what, and what is said of the others."""

from typing import Any

import pytest

from jaxpeft.data.formats import (
    Instruction,
    Text,
    ignored_fields,
    instruction_messages,
    instruction_prompt,
    read_record,
)
from jaxpeft.data.messages import Conversation
from jaxpeft.errors import InputError

SYSTEM = {"role": "system", "content": "s"}
ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def said(**turn: Any) -> dict[str, Any]:
    """A record whose assistant says something in another way."""
    return {"messages": [{**ANSWERED, **turn}]}


@pytest.mark.parametrize(
    ("record", "shape", "content"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt/completion", Text("p", "c")),
        ({"text": "t", "label": 3}, "text", Text("", "t")),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            "instruction/input/output",
            Instruction("i", "x", "o"),
        ),
        (
            {"messages": [{"role": "assistant", "content": "hi"}]},
            "messages",
            Conversation([{"role": "assistant", "content": "hi"}], (True,)),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "conversations",
            Conversation([SYSTEM, ASKED, ANSWERED], (False, False, True)),
        ),
        (
            {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED], "chat_template_kwargs": {"thinking": False}},
            "prompt/completion",
            Conversation([ASKED, ANSWERED, ASKED, ANSWERED], (False, False, False, True), (), {"thinking": False}),
        ),
        # Fields that other rows of a file have are null in this one.
        ({"messages": None, "prompt": None, "completion": None, "text": "t"}, "text", Text("", "t")),
        (
            {"messages": [{**ASKED, "tool_calls": None}, {**ANSWERED, "weight": 0}, {**ANSWERED, "train": True}]},
            "messages",
            Conversation([ASKED, ANSWERED, ANSWERED], (False, False, True)),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "?"}]}, ANSWERED]},
            "messages",
            Conversation([{"role": "user", "content": "q?"}, ANSWERED], (False, True)),
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": '[{"name": "f"}]'}], "tools": "[{}]"},
            "messages",
            Conversation([ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}], (False, True), ({},)),
        ),
        # The first shape in the documented order wins.
        (
            {"text": "t", "instruction": "i", "output": "o", "prompt": "p", "completion": "c"},
            "prompt/completion",
            Text("p", "c"),
        ),
    ],
)
def test_shapes(record: dict[str, Any], shape: str, content: object) -> None:
    assert read_record(record, "f:1") == (shape, content)


@pytest.mark.parametrize("input", [{}, {"input": ""}, {"input": None}])
def test_instruction_without_input(input: dict[str, Any]) -> None:
    record = {"instruction": "i", "output": "o"} | input
    assert read_record(record, "f:1")[1] == Instruction("i", "", "o")
    assert instruction_prompt("i") == "### Instruction:\ni\n\n### Response:\n"
    assert instruction_prompt("i", "x") == "### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n"
    assert instruction_messages(Instruction("i", "x", "o", "s")) == [
        SYSTEM,
        {"role": "user", "content": "i\n\nx"},
        {"role": "assistant", "content": "o"},
    ]


def test_what_is_made_nothing_of_is_told() -> None:
    record = {"messages": [ANSWERED], "chosen": "c", "id": 3, "tools": [], "label": None}
    shape, content = read_record(record, "f:1")
    assert ignored_fields(record, shape, content) == ["chosen", "id"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "this line has: none"),
        ({"prompt": "p", "response": "r"}, "this line has: prompt, response"),
        ({"prompt": 3, "completion": "c"}, "field prompt must be a string, found number"),
        ({"prompt": "p", "completion": None}, "field completion must be a string, found null"),
        ({"text": ["a"]}, "field text must be a string, found array"),
        (
            {"instruction": "i", "input": {}, "output": "o"},
            "field input must be a string, found object",
        ),
        ({"text": "a\ud800"}, "field text holds an unpaired surrogate at character 2"),
        ({"messages": "hi"}, "field messages must be an array, found string"),
        ({"messages": ["hi"]}, "field messages[0] must be an object, found string"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant"}]},
            "field messages[1].content is missing; found: role",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text"}]}]},
            "field messages[0].content[0].text is missing; found: type",
        ),
        (said(content=[{"type": "image_url"}]), 'content[0].type "image_url": only parts of type text are read'),
        (said(content=["a"]), "field messages[0].content[0] must be an object, found string"),
        (said(weight=0.5), "field messages[0].weight must be 0 or 1, found 0.5"),
        (said(train="no"), 'field messages[0].train must be true or false, found "no"'),
        (said(weight=1, masked=True), "messages[0] is trained on by one of weight, masked, and not by another"),
        (said(function_call={"name": "f"}), "field messages[0].function_call is not read: write it as tool_calls"),
        (said(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "arguments is a string and no JSON"),
        (said(tool_calls=[{"function": {}}]), "tool_calls[0].function.name must be a string, found null"),
        ({"messages": [{**ASKED, "train": True}, ANSWERED]}, "only turns of the assistant are trained on, not user's"),
        ({"messages": [SYSTEM, ANSWERED], "system": "t"}, "field system: messages[0] is a system turn already"),
        ({"messages": [ANSWERED], "tools": "weather"}, "field tools is a string and no JSON"),
        ({"messages": [ANSWERED], "tools": ["1"]}, "field tools[0] must be an object, found number"),
        ({"messages": [ANSWERED], "images": ["a.png"]}, "field images is not read: rows are text"),
        ({"messages": [ANSWERED], "weight": 0.5}, "field weight 0.5: all rows weigh the same"),
        ({"messages": [ANSWERED], "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools: belongs"),
        ({"conversations": [{"from": "narrator", "value": "v"}]}, "conversations[0].from 'narrator': must be one of"),
        ({"conversations": [{"from": "gpt"}]}, "field conversations[0].value is missing; found: from"),
        ({"prompt": "p", "completion": [ANSWERED]}, "must both be text, or both be arrays of messages"),
        ({"prompt": [ANSWERED], "completion": [ASKED]}, "completion must have a turn whose role is assistant"),
        ({"prompt": "p", "completion": "c", "label": False}, "a completion that is not wanted"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preferences are not trained on"),
        ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, "field history is not read"),
        ({"messages": []}, "a turn whose role is assistant; roles found: none"),
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "a turn whose role is assistant; roles found: user",
        ),
    ],
)
def test_faulty_record(record: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_record(record, "rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert says in str(caught.value)


def test_unknown_fields_name_every_accepted_shape() -> None:
    with pytest.raises(InputError) as caught:
        read_record({"question": "q"}, "f:1")
    for field in ("messages", "prompt", "completion", "instruction", "output", "text"):
        assert field in str(caught.value)
