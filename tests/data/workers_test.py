"""Several processes give what one gives, in the same order."""

import datetime
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpeft.data import cache, workers
from jaxpeft.data.examples import Encoder
from jaxpeft.data.records import Record
from jaxpeft.errors import InputError
from jaxpeft.special import from_parts
from jaxpeft.template import choose

CHAT = {"messages": [{"role": "user", "content": "hé \u2028"}, {"role": "assistant", "content": "hello"}]}
CONTENTS: list[Any] = [
    json.dumps({"prompt": "one plus one is", "completion": "two"}).encode(),
    CHAT,
    InputError("rows:3: made before"),
    b'{"text": "\xff"}',
    {"text": "day", "date": datetime.date(2024, 5, 1)},  # of a column; no JSON
    {"text": 7},
    {"text": "last"},
]


def make_encoder(tokenizer: Any, skip_bad_lines: bool) -> Encoder:
    return Encoder(tokenizer, from_parts(tokenizer), choose("auto", tokenizer), skip_bad_lines)


def test_several_processes_are_one(chat_tokenizer: Any) -> None:
    records = [Record(i, f"rows:{i}", content) for i, content in enumerate(CONTENTS * 3, start=1)]
    parts = [records[i : i + 2] for i in range(0, len(records), 2)]
    encoder = make_encoder(chat_tokenizer, skip_bad_lines=True)
    made, alone = (list(found) for found in (workers.encode(parts, encoder, 2), map(encoder.part, parts)))
    assert len(made) == len(alone) == len(parts)
    for (chunk, report), (expected, counts) in zip(made, alone, strict=True):
        assert report == counts
        for ours, theirs in zip(chunk, expected, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_the_first_fault_is_what_a_worker_says(chat_tokenizer: Any, tmp_path: Path) -> None:
    chat_tokenizer.save_pretrained(tmp_path)
    asked, said = io.BytesIO(), io.BytesIO()
    workers._send(asked, {"tokenizer": str(tmp_path), "settings": make_encoder(chat_tokenizer, False).settings()})
    workers._send(asked, [workers._plain(Record(i, f"rows:{i}", content)) for i, content in enumerate(CONTENTS[:4])])
    asked.seek(0)
    with pytest.raises(EOFError):
        workers._work(asked, said)
    said.seek(0)
    assert workers._receive(said) == cache.identify(chat_tokenizer)
    assert workers._receive(said) == {"error": "rows:3: made before"}
