"""Tokenizers of the data tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def llama_tokenizer(shared_data: Path) -> PreTrainedTokenizerBase:
    """Llama 2 style: adds BOS, marks the start of a text with a space, no chat template."""
    return AutoTokenizer.from_pretrained(shared_data / "checkpoints" / "stories260K")


@pytest.fixture
def chat_tokenizer(shared_data: Path) -> PreTrainedTokenizerBase:
    """Qwen style: byte-level BPE, no BOS, ChatML template. New for each test, which may edit it."""
    file = shared_data / "tokenizers" / "tiny_bpe" / "tiny_bpe_tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer
