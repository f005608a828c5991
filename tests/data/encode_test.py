"""Prompt and completion are one text; what is shown before the completion is what the prompt alone gives."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from transformers import PreTrainedTokenizerBase

from jaxpeft.data.encode import _start, encode_prompt, encode_texts
from jaxpeft.data.formats import Text, instruction_prompt


@pytest.fixture(params=["llama_tokenizer", "chat_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("prompt", [instruction_prompt("Say it.", "now"), "Q: why?\nA:", ""])
@pytest.mark.parametrize("completion", ["Because.", "\n\nindented\n", " a  b"])
def test_boundary_is_stable(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> None:
    (encoded,) = encode_texts([Text(prompt, completion)], tokenizer)
    prompt_ids = encoded.ids[~encoded.completion].tolist()
    assert prompt_ids == encode_prompt(prompt, tokenizer)
    completion_ids = encoded.ids[encoded.completion]
    assert encoded.completion.tolist() == sorted(encoded.completion.tolist())
    assert completion_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True).lstrip(" ") == (prompt + completion).lstrip(" ")
    assert tokenizer(prompt + completion)["input_ids"] == encoded.ids[:-1].tolist()


def test_nothing_comes_between_prompt_and_completion(llama_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Text("foot", "ball"), Text("def f():\n", "    return 1")]
    football, code = encode_texts(rows, llama_tokenizer)
    assert llama_tokenizer.decode(football.ids, skip_special_tokens=True).strip() == "football"
    assert llama_tokenizer.decode(code.ids, skip_special_tokens=True).strip() == "def f():\n    return 1"
    assert llama_tokenizer.convert_ids_to_tokens(code.ids[code.completion].tolist())[:4] == ["▁"] * 4


@pytest.mark.parametrize(
    ("prompt", "text", "offsets", "start"),
    [
        ([1, 2], [1, 2, 3], [(0, 1), (1, 2), (2, 3)], 2),
        ([], [3], [(0, 3)], 0),
        ([1, 2], [1, 4, 3], [(0, 1), (1, 3), (3, 4)], 1),  # a token across the boundary, which is character 2
        ([1, 2], [1, 4, 3], None, 1),  # the same where the tokenizer doesn't say where tokens lie
        ([5, 2], [1, 3, 4], [(0, 1), (1, 2), (2, 3)], 2),  # other tokens, but none across it
        ([1, 2], [1], [(0, 2)], 1),  # a completion that leaves nothing
        ([1, 2], [1], None, 1),
    ],
)
def test_where_a_completion_begins(prompt: list[int], text: list[int], offsets: Any, start: int) -> None:
    assert _start(prompt, text, offsets, 2) == start


def test_bytes_outside_the_vocabulary_survive(llama_tokenizer: PreTrainedTokenizerBase) -> None:
    (encoded,) = encode_texts([Text("p", " été 🙂")], llama_tokenizer)
    assert llama_tokenizer.decode(encoded.ids[encoded.completion][:-1]) == "été 🙂"


def test_prompt_is_what_the_tokenizer_gives_for_it(tokenizer: PreTrainedTokenizerBase) -> None:
    for prompt in ("Once upon a time", instruction_prompt("Say it.")):
        assert encode_prompt(prompt, tokenizer) == tokenizer(prompt)["input_ids"]


def test_bos_only_where_the_tokenizer_adds_it(
    llama_tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert encode_prompt("a", llama_tokenizer)[0] == llama_tokenizer.bos_token_id
    chat_tokenizer.bos_token = "<|endoftext|>"  # it has one, but does not put it before texts
    assert chat_tokenizer.bos_token_id not in encode_prompt("a", chat_tokenizer)


def test_tokenizer_without_eos(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.eos_token = None
    (encoded,) = encode_texts([Text("p", "c")], chat_tokenizer)
    assert chat_tokenizer.decode(encoded.ids[encoded.completion]) == "c"


@hypothesis.settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(texts=st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=5))
def test_batching_changes_nothing(llama_tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]) -> None:
    rows = [Text(*pair) for pair in texts]
    together = encode_texts(rows, llama_tokenizer)
    assert len(together) == len(rows)
    for row, encoded in zip(rows, together, strict=True):
        (alone,) = encode_texts([row], llama_tokenizer)
        assert alone.ids.tolist() == encoded.ids.tolist()
        assert alone.completion.tolist() == encoded.completion.tolist()
