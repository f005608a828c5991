"""The command line's frame: help, mistakes, exit statuses, JSON and the YAML file."""

import dataclasses
import errno
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jaxpeft import cli
from jaxpeft.cli import output
from jaxpeft.cli.train import Train
from jaxpeft.errors import InputError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Echo:
    """Say a word."""

    word: str = "hello"
    """What to say."""
    json: bool = False
    """One JSON document."""


@pytest.fixture
def echo(monkeypatch):
    """A command `echo` whose run can be replaced: echo.run = ..."""
    module = types.ModuleType("jaxpeft.cli.echo")
    module.Echo = Echo
    module.run = lambda args: {"word": args.word}
    module.show = lambda document: print(document["word"])
    monkeypatch.setitem(sys.modules, "jaxpeft.cli.echo", module)
    monkeypatch.setitem(cli.COMMANDS, "echo", ("echo:Echo", "say a word"))
    return module


def one_line(capsys) -> str:
    """The one line on stderr; nothing may be on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxpeft: error: ") and err.count("\n") == 1
    return err


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    with_flag = capsys.readouterr().out
    assert cli.main([]) == 0
    assert capsys.readouterr().out == with_flag
    for name, (_, summary) in cli.COMMANDS.items():
        assert name in with_flag and summary in with_flag


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_that_explains_each_flag(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["train", "--batch-sise", "3"]])
def test_help_and_mistakes_do_not_wait_for_jax(argv):
    """Also holds jaxpeft/__init__.py to imports on demand."""
    code = (
        "import sys; from jaxpeft.cli import main; main(sys.argv[1:]); "
        "sys.exit(str([m for m in ('jax', 'flax', 'torch', 'transformers') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian", "--steps", "3"]) == 2
    assert "unknown command 'trian'; did you mean train?" in one_line(capsys)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["profile", "--clip", "None"], "profile: unknown flag --clip; did you mean"),
        (["export", "A", "B"], "export: needs --run, --out\n"),
        (["export", "--run", "A"], "export: needs --out\n"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x),
)
def test_what_is_strange_or_lacking_is_named(words, line, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith(f"jaxpeft: error: {line}")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--batch-sise", "3"], ["--batch-sise", "did you mean --batch-size?"]),
        (["--zzz=3"], ["unknown flag --zzz", "known: --accumulate"]),
        (["stray"], ["'stray'"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--steps", "1.5"], ["--steps", "'1.5'"]),
        (["--steps"], ["--steps"]),
        (["--schedule", "stairs"], ["--schedule", '"stairs": must be one of constant, linear, cosine']),
    ],
)
def test_a_mistaken_flag_is_one_line(flags, parts, capsys):
    assert cli.main(["train", *flags]) == 2
    line = one_line(capsys)
    for part in parts:
        assert part in line


def test_input_error_is_one_line_and_status_2(echo, capsys):
    def fail(args):
        raise InputError("data.jsonl, line 3:\n  not JSON")

    echo.run = fail
    assert cli.main(["echo", "--json"]) == 2
    assert one_line(capsys) == "jaxpeft: error: data.jsonl, line 3: not JSON\n"


def test_a_reader_that_has_seen_enough_is_no_bug():
    command = [sys.executable, "-m", "jaxpeft", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_bug_keeps_its_traceback(echo):
    def fail(args):
        raise ZeroDivisionError("bug")

    echo.run = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["echo"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), "/ro/x: Read-only file system"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"gone"), "gone: No such file or directory"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), "n" * 60 + "...: File name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "temporary directory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(echo, capsys, error, line):
    def fail(args):
        raise error

    echo.run = fail
    assert cli.main(["echo"]) == 2
    assert line in one_line(capsys)


def test_interrupt_is_130(echo, capsys):
    def fail(args):
        raise KeyboardInterrupt

    echo.run = fail
    assert cli.main(["echo"]) == 130
    assert "interrupted" in one_line(capsys)


def test_json_is_alone_on_stdout(echo, capsys):
    def run(args):
        print("a library's chatter")
        return {"loss": math.nan, "path": Path("a"), "n": np.int32(3), "pair": (1, np.float32(0.5))}

    echo.run = run
    assert cli.main(["echo", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "path": "a", "n": 3, "pair": [1, 0.5]}
    assert err == "a library's chatter\n"


def test_without_json_the_command_shows_its_document(echo, capsys):
    assert cli.main(["echo", "--word", "ho"]) == 0
    assert capsys.readouterr().out == "ho\n"


def test_jsonable_refuses_what_has_no_json_form():
    with pytest.raises(TypeError, match="object"):
        output.jsonable({"a": object()})


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("lorra", ["lora", "full"], "; did you mean lora?"),
        ("zzz", ["lora", "full"], "; known: full, lora"),
        ("zzz", [], ""),
    ],
)
def test_did_you_mean(name, known, expected):
    assert did_you_mean(name, known) == expected


def test_config_file_gives_flags_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "lr: 1e-4\nbatch-size: 4\nseq_len: 64\npack: false\nbuckets: [16, 32]\nclip: null\n"
        "skip-bad-lines: true\nresume: false\n"
        "method-options: {dropout: 0.1, init: pissa, ranks: {q_proj: 4}}\n"
    )
    flags = ["--config", str(path), "--batch-size=2", "--no-skip-bad-lines", "--buckets", "8"]
    assert cli.parse(Train, "train", flags) == Train(
        lr=1e-4,
        batch_size=2,
        seq_len=64,
        pack=False,
        buckets=(8,),
        clip=None,
        method_options=("dropout=0.1", "init=pissa", "ranks={q_proj: 4}"),
        config=path,
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch-sise: 3", ["unknown key 'batch-sise'", "did you mean batch-size?"]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("steps: many", ["--steps", "'many'"]),
        ("steps: null", ["--steps", "'None'"]),
        ("lr: [1, 2]", ["lr: [1, 2] must be a number or None"]),
        ("rank: true", ["rank: true must be a whole number or None"]),
        ("method: [mezo]", ['method: ["mezo"] must be text']),
        ("targets: []", ["targets: [] must be a list of names, or text or None"]),
        ("targets: [q_proj, 3]", ['targets: ["q_proj", 3] must be a list of names, or text or None']),
        ("pack: 'yes'", ['pack: "yes" must be true or false']),
        ("optimizer-memory: disk", ['--optimizer-memory "disk": must be one of device, host']),
        ("batch_size: 1\nbatch-size: 2", ["given twice"]),
        ("rank: 4\nlr: 1\nrank: 5", ["the mapping that begins in line 1 has 'rank' twice"]),
        ("- 3", ["mapping"]),
        ("a: [", ["is not YAML"]),
    ],
)
def test_a_mistake_in_the_config_file_is_one_line_that_names_it(text, parts, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert cli.main(["train", "--config", str(path)]) == 2
    line = one_line(capsys)
    for part in [f"--config {path}", *parts]:
        assert part in line


def test_missing_or_binary_config_file(tmp_path, capsys):
    assert cli.main(["train", "--config", str(tmp_path / "no.yaml")]) == 2
    assert "No such file" in one_line(capsys)
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "UTF-8" in one_line(capsys)


def test_an_empty_config_file_changes_nothing(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# nothing yet\n")
    assert cli.parse(Train, "train", ["--config", str(path)]) == Train(config=path)
