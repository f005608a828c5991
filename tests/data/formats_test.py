"""Which records are accepted, as what, and what is said of the others."""

from typing import Any

import pytest

from jaxpeft.data.formats import Conversation, Text, instruction_prompt, read_record
from jaxpeft.errors import InputError


@pytest.mark.parametrize(
    ("record", "shape", "content"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt/completion", Text("p", "c")),
        ({"text": "t", "label": 3}, "text", Text("", "t")),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            "instruction/input/output",
            Text("### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n", "o"),
        ),
        (
            {"messages": [{"role": "assistant", "content": "hi"}]},
            "messages",
            Conversation([{"role": "assistant", "content": "hi"}]),
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
    expected = "### Instruction:\ni\n\n### Response:\n"
    assert read_record(record, "f:1")[1] == Text(expected, "o")
    assert instruction_prompt("i") == expected


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
            "field messages[0].content must be a string, found array",
        ),
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
