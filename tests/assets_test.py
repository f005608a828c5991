"""The embedded default: that the shipped files are whole, load in transformers, and keep the task held out."""

import ast
import json
import re
import sys

import numpy as np
import pytest
import safetensors
import transformers

from experiments import stdlib_corpus
from jaxpeft import assets, hf, tree

MODEL, TASK = assets.MODEL, assets.TRAIN.parent


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def config():
    return transformers.AutoConfig.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def rows():
    return {name: read_rows(path) for name, path in (("train", assets.TRAIN), ("validation", assets.VALIDATION))}


@pytest.mark.parametrize("name, count", [("train", 480), ("validation", 32)])
def test_the_conversations_are_the_first_short_rows(rows, name, count):
    ask = "Write a one-line docstring for this Python function.\n\n```python\n{}\n```"
    sources = [(row["prompt"].removesuffix("\n\nSummary:\n"), row["completion"]) for row in rows[name]]
    short = [pair for pair in sources if len(pair[0]) <= 240][:count]
    expected = [
        [{"role": "user", "content": ask.format(source)}, {"role": "assistant", "content": summary}]
        for source, summary in short
    ]
    assert [row["messages"] for row in read_rows(TASK / f"chat_{name}.jsonl")] == expected


def test_smollm2_is_a_llama_with_a_chat_template():
    assert hf.load_config(assets.smollm2())["num_hidden_layers"] == 30
    tokenizer = hf.load_tokenizer(assets.smollm2())
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False)
    assert text.endswith("<|im_start|>user\n1 + 1?<|im_end|>\n")
    ids = tokenizer("<|im_start|>user\n1 + 12?<|im_end|>\n").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>",
        "user",
        "Ċ",
        "1",
        "Ġ+",
        "Ġ",
        "1",
        "2",
        "?",
        "<|im_end|>",
        "Ċ",
    ]


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_model_is_a_small_llama(config):
    assert config.model_type == "llama"
    assert config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads


def test_weights_are_small_and_finite_and_bfloat16():
    path = MODEL / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safetensors.safe_open(path, "numpy") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    _, params = hf.load_pretrained(MODEL)
    for name, leaf in tree.flatten(params).items():
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), name


def test_transformers_loads_every_weight():
    _, info = transformers.AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_tokenizer_fits_the_model(tokenizer, config):
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    assert len(tokenizer) == config.vocab_size
    assert (
        tokenizer.bos_token_id
        == tokenizer.eos_token_id
        == tokenizer.pad_token_id
        == config.eos_token_id
        == config.bos_token_id
    )


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    return x\n", "  spaces  and\ttabs\r\n", "naïve 日本語 🐍", "\x00\x7f", ""],
)
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_adds_nothing_to_a_text(tokenizer):
    ids = tokenizer("import os")["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("import os<|endoftext|>")["input_ids"] == [*ids, tokenizer.eos_token_id]


def test_chat_template_marks_the_assistant(tokenizer):
    messages = [
        {"role": "user", "content": "Which module?"},
        {"role": "assistant", "content": "The re module."},
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "### user\nWhich module?\n### assistant\n"
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, m in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(trained) == "The re module.<|endoftext|>"
    assert tokenizer.decode(whole["input_ids"]).startswith(prompt + "The re module.")


def test_task_is_small():
    assert sum(path.stat().st_size for path in TASK.iterdir()) < 1_500_000


@pytest.mark.parametrize(("split", "least"), [("train", 1500), ("validation", 200)])
def test_rows_are_a_function_and_a_sentence(rows, split, least):
    assert len(rows[split]) >= least
    for row in rows[split]:
        assert row.keys() == {"prompt", "completion"}
        source = row["prompt"].removesuffix(stdlib_corpus.SUMMARY_CUE)
        assert source != row["prompt"]
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert re.fullmatch(r"[A-Z][^\n]{1,120}", row["completion"])


def test_rows_fit_the_context(rows, tokenizer, config):
    for row in rows["train"] + rows["validation"]:
        tokens = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        assert len(tokens) + 1 <= config.max_position_embeddings


def test_splits_share_no_function(rows):
    def bodies(split):
        return {body_of(row) for row in rows[split]}

    assert not bodies("train") & bodies("validation")
    assert len(bodies("train")) == len(rows["train"])


def test_modules_of_task_and_pretraining_are_disjoint():
    assert not stdlib_corpus.TASK_TRAIN_MODULES & stdlib_corpus.TASK_VALIDATION_MODULES
    task = stdlib_corpus.TASK_TRAIN_MODULES | stdlib_corpus.TASK_VALIDATION_MODULES
    names = {document.name for document in stdlib_corpus.pretraining_documents()}
    assert {"argparse.py", "asyncio/events.py", "topics/lambda"} <= names
    assert not {stdlib_corpus.module_of(name) for name in names} & task


@pytest.mark.slow
@pytest.mark.skipif(
    f"CPython {sys.version.split()[0]}" not in (TASK / "README.md").read_text(encoding="utf-8"),
    reason="the shipped rows come from another Python version's library",
)
def test_no_task_function_is_in_the_pretraining_text(rows):
    seen = stdlib_corpus.pretraining_bodies()
    for row in rows["train"] + rows["validation"]:
        assert body_of(row) not in seen


def body_of(row):
    (function,) = ast.parse(row["prompt"].removesuffix(stdlib_corpus.SUMMARY_CUE)).body
    return "\n".join(ast.unparse(statement) for statement in function.body)


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return x.", "Return x."),
        ("Return x. And more.", "Return x."),
        ("Return the\n    value of x.\n\n    More.", "Return the value of x."),
        ("Arguments are:\n\n  x", "Arguments are"),
    ],
)
def test_first_sentence(docstring, summary):
    assert stdlib_corpus.first_sentence(docstring) == summary


def test_functions_lose_docstring_and_indentation():
    source = (
        "class A:\n"
        "    @staticmethod\n"
        "    def f(x):\n"
        '        """Double x.\n\n        More."""\n'
        "        # comment\n"
        "        return 2 * x\n\n"
        "    def only(self):\n"
        '        """Nothing but this."""\n'
    )
    (function,) = stdlib_corpus.functions(source, "m")
    assert function.source == "@staticmethod\ndef f(x):\n    # comment\n    return 2 * x\n"
    assert (function.name, function.body, function.summary) == ("f", "return 2 * x", "Double x.")


def test_tables_are_cut():
    table = "".join(f"    {i},\n" for i in range(100))
    cut = stdlib_corpus.cut_tables(f"x = [\n{table}]\n")
    assert cut.count("\n") == stdlib_corpus.MAX_TABLE_LINES + 2
    assert cut.startswith("x = [\n    0,\n") and cut.endswith("]\n")
