"""Files that mean harm: every command ends with status 2 and one line."""

import json
import re
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import hf, limits, patterns, template
from jaxpeft.cli import _plain_warnings, main
from jaxpeft.data import jsonl
from jaxpeft.errors import Notice
from jaxpeft.peft import export_adapter
from tests import runs
from tests.conftest import REPOSITORY

LOOP = "{% for i in range(100000) %}"
TEMPLATES = {
    "loops": (LOOP * 3 + "{{ messages }}" + "{% endfor %}" * 3, "has not written them after 0.3 s"),
    "calls itself": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(messages) }}", "maximum recursion depth exceeded"),
    "divides": ("{{ messages|length // 0 }}", "integer division or modulo by zero"),
    "multiplies": ("{{ 'a' * (messages|length * 10 ** 11) }}", "needs more memory than a template gets"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """FOLDER/model, FOLDER/train.jsonl, FOLDER/chats.jsonl, FOLDER/adapter of PEFT's LoRA."""
    folder = runs.make_files(tmp_path_factory.mktemp("files"))
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    method = jp.lora(rank=2, targets="all-linear")
    model, params = hf.load_pretrained(folder / "model")
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    trained = {path: leaf + 0.1 for path, leaf in trainable.items()}
    export_adapter(folder / "adapter", jp.combine(trained, frozen), method, model.config)
    (folder / "adapter" / "jaxpeft.json").unlink()
    return folder


def line_of(capsys, command):
    assert main([str(word) for word in command]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and len(told) < 1600
    return told


@pytest.mark.parametrize("command", ["import", "generate", "merge"])
def test_an_adapter_with_an_endless_pattern(files, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    adapter = shutil.copytree(files / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"(?:\w|\w\w|\w\w\w|\.|.)+[XZ]": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    more = ["--prompt", "a"] if command == "generate" else ["--out", tmp_path / "out"]
    told = line_of(capsys, [command, "--adapter", adapter, "--model", files / "model", *more])
    assert "alpha_pattern" in told and "takes longer than 0.05 s" in told


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_means_harm(files, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(template, "SECONDS", 0.3)
    monkeypatch.setattr(limits, "MOST_BYTES", 2**28)
    source, says = TEMPLATES[name]
    model = shutil.copytree(files / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text(source)
    assert says in line_of(capsys, ["generate", "--model", model, "--prompt", "a", "--chat"])
    train = ["train", "--model", model, "--data", files / "chats.jsonl", "--out", tmp_path / "out", "--seq-len", 16]
    told = line_of(capsys, train)
    assert says in told and "chats.jsonl:1: the chat template refuses the messages" in told


def test_a_line_of_20_mib(files, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"text": "' + b"a" * (20 * 2**20) + b'"}\n')
    train = ["train", "--model", files / "model", "--data", rows, "--out", tmp_path / "out"]
    assert f"{rows}:2: longer than 8 MiB" in line_of(capsys, train)


def test_prompts_that_are_too_long(files, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"a\n" + b"a" * (20 * 2**20))
    generate = ["generate", "--model", files / "model"]
    assert f"{prompts}:2: longer than 8 MiB" in line_of(capsys, [*generate, "--prompts", prompts])
    assert "prompt 0 has 100000 tokens" in line_of(capsys, [*generate, "--prompt", "a" * 100_000])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["plan", "--budget", "9" * 400 + "GiB"], '--budget "999.*... is above 4 EiB'),
        (["train", "--steps", "9" * 400], "--steps 999.*... must be at most 2147483647"),
        (["train", "--steps", "9" * 5000], "--steps.*4300 digits"),
        (["train", "--seed", str(2**64)], "--seed 18446744073709551616: must be from 0 to 4294967295"),
        (["train", "--rank", str(10**30)], "rank 1000000000000000000000000000000"),
        (["train", "--lr", "1e999"], "--lr inf: must be a finite number"),
        (["train", "--targets", "a{99999999999}"], "targets 'a.99999999999.': not a regular expression"),
        (["train", "--targets", "(" * 5000], "not a regular expression"),
        (["train", "--config", "/dev/zero"], "--config /dev/zero: has more than 1048576 bytes"),
        (["train", "--data", "/dev/zero"], "/dev/zero:1: longer than"),
        (["train", "--method-options", "rank=" + "[" * 5000], "is nested more than 50 deep"),
        (["train", "--out", "a/" * 2500], "has 50.. bytes; at most"),
        (["train", "--model", "a/" * 2500], "File name too long"),
        (["generate", "--prompt", "a", "--model", "a/" * 2500], "File name too long"),
        (["generate", "--prompt", "a", "--adapter", "x" * 5000], "no such directory|File name too long"),
        (["plan", "--model", "x" * 5000], "is no built-in geometry"),
        (["generate", "--prompt", "ab\udcff"], 'the argument "ab.udcff" is not UTF-8'),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x)[:30],
)
def test_arguments_out_of_all_proportion(command, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jsonl, "MOST_PASSED", 2**24)
    assert re.search(said, line_of(capsys, command))
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_makes_no_numbers(files, tmp_path, capsys):
    adapter = shutil.copytree(files / "adapter", tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    save_file({name: x + np.float32(1e30) for name, x in load_file(weights).items()}, weights)
    merge = ["merge", "--model", files / "model", "--adapter", adapter, "--out", tmp_path / "out"]
    assert "makes layers/mlp/down_proj/kernel infinite or no number" in line_of(capsys, merge)
    assert not (tmp_path / "out").exists()


def test_values_of_another_type_are_said_in_our_words(capsys):
    assert '--lr "fast": must be a number or None' in line_of(capsys, ["train", "--lr", "fast"])
    assert '--rank "4.5": must be a whole number or None' in line_of(capsys, ["train", "--rank", "4.5"])


def test_a_notice_is_one_line_that_moves_no_cursor():
    with _plain_warnings():
        line = warnings.formatwarning(Notice("evil\x1b[2J\nname"), Notice, "file.py", 1)
    assert line == "jaxpeft: evil\\x1b[2J name\n"


def test_a_closed_stderr_takes_no_status_away():
    command = f"{sys.executable} -m jaxpeft methodz 2>&-"
    assert subprocess.run(command, shell=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL).returncode == 2


@pytest.mark.slow
def test_a_reader_that_has_seen_enough():
    command = f"{sys.executable} -m jaxpeft plan --model tinyllama-1.1b --method lora,lst --batch-size 1 --seq-len 8"
    with subprocess.Popen(
        [*command.split()], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as plan:
        plan.stdout.close()
    assert plan.returncode == 128 + signal.SIGPIPE
