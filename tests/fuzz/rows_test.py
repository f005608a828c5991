"""Files of rows and of prompts in every form, and chat templates, damaged or hostile."""

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from jaxpeft import data, hf, limits, template
from jaxpeft.cli.prompts import read_prompts
from tests import runs
from tests.fuzz.damage import ODD, amounts, broken, documents, holds, untouched

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab?"}]
SAID = {"role": "assistant", "content": [{"type": "text", "text": "ab"}], "tool_calls": [CALL]}
ROWS = (
    {"prompt": "1+1=", "completion": "2"},
    {"text": "ab ab", "label": 1, "label_name": "one", "text2": "b"},
    {"instruction": "add", "input": "1 1", "output": "2"},
    {"messages": [*TURNS, SAID], "tools": [CALL]},
    {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "b"}]},
    {"prompt": TURNS, "completion": [SAID]},
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = hf.load_tokenizer(runs.make_files(tmp_path_factory.mktemp("files")) / "model")
    made.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}</s>{% endfor %}"
    return made


def tables():
    """Rows as a table, in bytes by the ending of the file."""
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(20)]
    table = pa.Table.from_pylist(rows)
    parquet, arrow = pa.BufferOutputStream(), pa.BufferOutputStream()
    pa.parquet.write_table(table, parquet)
    with pa.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    csv = b"prompt,completion\n" + b"".join(f'"{row["prompt"]}",{row["completion"]}\n'.encode() for row in rows)
    return {
        ".jsonl": lines,
        ".json": json.dumps(rows).encode(),
        ".csv": csv,
        ".tsv": csv.replace(b",", b"\t"),
        ".jsonl.gz": gzip.compress(lines, mtime=0),
        ".parquet": parquet.getvalue().to_pybytes(),
        ".arrow": arrow.getvalue().to_pybytes(),
    }


TABLES = tables()


def read_all(file, tokenizer):
    """A file of rows, read for every task."""
    for skip in (False, True):
        data.load_examples(file, tokenizer, 64, skip_bad_lines=skip, cache=False)
    data.load_rows(file, tokenizer, 64)
    read_prompts(file)


@amounts
@pytest.mark.parametrize("row", ROWS, ids=["completion", "text", "instruction", "messages", "conversations", "turns"])
def test_a_row(row, amount, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"

    def read(line):
        file.write_bytes(line + b"\n" + json.dumps(row).encode() + b"\n")
        with untouched(tmp_path):
            read_all(file, tokenizer)

    holds(documents(row, (*ODD, "assistant", "user", {"type": "image"}, [{"type": "text"}])), amount, read)


@amounts
@pytest.mark.parametrize("ending", TABLES)
def test_a_file(ending, amount, tokenizer, tmp_path):
    file = tmp_path / f"rows{ending}"

    def read(content):
        file.write_bytes(content)
        with untouched(tmp_path):
            read_all(file, tokenizer)

    holds(broken(TABLES[ending]), amount, read)


PARTS = (
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{{ messages[0].content * 10 ** 9 }}",
    "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}x{% endfor %}{% endfor %}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 1 / 0 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'a' | center(10 ** 12) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ messages | tojson }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ nothing.of.it }}",
    "{{ messages[99].content }}",
    "{{ [1, 2] | sum * 'x' }}",
    "{% if add_generation_prompt %}A{% endif %}",
    "{% generation %}x{% endgeneration %}",
    "{%",
    "}}",
)


@amounts
def test_a_chat_template(amount, tokenizer, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.3)
    monkeypatch.setattr(limits, "MOST_BYTES", 2**28)
    monkeypatch.setattr(sys, "unraisablehook", lambda what: None)  # the deadline may fall into a `__del__`, and again
    made = template.Template("chat", "2026-03-01")
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b"}]

    def read(source):
        tokenizer.chat_template = source
        template.prompt_ids(turns[:1], tokenizer, made)
        template.render_marked(turns, tokenizer, made)

    holds(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join), amount, read)
