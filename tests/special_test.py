"""Which tokens begin and end a text, from what a checkpoint's files say."""

import json

import pytest
import tokenizers
import transformers

from jaxpeft.data.encode import encode_prompt, encode_texts
from jaxpeft.data.formats import Text
from jaxpeft.errors import InputError
from jaxpeft.special import SpecialTokens, eos_ids, from_parts, special_tokens, turn_end

TOKENS = ["<bos>", "<eos>", "<end>", "a", "b", "c", "\n", "?"]
BOS, EOS, END, A, B, C, LINE, _ = range(8)
CHAT = "{% for m in messages %}{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}a{% endif %}"


def letters(bos="<bos>", eos="<eos>", template=None, adds=()):
    """A tokenizer of single letters; `adds` are the special tokens that it puts around a text by itself."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="?")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    if adds:
        single = " ".join("$A" if token == "$A" else token for token in adds)
        pairs = [(token, TOKENS.index(token)) for token in adds if token != "$A"]
        made.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=pairs)
    made.add_special_tokens([token for token in TOKENS[:3] if token != eos])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token=eos, unk_token="?", chat_template=template
    )


@pytest.mark.parametrize(
    ("tokenizer", "config", "generation", "end", "ends"),
    [
        ({}, {"eos_token_id": EOS}, {}, EOS, (EOS,)),
        ({}, {"eos_token_id": 9}, {"eos_token_id": [9, 8]}, EOS, (EOS, 9, 8)),  # all of them, each once
        ({"eos": None}, {"eos_token_id": [9, 8]}, {}, 9, (9, 8)),  # the configuration's first
        ({"eos": None}, {"eos_token_id": None}, {"eos_token_id": 8}, 8, (8,)),
        ({"eos": None}, {"eos_token_id": -1}, {}, None, ()),  # as some files write "none"
        ({"template": CHAT}, {"eos_token_id": EOS}, {}, EOS, (EOS, END)),  # a turn ends with another token
        ({"eos": None, "template": CHAT}, {}, {}, None, (END,)),
    ],
)
def test_decoding_stops_at_every_end_and_training_teaches_one(tokenizer, config, generation, end, ends):
    found = from_parts(letters(**tokenizer), config, generation)
    assert (found.end, found.ends) == (end, ends)


@pytest.mark.parametrize("value", ["2", [2, None], 2.0, True, {"a": 1}])
def test_an_eos_that_is_no_token_id_is_refused(value):
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id .* should be a token id or a list"):
        eos_ids({"eos_token_id": 2}, {"eos_token_id": value})


@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "trained"),
    [
        ("a", "b", [BOS, A, B, EOS], 2),
        ("<bos>a", "b", [BOS, A, B, EOS], 2),  # the text begins with it
        ("", "<bos>ab<eos>", [BOS, A, B, EOS], 3),  # a text rendered by hand; what begins it is not trained
        ("a", "b<end>\n", [BOS, A, B, END, LINE], 3),  # ended as the template ends a turn
        ("a<eos>", "b", [BOS, A, EOS, B, EOS], 2),
    ],
)
def test_no_text_begins_or_ends_twice(prompt, completion, ids, trained):
    tokenizer = letters(template=CHAT, adds=("<bos>", "$A", "<eos>"))
    (row,) = encode_texts([Text(prompt, completion)], tokenizer)
    assert row.ids.tolist() == ids and row.completion.sum() == trained
    assert encode_prompt(prompt, tokenizer) == ids[: len(ids) - trained]  # without the EOS that this tokenizer adds


def test_without_any_end_a_text_stays_open():
    (row,) = encode_texts([Text("a", "b")], letters(bos=None, eos=None))
    assert row.ids.tolist() == [A, B]
    assert SpecialTokens().closing([]) == SpecialTokens().opening([]) == []


def test_an_end_of_turn_that_cannot_be_told():
    assert turn_end(letters()) is None
    assert turn_end(letters(template="{{ raise_exception('no') }}")) is None
    assert turn_end(letters(template="{% for m in messages %}{{ m.content }}\n{% endfor %}")) is None


def test_a_checkpoint_says_it_in_three_files(tmp_path):
    for name, eos in (("config", 7), ("generation_config", [7, 9])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": eos}))
    assert special_tokens(tmp_path, letters()).ends == (EOS, 7, 9)
