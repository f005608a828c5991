"""Tokenizers as files bring them: those that multiply text are refused, and calls that fail are one line."""

import json
import time

import pytest
import tokenizers
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxpeft import hf, tokenizing
from jaxpeft.cli import main
from jaxpeft.data.examples import load_examples
from jaxpeft.errors import InputError
from jaxpeft.tokenizing import Refused, check_rules, rules_of, tokenize
from tests import runs

REAL = {
    "llama 2": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "albert": normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    ),
    "clip": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
    "bert": normalizers.BertNormalizer(),
    "many": normalizers.Sequence([normalizers.Replace(Regex(f"[{c}-z]+[0-9]*"), "x") for c in "abcdefghij"]),
}
TENS = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10} for _ in range(9)]
BETWEEN = {"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": "b"}


def made(normalizer=None, pre_tokenizer=None):
    own = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate("ab?")}, unk_token="?"))
    own.normalizer = normalizer
    own.pre_tokenizer = pre_tokenizer or pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own)


@pytest.mark.parametrize("name", REAL)
def test_rules_of_real_tokenizers_pass(name):
    check_rules("f", rules_of(made(REAL[name])))


def test_other_parts_of_real_tokenizers_pass():
    own = made(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()]))
    own.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    check_rules("f", rules_of(own))


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": TENS}}, r"rules can make a text 1e\+09 times as long"),
        ({"normalizer": {"type": "Sequence", "normalizers": [BETWEEN] * 9}}, "rules .* 512 times"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 1000}}, "rules .* 1e\\+03 times"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 9}}, "rules .* 512 times"),
        ({"decoder": {"type": "Sequence", "decoders": TENS}}, "decoder can make"),
        ({"model": {"type": "BPE", "continuing_subword_prefix": "#" * 100}}, "subword_prefix has 100 characters"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 40,
                    "special_tokens": {"x": {"id": "x", "ids": [0] * 40, "tokens": ["x"] * 40}},
                }
            },
            "puts 1600 tokens around a text",
        ),
    ],
)
def test_rules_that_multiply_text_are_refused(rules, says):
    with pytest.raises(InputError, match=f"^f: the tokenizer.*{says}"):
        check_rules("f", rules)


@pytest.fixture
def stuck(monkeypatch):
    """A tokenizer that hangs at a text with b; it has a fifth of a second."""
    monkeypatch.setattr(tokenizing, "SECONDS", 0.2)
    own = made()

    class Stuck:
        is_fast = True

        def __call__(self, first, second=None, **options):
            if any("b" in text for text in first):
                time.sleep(2)
            return own(first, second, **options)

        def __getattr__(self, name):
            return getattr(own, name)

    return Stuck()


def test_a_call_that_takes_too_long_is_left_alone(stuck):
    assert tokenize(stuck, ["a", "aa"])["input_ids"] == [[0], [0, 0]]
    with pytest.raises(Refused, match="^the tokenizer took longer than 0.2 s") as caught:
        tokenize(stuck, ["a", "ab", "aaa"])
    assert caught.value.row == 1


def test_a_row_at_which_the_tokenizer_hangs_is_named(stuck, tmp_path):
    rows = [{"prompt": "a", "completion": "a"}, {"prompt": "aa", "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"rows.jsonl:2: the tokenizer took longer than 0.2 s"):
        load_examples(tmp_path / "rows.jsonl", stuck, 8, cache=False)


def test_a_panic_is_an_error_of_its_row_and_leaves_stderr_alone(capfd):
    own = made(pre_tokenizer=pre_tokenizers.Split(Regex(r"(a+|b+|(?:a|aa|b)+)+[XZ]"), "isolated"))
    with pytest.raises(Refused, match="^the tokenizer fails: .*retry-limit-in-match over") as caught:
        tokenize(own, ["a", "a" * 40])
    assert caught.value.row == 1
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return runs.make_files(tmp_path_factory.mktemp("files"))


def rewrite(files, tmp_path, change):
    """A copy of the model with another tokenizer.json."""
    import shutil

    shutil.copytree(files / "model", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return tmp_path / "model"


def test_a_checkpoint_whose_normalizer_multiplies_is_refused(files, tmp_path, capsys):
    change = lambda document: document.update(normalizer={"type": "Sequence", "normalizers": TENS})
    model = rewrite(files, tmp_path, change)
    with pytest.raises(InputError, match="tokenizer.json: the tokenizer's rules can make a text 1e.09 times as long"):
        hf.load_tokenizer(model)
    for command in (
        ["generate", "--prompt", "a"],
        ["train", "--data", f"{files}/train.jsonl", "--out", str(tmp_path / "o")],
    ):
        assert main([*command, "--model", str(model)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "times as long" in told


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"]])
def test_ids_above_the_vocabulary_are_refused_where_text_is_made(files, tmp_path, capsys, monkeypatch, command):
    model = rewrite(files, tmp_path, lambda document: document["model"]["vocab"].update(zz=400))
    if command == ["chat"]:
        (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert main([*command, "--model", str(model)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the tokenizer gives 'zz' the id 400; the model's vocab_size is 40" in told
