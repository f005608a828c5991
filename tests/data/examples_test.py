"""Files to examples: every line is an example or is accounted for."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from jaxpeft.data import Report, load_examples
from jaxpeft.errors import InputError
from jaxpeft.template import choose

GOOD = [
    {"prompt": "one plus one is", "completion": "two"},
    {"text": "Once upon a time there was a little dog."},
    {"instruction": "Say it.", "output": "It."},
]
BAD = [
    b"{not json}",
    b"",
    b"[]",
    b'{"text": "\xff"}',
    b'{"question": "q"}',
    b'{"text": 7}',
]


def write(path: Path, rows: list[Any]) -> Path:
    """Writes rows: bytes as they are, anything else as JSON."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def balanced(report: Report) -> bool:
    parts = (report.bad_lines, report.dropped_too_long, report.dropped_without_target)
    return report.lines + report.split == report.examples + sum(parts)


@pytest.mark.parametrize("name", ["e2e_nlg.train", "dolly.test", "dolly.train"])
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_real_files_are_accounted_for(
    shared_data: Path, llama_tokenizer: PreTrainedTokenizerBase, name: str, too_long: Any
) -> None:
    file = shared_data / "instruct" / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    examples, report = load_examples(file, llama_tokenizer, 256, too_long=too_long)
    assert report.lines == len(rows)
    assert report.formats == {"instruction/input/output": len(rows)}
    assert balanced(report)
    assert report.truncated + report.dropped_too_long + report.dropped_without_target > 0
    assert (report.truncated == 0) == (too_long == "drop")
    assert report.positions == sum(len(example.ids) - 1 for example in examples)
    eos = llama_tokenizer.eos_token_id
    for example in examples:
        assert len(example.ids) <= 257
        assert example.completion[1:].any()
        output = rows[example.line - 1]["output"]
        trained = example.ids[example.completion]
        if trained[-1] == eos:
            assert llama_tokenizer.decode(trained[:-1]).lstrip(" ") == output.lstrip(" ")
        else:  # cut
            assert len(example.ids) == 257
    assert sum(example.ids[-1] != eos for example in examples) == report.truncated


def test_mixed_shapes_keep_their_order(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "rows.jsonl", GOOD)
    examples, report = load_examples(file, llama_tokenizer, 64)
    assert [example.line for example in examples] == [1, 2, 3]
    assert report.formats == {"prompt/completion": 1, "text": 1, "instruction/input/output": 1}
    decoded = [llama_tokenizer.decode(e.ids[e.completion][:-1]) for e in examples]
    assert decoded == ["two", GOOD[1]["text"], "It."]
    assert report.target_tokens == sum(int(example.completion[1:].sum()) for example in examples)


def test_text_trains_on_every_token(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "rows.jsonl", [GOOD[1]])
    (example,), report = load_examples(file, llama_tokenizer, 64)
    assert example.ids[0] == llama_tokenizer.bos_token_id
    assert example.completion[1:].all()
    assert report.target_tokens == report.positions == len(example.ids) - 1


def test_messages_and_texts_in_one_file(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    file = write(tmp_path / "rows.jsonl", [{"messages": chat}, GOOD[0], {"messages": chat}])
    examples, report = load_examples(file, chat_tokenizer, 64)
    decoded = [chat_tokenizer.decode(e.ids[e.completion]) for e in examples]
    assert decoded == ["hello<|im_end|>\n", "two<|im_end|>", "hello<|im_end|>\n"]
    assert report.formats == {"messages": 2, "prompt/completion": 1}


def test_instructions_go_through_the_chat_template(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "category": "sums"}
    file = write(tmp_path / "rows.jsonl", [row])
    for choice, expected in [
        ("auto", "<|im_start|>user\nAdd.\n\n1 1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"),
        ("alpaca", "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2<|im_end|>"),
    ]:
        (example,), report = load_examples(file, chat_tokenizer, 64, template=choose(choice, chat_tokenizer))
        assert chat_tokenizer.decode(example.ids) == expected
        assert chat_tokenizer.decode(example.ids[example.completion]).strip() == "2<|im_end|>"
        assert report.ignored == {"category": 1} and "ignored fields: category" in report.summary()


def test_a_conversation_may_make_several_examples_or_none(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    last = "{{ '!' if loop.last and not add_generation_prompt }}"
    chat_tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m.content }}}}{last}\n{{% endfor %}}"
    said = {"role": "assistant", "content": "hello"}
    file = write(tmp_path / "rows.jsonl", [{"messages": [said, said]}, {"messages": [{**said, "weight": 0}]}])
    examples, report = load_examples(file, chat_tokenizer, 64)
    assert [chat_tokenizer.decode(e.ids) for e in examples] == ["hello!\n", "hello\nhello!\n"]
    assert (report.split, report.dropped_without_target) == (1, 1) and balanced(report)


