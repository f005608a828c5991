"""The trained part of a conversation is every assistant turn with its end, and nothing else."""

import pytest
from transformers import PreTrainedTokenizerBase

from jaxpeft.data.chat import render_chat, tokenize_marked
from jaxpeft.data.encode import encode_chats
from jaxpeft.errors import InputError

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


def turns(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    chat = render_chat(messages, tokenizer, "f:1")
    return [chat.text[first:end] for first, end in chat.spans]


def test_chatml_turns(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    assert turns(CONVERSATION, chat_tokenizer) == ["hi<|im_end|>\n", "Paris.<|im_end|>\n"]


def test_template_that_writes_the_last_turn_differently(
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat_tokenizer.chat_template = EMPTY_THOUGHT
    assert turns(CONVERSATION, chat_tokenizer) == [
        "hi<|im_end|>\n",
        "<think>\n\n</think>\n\nParis.<|im_end|>\n",
    ]


def test_template_without_generation_prompt(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = INST
    messages = [
        {"role": "user", "content": " q "},
        {"role": "assistant", "content": " a\n"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
    assert turns(messages, chat_tokenizer) == [" a<|endoftext|>", " a2<|endoftext|>"]


@pytest.mark.parametrize("template", [CHATML, EMPTY_THOUGHT])
def test_conversation_that_the_assistant_opens(chat_tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    chat_tokenizer.chat_template = template
    messages = [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "No."}]
    assert turns(messages, chat_tokenizer) == ["Yes?<|im_end|>\n"]
    chat_tokenizer.chat_template = INST
    assert turns(messages, chat_tokenizer) == ["Yes?<|endoftext|>"]


def test_mask_covers_the_turns_tokens_exactly(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat = render_chat(CONVERSATION, chat_tokenizer, "f:1")
    (encoded,) = encode_chats([chat], chat_tokenizer)
    assert chat_tokenizer.decode(encoded.ids) == chat.text
    trained = encoded.ids[encoded.completion]
    assert chat_tokenizer.decode(trained) == "hi<|im_end|>\nParis.<|im_end|>\n"
    assert (trained == chat_tokenizer.eos_token_id).sum() == 2


def test_marked_template_decides_itself(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = MARKED
    ids, mask = tokenize_marked(CONVERSATION, chat_tokenizer, "f:1")
    trained = [token for token, flag in zip(ids, mask, strict=True) if flag]
    assert chat_tokenizer.decode(trained) == "hi<|im_end|>Paris.<|im_end|>"


def test_inconsistent_template_is_refused(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = COUNTS_TURNS
    with pytest.raises(InputError, match=r"f:1: .*messages\[2\] differently.*generation"):
        render_chat(CONVERSATION, chat_tokenizer, "f:1")


def test_refusal_by_the_template_is_told(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = INST
    with pytest.raises(InputError, match=r"f:1: .*only user and assistant"):
        render_chat(CONVERSATION, chat_tokenizer, "f:1")
