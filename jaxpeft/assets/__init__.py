"""The embedded default: a small pretrained Llama and a task, so that the library has something to run offline.

Each folder's README.md says where it comes from, what it can do and under which licence.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL = _HERE / "tiny_llama"
TRAIN = _HERE / "docstrings" / "train.jsonl"
VALIDATION = _HERE / "docstrings" / "validation.jsonl"