def test_marked_template(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
        "{% endfor %}"
    )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    file = write(tmp_path / "rows.jsonl", [{"messages": chat}])
    (example,), _ = load_examples(file, chat_tokenizer, 64)
    assert chat_tokenizer.decode(example.ids[example.completion]) == "hello<|im_end|>"


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_stops_with_its_place(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase, bad: bytes) -> None:
    file = write(tmp_path / "rows.jsonl", [GOOD[0], bad, GOOD[1]])
    with pytest.raises(InputError) as caught:
        load_examples(file, llama_tokenizer, 64)
    assert str(caught.value).startswith(f"{file}:2: ")


def test_bad_lines_are_skipped_and_counted(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "rows.jsonl", [GOOD[0], *BAD, GOOD[1]])
    examples, report = load_examples(file, llama_tokenizer, 64, skip_bad_lines=True)
    assert [example.line for example in examples] == [1, len(BAD) + 2]
    assert report.bad_lines == len(BAD)
    assert report.first_bad_line.startswith(f"{file}:2: not JSON")
    assert balanced(report)
    assert f"{len(BAD)} bad lines skipped" in report.summary()
    assert json.loads(json.dumps(report.to_json()))["bad_lines"] == len(BAD)


def test_messages_without_a_chat_template(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    file = write(tmp_path / "rows.jsonl", [GOOD[0], {"messages": chat}])
    # The tokenizer lacks something, not the line: it is not skipped.
    for skip_bad_lines in (False, True):
        with pytest.raises(InputError, match=r":2: .*chat_template\.jinja.*prompt, completion"):
            load_examples(file, llama_tokenizer, 64, skip_bad_lines=skip_bad_lines)


def test_conversation_that_the_template_refuses_is_a_bad_line(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    chat = [{"role": "assistant", "content": "hello"}]
    refused = [{"role": "system", "content": "s"}, *chat]
    file = write(tmp_path / "rows.jsonl", [{"messages": refused}, {"messages": chat}])
    with pytest.raises(InputError, match=r":1: .*no system"):
        load_examples(file, chat_tokenizer, 64)
    examples, report = load_examples(file, chat_tokenizer, 64, skip_bad_lines=True)
    assert ([example.line for example in examples], report.bad_lines) == ([2], 1)


def test_longer_than_the_sequence_length(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    long_prompt = {"prompt": "word " * 100, "completion": "lost"}
    long_completion = {"prompt": "go", "completion": "word " * 100}
    file = write(tmp_path / "rows.jsonl", [long_prompt, long_completion, GOOD[0]])
    examples, report = load_examples(file, llama_tokenizer, 20)
    # A completion that is cut off whole is not trained with zero weight.
    assert [example.line for example in examples] == [2, 3]
    assert (report.truncated, report.dropped_without_target) == (1, 1)
    assert len(examples[0].ids) == 21
    assert "1 truncated" in report.summary()
    examples, report = load_examples(file, llama_tokenizer, 20, too_long="drop")
    assert [example.line for example in examples] == [3]
    assert (report.truncated, report.dropped_too_long) == (0, 2)
    assert "2 too long and dropped" in report.summary()


def test_exactly_the_sequence_length_is_whole(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "rows.jsonl", [GOOD[1]])
    (example,), _ = load_examples(file, llama_tokenizer, 64)
    positions = len(example.ids) - 1
    _, report = load_examples(file, llama_tokenizer, positions)
    assert report.truncated == 0
    _, report = load_examples(file, llama_tokenizer, positions - 1)
    assert report.truncated == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no example left of 0 lines"),
        ([b"{not json}"], "no example left of 1 lines: 1 bad.*first bad line: .*:1: not JSON"),
        ([{"prompt": "word " * 100, "completion": "lost"}], "1 with nothing to train on"),
    ],
)
def test_no_example_left(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase, rows: list[Any], says: str) -> None:
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=says):
        load_examples(file, llama_tokenizer, 20, skip_bad_lines=True)


def test_no_such_file(tmp_path: Path, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_examples(tmp_path / "absent.jsonl", llama_tokenizer, 20)
