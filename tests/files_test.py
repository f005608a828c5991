"""Folders that can be made, and those that cannot: one line, and nothing left behind."""

import os

import pytest

from jaxpeft import cli, files
from jaxpeft.errors import InputError
from jaxpeft.train import config

LONG = "n" * 300


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


@pytest.mark.parametrize("name", ["run", "deep/er/run", "n" * 255, "ü" * 120])
def test_a_folder_that_can_be_made_appears(name, tmp_path):
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
