"""Folders that can be made, and those that cannot: one line, and nothing left behind, after a kill neither."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpeft import cli, files, gguf, hf
from jaxpeft.errors import InputError
from jaxpeft.train import config

LONG = "n" * 300
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (LONG, "a name in it has 300 bytes; at most 255 here"),
        (f"{LONG}/run", "a name in it has 300 bytes"),
        ("ü" * 130, "a name in it has 260 bytes"),
        ("/".join(["n" * 200] * 30), r"has \d+ bytes; at most 3584 here, to leave room for what is in it"),
        ("file/run", "file is no folder"),
        ("dangling", "dangling is no folder"),
        ("zero\0byte", "holds a zero byte"),
        ("/proc/run", "/proc/run: cannot be made: /proc: "),
    ],
)
@pytest.mark.parametrize("check", [files.check_creatable, files.check_target, config.check_new])
def test_a_folder_that_cannot_be_made_is_refused_beforehand(path, reason, check, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    if check is files.check_target and path == "dangling":
        reason = "is a file"
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=reason) as error:
        check(tmp_path / path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_that_another_process_makes_and_removes_can_be_made(tmp_path, monkeypatch):
    """It appears just after it was found missing."""
    isdir = os.path.isdir

    def late(path):
        found = isdir(path)
        (tmp_path / "run").mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(os.path, "isdir", late)
    files.check_creatable(tmp_path / "run")


@pytest.mark.parametrize("name", ["run", "deep/er/run", "n" * 255, "ü" * 120])
def test_a_folder_that_can_be_made_appears(name, tmp_path):
    (tmp_path / ".jaxpeft-probe-killed").mkdir()  # by a process that was killed in this
    files.check_target(tmp_path / name)
    assert os.listdir(tmp_path) == []
    with files.appearing(tmp_path / name) as folder:
        files.write(folder / "a", b"1")
    assert (tmp_path / name / "a").read_bytes() == b"1"


def test_a_long_name_of_an_input_is_one_line(capsys):
    """As of an output; nothing was loaded."""
    for flags in (["merge", "--adapter", LONG, "--out", "x"], ["merge", "--adapter", "x", "--out", LONG]):
        assert cli.main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 1


# A process that is killed before its n-th call of the system in a folder, for every n; what the next start makes of it.
KILLED = """
import os, sys
from pathlib import Path
from jaxpeft import files

parent, name, before, clear = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "old", sys.argv[4]

def make():
    with files.appearing(parent / name) as folder:
        files.write(folder / "a", b"new")
        files.write(folder / "b", b"new")

def killed(n):
    calls = 0
    def hook(event, args):
        nonlocal calls
        if event.startswith(("os.", "open", "shutil.", "tempfile.")) and str(parent) in str(args):
            calls += 1
            if calls == n:
                os._exit(9)
    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        make()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

def holds(path):
    return {file.name: file.read_text() for file in path.iterdir()} if path.exists() else None

OLD, NEW = {"a": "old"}, {"a": "new", "b": "new"}
seen, n = set(), 1
while True:
    parent.mkdir(exist_ok=True)
    if before:
        (parent / name).mkdir()
        (parent / name / "a").write_text("old")
    dead = killed(n)
    left = [path for path in parent.iterdir() if path.name != name]
    if clear == "clear":
        files.clear_leftovers(parent, name)
        assert holds(parent / name) in ((OLD, NEW) if before else (None, NEW)), (n, holds(parent / name))
        seen.add(str(holds(parent / name)))
    else:
        make()
        assert holds(parent / name) == NEW
    assert [path.name for path in parent.iterdir() if path.name != name] == [], n
    files.shutil.rmtree(parent)
    if not dead:
        break
    n += 1
assert n > 15 and (clear != "clear" or len(seen) == 2)
print(n)
"""


@pytest.mark.parametrize("before", ["none", "old"])
@pytest.mark.parametrize(
    ("name", "then"), [("adapter", "clear"), ("adapter", "make"), ("old", "clear"), ("n" * 100, "clear")]
)
def test_a_process_killed_at_any_moment_leaves_one_whole_folder_and_no_other(name, before, then, tmp_path):
    argv = [sys.executable, "-c", KILLED, str(tmp_path / "parent"), name, before, then]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_what_a_living_process_is_making_stays(tmp_path):
    with files.appearing(tmp_path / "a") as folder, files.appearing(tmp_path / "a") as other:
        files.clear_leftovers(tmp_path)
        files.write(folder / "x", b"1")
        files.write(other / "y", b"2")
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["x"]  # the last one's


def test_folders_of_others_are_no_leftovers(tmp_path):
    for name in (".a.12345678/b", ".a.bak/lock", ".b.12345678/lock"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("b")
    files.clear_leftovers(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == [".a.12345678", ".a.bak", ".b.12345678"]
    files.clear_leftovers(tmp_path / "none")


def test_the_only_copy_is_not_deleted_if_nothing_can_be_put_in_place(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    replace = Path.replace

    def fails(path, target):
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="Input/output"), files.appearing(tmp_path / "a") as folder:
        files.write(folder / "x", b"new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a" / "x").read_text() == "old"


def test_a_pipe_is_no_document_and_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="config.json: is no regular file"):
        files.read_text(tmp_path / "config.json", "missing")
    assert not gguf.is_gguf(tmp_path / "config.json")
    with pytest.raises(InputError, match="config.json: is no regular file"):
        hf.load_config(tmp_path)


def test_paths_that_no_system_has():
    for given in ("~nobody_of_this_name/x", "a\0b"):
        with pytest.raises(InputError, match="no such home folder|zero byte"):
            files.expanded(given)
        with pytest.raises(InputError, match="no such home folder|zero byte"):
            hf.load_config(given)
