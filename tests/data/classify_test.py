"""Rows to classify: what the tokenizer is given, which labels there are, what is refused, and the batches."""

import json

import numpy as np
import pytest
import tokenizers
import transformers

from jaxpeft import data
from jaxpeft.data.classify import VALUE, Labels
from jaxpeft.errors import InputError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]


@pytest.fixture(scope="module")
def bert_tokenizer():
    """Words of letters, joined as BERT joins a pair, with its token types."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path, tokenizer, *rows, seq_len=16, labels=None, **options):
    return data.load_rows(write(path / "rows.jsonl", *rows), tokenizer, seq_len, labels, **options)


PAIR = {"text": "a b", "text2": "c", "label": 1, "label_name": "no"}
SINGLE = {"text": "d", "label": 0, "label_name": "yes"}


def test_rows_are_what_the_tokenizer_makes_of_a_pair(bert_tokenizer, tmp_path):
    rows, labels, report = load(tmp_path, bert_tokenizer, PAIR, SINGLE, {**PAIR, "text2": "", "label": 1})
    cls, sep, (a, b, c, d) = 2, 3, (WORDS.index(w) for w in "abcd")
    assert [row.ids.tolist() for row in rows] == [[cls, a, b, sep, c, sep], [cls, d, sep], [cls, a, b, sep]]
    assert [row.token_types.tolist() for row in rows] == [[0, 0, 0, 0, 1, 1], [0, 0, 0], [0, 0, 0, 0]]
    assert [(row.label, row.line) for row in rows] == [(1, 1), (0, 2), (1, 3)]
    assert labels == Labels(("yes", "no"), (0, 1))
    assert (report.lines, report.examples, report.labels, report.positions) == (3, 3, 2, 13)
    assert "3 examples (2 text, 1 text, text2) with 13 tokens, 2 labels" in report.summary()


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (("1", "0"), Labels(("0", "1"), (0, 1))),
        (("yes", "no"), Labels(("no", "yes"))),
        (("3", "2.5"), Labels((VALUE,))),
    ],
)
def test_cells_of_csv_are_labels(bert_tokenizer, tmp_path, labels, found):
    file = tmp_path / "rows.csv"
    file.write_text("label,text,text2\n" + "".join(f"{label},a b,\n" for label in labels) + "\n")
    rows, known, report = data.load_rows(file, bert_tokenizer, 16)
    assert (known, len(rows), report.lines, report.formats) == (found, 2, 2, {"text": 2})
    file.write_text("label,text\n0,a\n1,b\n,c\n")
    with pytest.raises(InputError, match=r"rows\.csv:4: fields must be text, \[text2,\] label or label_name; .*: text"):
        data.load_rows(file, bert_tokenizer, 16)


def test_a_tokenizer_that_joins_without_a_mark_gets_a_line_break(chat_tokenizer, llama_tokenizer, tmp_path):
    rows, _, _ = load(tmp_path, chat_tokenizer, {"text": "one", "text2": "two", "label": 0}, {"text": "x", "label": 1})
    assert chat_tokenizer.decode(rows[0].ids) == "one\ntwo"
    rows, _, _ = load(tmp_path, llama_tokenizer, {"text": "one", "text2": "two", "label": 0}, {"text": "x", "label": 1})
    assert rows[0].ids.tolist().count(llama_tokenizer.bos_token_id) == 2  # its own mark


def test_the_longer_part_is_cut(bert_tokenizer, tmp_path):
    long = {**PAIR, "text": "a b c d e f", "text2": "g h"}
    rows, _, report = load(tmp_path, bert_tokenizer, long, SINGLE, seq_len=8)
    assert [WORDS[i] for i in rows[0].ids] == ["[CLS]", "a", "b", "c", "[SEP]", "g", "h", "[SEP]"]
    assert (report.truncated, report.dropped_too_long) == (1, 0)
    rows, _, report = load(tmp_path, bert_tokenizer, long, SINGLE, PAIR, seq_len=8, too_long="drop")
    assert [row.line for row in rows] == [2, 3]
    assert (report.truncated, report.dropped_too_long, report.examples) == (0, 1, 2)
    with pytest.raises(InputError, match="--seq-len 3: leaves no room for text beside 3 special tokens"):
        load(tmp_path, bert_tokenizer, PAIR, SINGLE, seq_len=3)


@pytest.mark.parametrize(
    ("given", "names", "indices"),
    [
        ([{"label": 7}, {"label": 2}, {"label": 7}], ("2", "7"), [1, 0, 1]),
        ([{"label": "pos"}, {"label": "neg"}], ("neg", "pos"), [1, 0]),
        ([{"label_name": "z"}, {"label_name": "y"}], ("y", "z"), [1, 0]),
        ([{"label": 3, "label_name": "a"}, {"label": 1, "label_name": "b"}], ("b", "a"), [1, 0]),
        ([{"label": "x", "label_name": "a"}, {"label": "y", "label_name": "b"}], ("a", "b"), [0, 1]),
        ([{"label": 0.5}, {"label": 2}], (VALUE,), [0.5, 2.0]),
        ([{"label": 1.0, "label_name": "p"}, {"label": 0.0, "label_name": "n"}], ("n", "p"), [1, 0]),
    ],
)
def test_labels_and_their_order(bert_tokenizer, tmp_path, given, names, indices):
    rows, labels, _ = load(tmp_path, bert_tokenizer, *({"text": "a", **label} for label in given))
    assert labels.names == names
    assert [row.label for row in rows] == indices
    assert {type(row.label) for row in rows} == {float if labels.regression else int}


def test_a_checkpoints_own_order_and_other_files(bert_tokenizer, tmp_path):
    rows, labels, _ = load(tmp_path, bert_tokenizer, PAIR, SINGLE, order=("no", "yes"))
    assert labels == Labels(("no", "yes"), (1, 0))
    assert [row.label for row in rows] == [0, 1]
    assert load(tmp_path, bert_tokenizer, PAIR, SINGLE, order=("no", "maybe"))[1].names == ("yes", "no")
    # By its name, whatever its number; by its number where it has no name.
    others = [{"text": "a", "label": 0, "label_name": "no"}, {"text": "a", "label": 1}, {"text": "a", "label": "yes"}]
    rows, same, _ = load(tmp_path, bert_tokenizer, *others, labels=labels)
    assert [row.label for row in rows] == [0, 0, 1]
    assert same is labels


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"rows.jsonl:3: not JSON"),
        ({"text": "a"}, r"rows.jsonl:3: fields must be text, \[text2,\] label or label_name; this line has: text"),
        ({"label": 1}, r":3: fields must be text"),
        ({"text": "a", "label": True}, r":3: field label must be a number or a name, found boolean"),
        ({"text": "a", "label": [1]}, r":3: field label must be a number or a name, found array"),
        ('{"text": "a", "label": NaN}', r":3: field label must be a number or a name, found nan"),
        ({"text": 5, "label": 1}, r":3: field text must be a string, found number"),
        ({"text": "a", "text2": 5, "label": 1}, r":3: field text2 must be a string"),
        (
            {"text": "a", "label": 2, "label_name": "yes"},
            r":3: label 2 with the name .yes.; line 2 has it with label",
        ),
        ({"text": "a", "label": 0, "label_name": "ja"}, r":3: label 0 with the name 'ja'; 'yes' has it before"),
    ],
)
def test_a_faulty_line_is_named_or_counted(bert_tokenizer, tmp_path, row, message):
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path, bert_tokenizer, PAIR, SINGLE, row)
    assert "\n" not in str(error.value)
    rows, _, report = load(tmp_path, bert_tokenizer, PAIR, SINGLE, row, skip_bad_lines=True)
    assert (len(rows), report.bad_lines, report.first_bad_line) == (2, 1, str(error.value))


def test_unknown_labels_and_too_few(bert_tokenizer, tmp_path):
    labels = Labels(("no", "yes"))
    with pytest.raises(InputError, match="rows.jsonl:2: label 'maybe' is not one of those trained on: no, yes"):
        load(tmp_path, bert_tokenizer, PAIR, {"text": "a", "label": "maybe"}, labels=labels)
    with pytest.raises(InputError, match=":1: label 'no' should be a number, like those trained on"):
        load(tmp_path, bert_tokenizer, {"text": "a", "label": "no"}, labels=Labels((VALUE,)))
    with pytest.raises(InputError, match="at least two labels to be told apart by; all have the label 'yes'"):
        load(tmp_path, bert_tokenizer, SINGLE, SINGLE)
    with pytest.raises(InputError, match="no row left of 1 lines: 1 bad"):
        load(tmp_path, bert_tokenizer, {"text": "a", "label": "maybe"}, labels=labels, skip_bad_lines=True)


def batches_of(tokenizer, path, labels=(0, 1, 2), count=23, **options):
    rows = [{"text": " ".join("abcdefghij"[: i % 7 + 1]), "label": labels[i % len(labels)]} for i in range(count)]
    rows, _, _ = load(path, tokenizer, *rows)
    return rows, lambda: data.make_batches(rows, 4, 16, 5, collate=data.collate_rows, **options)


@pytest.mark.parametrize("options", [{"epochs": 1}, {"epochs": 1, "buckets": (4, 8)}])
def test_batches_hold_every_row_once(bert_tokenizer, tmp_path, options):
    rows, make = batches_of(bert_tokenizer, tmp_path, **options)
    seen = []
    for batch, lines in make():
        width = batch["tokens"].shape[1]
        assert {name: batch[name].shape for name in ("positions", "segment_ids", "token_types")} == dict.fromkeys(
            ("positions", "segment_ids", "token_types"), (4, width)
        )
        assert (batch["labels"].dtype, batch["weights"].dtype) == (np.int32, np.float32)
        for r, line in enumerate(lines):
            row = rows[line[0] - 1]
            n = row.positions
            assert batch["tokens"][r, :n].tolist() == row.ids.tolist() and not batch["tokens"][r, n:].any()
            assert batch["segment_ids"][r].tolist() == [1] * n + [0] * (width - n)
            assert batch["positions"][r, :n].tolist() == list(range(n))
            assert (batch["labels"][r], batch["weights"][r]) == (row.label, 1)
            seen.append(row.line)
        empty = slice(len(lines), None)
        assert not batch["weights"][empty].any() and not batch["segment_ids"][empty].any()
    assert sorted(seen) == list(range(1, 24))


def test_batches_resume_and_know_their_labels(bert_tokenizer, tmp_path):
    _, make = batches_of(bert_tokenizer, tmp_path)
    through = make()
    for _ in range(9):
        next(through)
    state = through.get_state()
    expected = [next(through) for _ in range(3)]
    again = make()
    again.set_state(json.loads(json.dumps(state)))
    for (batch, lines), (other, other_lines) in zip(expected, (next(again) for _ in range(3)), strict=True):
        assert lines == other_lines
        assert all(np.array_equal(batch[name], other[name]) for name in batch)
    _, relabelled = batches_of(bert_tokenizer, tmp_path, labels=(0, 2, 1))
    with pytest.raises(InputError, match="other data"):
        relabelled().set_state(state)


def test_a_regressions_labels_are_float32(bert_tokenizer, tmp_path):
    _, make = batches_of(bert_tokenizer, tmp_path, labels=(0.5, 1, 2.25))
    assert next(make())[0]["labels"].dtype == np.float32


def test_the_shipped_files(shared_data):
    """Their columns are read whole; labels have their numbers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "checkpoints" / "stories260K")
    folder = shared_data / "classify"
    for name, count, rows in (("qnli", 2, 1192), ("mnli", 3, 2000)):
        found, labels, report = data.load_rows(folder / f"{name}.test.jsonl", tokenizer, 64)
        assert (len(found), len(labels.names), report.labels) == (rows, count, count)
        first = json.loads((folder / f"{name}.test.jsonl").read_text().splitlines()[0])
        assert found[0].label == first["label"] and labels.names[first["label"]] == first["label_name"]
