"""The prompt's ids are those it has alone, and the completion's decode to the completion."""

import hypothesis
import hypothesis.strategies as st
import pytest
from transformers import PreTrainedTokenizerBase

from jaxpeft.data.encode import encode_prompt, encode_texts
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
    assert tokenizer.decode(completion_ids[:-1]) == completion


def test_bytes_outside_the_vocabulary_survive(llama_tokenizer: PreTrainedTokenizerBase) -> None:
    (encoded,) = encode_texts([Text("p", "été 🙂")], llama_tokenizer)
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
