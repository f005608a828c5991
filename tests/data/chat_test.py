"""Trained on is every assistant turn with its end, behind what the model sees when it writes it, and nothing else."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from jaxpeft.data.chat import Chat, has_lost_words, render_chat, unread_fields
from jaxpeft.data.encode import encode_chats
from jaxpeft.data.messages import Conversation, read_conversation
from jaxpeft.errors import InputError
from jaxpeft.template import Template

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hi"},  # the same words as the user's: position must decide
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris."},
]

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: the last turn, if the assistant's, opens with an empty thought.
EMPTY_THOUGHT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
# As Llama 2's and Mistral's: no generation prompt, the content is trimmed.
INST = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "[INST] {{ message.content | trim }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}<|endoftext|>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
COUNTS_TURNS = (
    "{{ messages | length }} turns: "
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)


# As DeepSeek R1's: the generation prompt opens a thought, and no turn is written with one.
OPENS_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# As Qwen3's: only turns after the last question keep their thoughts.
DROPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>\n')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen2.5's: calls beside the content, their arguments as JSON.
CALLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3.5's without thinking: the generation prompt has an empty thought, and turns may have one with words.
CLOSES_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' not in m.content %}"
    "<think>\n\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}"
)
# As gpt-oss's: once an answer is there, what was said before it is written without its thoughts.
DROPS_BEFORE_ANSWER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if messages[-1].role != 'assistant' or loop.last else m.content.split('</think>\n')[-1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHTS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\na1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "<think>\nho\n</think>\na2"},
]
TOOL_CALL = {"function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}


def render(record: Any, tokenizer: PreTrainedTokenizerBase) -> list[Chat]:
    record = record if isinstance(record, dict) else {"messages": record}
    conversation = read_conversation(record, ("messages",), "f:1")
    assert unread_fields(conversation, tokenizer, "f:1") == []
    return render_chat(conversation, tokenizer, Template("chat", "2026-03-01"), "f:1")


def turns(record: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """What is trained on, example by example."""
    return [[chat.text[first:end] for first, end in chat.spans] for chat in render(record, tokenizer)]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, CONVERSATION, [["hi<|im_end|>\n", "Paris.<|im_end|>\n"]]),
        # Earlier turns are written otherwise: an example for each.
        (
            EMPTY_THOUGHT,
            CONVERSATION,
            [["<think>\n\n</think>\n\nhi<|im_end|>\n"], ["<think>\n\n</think>\n\nParis.<|im_end|>\n"]],
        ),
        (
            DROPS_THOUGHTS,
            THOUGHTS,
            [["<think>\nhm\n</think>\na1<|im_end|>\n"], ["<think>\nho\n</think>\na2<|im_end|>\n"]],
        ),
        # The thought is opened already; the template would lose it.
        (OPENS_THOUGHT, THOUGHTS, [["hm\n</think>\na1<|im_end|>"], ["ho\n</think>\na2<|im_end|>"]]),
        (CLOSES_THOUGHT, THOUGHTS[:2], [["hm\n</think>\na1<|im_end|>\n"]]),
        (OPENS_THOUGHT, CONVERSATION[1:], [["hi<|im_end|>", "Paris.<|im_end|>"]]),
        (OPENS_THOUGHT, [THOUGHTS[0], {"role": "assistant", "content": "<b>4</b>"}], [["<b>4</b><|im_end|>"]]),
        (
            INST,
            [
                {"role": "user", "content": " q "},
                {"role": "assistant", "content": " a\n"},
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "a2"},
            ],
            [[" a<|endoftext|>", " a2<|endoftext|>"]],
        ),
        (MARKED, CONVERSATION, [["hi<|im_end|>", "Paris.<|im_end|>"]]),
        (CALLS, [CONVERSATION[1], CALLING], [['weather({"town": "Ulm"})<|im_end|>\n']]),
    ],
)
def test_what_the_assistant_wrote(
    chat_tokenizer: PreTrainedTokenizerBase, template: str, messages: Any, expected: list[list[str]]
) -> None:
    chat_tokenizer.chat_template = template
    assert turns(messages, chat_tokenizer) == expected


@pytest.mark.parametrize("template", [CHATML, DROPS_THOUGHTS, OPENS_THOUGHT, DROPS_BEFORE_ANSWER])
def test_a_turn_comes_after_what_the_model_sees_then(chat_tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    chat_tokenizer.chat_template = template
    found = [chat.text[:first] for chat in render(THOUGHTS, chat_tokenizer) for first, _ in chat.spans]
    assert found == [
        chat_tokenizer.apply_chat_template(THOUGHTS[:i], tokenize=False, add_generation_prompt=True) for i in (1, 3)
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED, DROPS_THOUGHTS])
@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"masked": True}])
def test_a_turn_that_is_not_trained_on(
    chat_tokenizer: PreTrainedTokenizerBase, template: str, flag: dict[str, Any]
) -> None:
    chat_tokenizer.chat_template = template
    messages = [*CONVERSATION[:2], {**CONVERSATION[2], **flag}, *CONVERSATION[3:]]
    assert [turn.strip() for turn in turns(messages, chat_tokenizer)[0]] == ["Paris.<|im_end|>"]
    assert turns(messages[:3], chat_tokenizer) == [[]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "Yes?<|im_end|>\n"),
        (EMPTY_THOUGHT, "<think>\n\n</think>\n\nYes?<|im_end|>\n"),
        (INST, "Yes?<|endoftext|>"),
    ],
)
def test_conversation_that_the_assistant_opens(
    chat_tokenizer: PreTrainedTokenizerBase, template: str, expected: str
) -> None:
    chat_tokenizer.chat_template = template
    messages = [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "No."}]
    assert turns(messages, chat_tokenizer) == [[expected]]


def test_mask_covers_the_turns_tokens_exactly(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    (chat,) = render(CONVERSATION, chat_tokenizer)
    (encoded,) = encode_chats([chat], chat_tokenizer)
    assert chat_tokenizer.decode(encoded.ids) == chat.text
    trained = encoded.ids[encoded.completion]
    assert chat_tokenizer.decode(trained) == "hi<|im_end|>\nParis.<|im_end|>\n"
    assert (trained == chat_tokenizer.eos_token_id).sum() == 2


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_reach_the_template(chat_tokenizer: PreTrainedTokenizerBase, as_json: bool) -> None:
    chat_tokenizer.chat_template = CALLS
    tools = [{"type": "function", "function": {"name": "weather"}}]
    (chat,) = render({"messages": CONVERSATION, "tools": json.dumps(tools) if as_json else tools}, chat_tokenizer)
    assert chat.text.startswith(json.dumps(tools) + "\n<|im_start|>system")
    # Templates differ in whether they want arguments as an object or as its JSON.
    chat_tokenizer.chat_template = CALLS.replace("c.function.arguments | tojson", "'!' + c.function.arguments")
    assert turns([CONVERSATION[1], CALLING], chat_tokenizer) == [['weather(!{"town": "Ulm"})<|im_end|>\n']]


@pytest.mark.parametrize(
    ("conversation", "says"),
    [
        ({"tools": ({"name": "f"},)}, "no words for tools"),
        ({"options": {"enable_thinking": False}}, "no words for enable_thinking"),
        ({"messages": [{**CONVERSATION[2], "tool_calls": [TOOL_CALL]}]}, r"no words for messages\[0\].tool_calls"),
        ({"messages": [{**CONVERSATION[2], "reasoning_content": "hm"}]}, r"messages\[0\].reasoning_content"),
    ],
)
def test_what_a_template_would_lose_is_refused(
    chat_tokenizer: PreTrainedTokenizerBase, conversation: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        unread_fields(Conversation(**{"messages": CONVERSATION, "trained": (), **conversation}), chat_tokenizer, "f:1")


def test_fields_that_a_template_does_not_read_are_told(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = Conversation([{**CONVERSATION[2], "name": "Ann"}], (True,))
    assert unread_fields(conversation, chat_tokenizer, "f:1") == ["messages.name"]


def test_words_that_a_template_leaves_out_are_told(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = Conversation(CONVERSATION[1:3], (False, True))
    chats = render_chat(conversation, chat_tokenizer, Template("chat", "2026-03-01"), "f:1")
    assert not has_lost_words(conversation, chats)
    assert has_lost_words(Conversation([{**CONVERSATION[2], "content": "hi there"}], (True,)), chats)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (COUNTS_TURNS, r"f:1: .*messages\[2\] differently.*generation"),
        (INST, r"f:1: .*only user and assistant"),
    ],
)
def test_conversations_that_a_template_is_not_for(
    chat_tokenizer: PreTrainedTokenizerBase, template: str, says: str
) -> None:
    chat_tokenizer.chat_template = template
    with pytest.raises(InputError, match=says):
        render(CONVERSATION, chat_tokenizer)
