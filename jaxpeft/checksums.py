"""What a folder of files was when it was written: sizes and SHA-256, in sha256.json beside them.

    {".": "10", "state/manifest.ocdbt": [123, "9f86d0..."], ...}    its name, and every file below it but this one

A folder whose files are not these, no more and no less, is damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from jaxpeft import files
from jaxpeft.errors import shown

NAME = "sha256.json"
_OWN = "."  # the folder itself, of which the name is kept
# What orbax writes when it gives a checkpoint its name, at which its sums must be there: these are added afterwards.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write(folder: Path, becomes: str | None = None) -> None:
    """Writes the sums of what is in a folder; waits until they are on disk.

    `becomes`: the name that it is going to have, where it is not finished; LATER are left out then.
    """
    names = [name for name in _files(folder) if becomes is None or name not in LATER]
    sums = {name: _sum(folder / name) for name in names}
    files.write_json(folder / NAME, {_OWN: becomes or folder.name, **sums})


def complete(folder: Path) -> None:
    """Adds the sums of LATER to those of a checkpoint that has got its name, where they are not there yet."""
    known = json.loads((folder / NAME).read_bytes())
    if fresh := {name: _sum(folder / name) for name in LATER if name not in known and (folder / name).is_file()}:
        files.write_json(folder / NAME, {**known, **fresh})


def fault(folder: Path, within: str = "") -> str | None:
    """What is wrong with a folder of which sums were written, in a few words; None if it is whole.

    `within`: a folder in it, of whose files alone the contents are compared.
    """
    try:
        known = json.loads((folder / NAME).read_bytes())
    except FileNotFoundError:
        return f"has no {NAME}"
    except (OSError, ValueError, RecursionError):
        return f"{NAME} cannot be read"
    if not isinstance(known, dict):
        return f"{NAME} holds no sums"
    if (name := known.pop(_OWN, None)) != folder.name:
        return f"{NAME} does not say of which folder it is" if name is None else f"was written as {shown(name)}"
    there = set(_files(folder))
    if lost := sorted(known.keys() - there):
        return f"{lost[0]} is missing"
    if more := sorted(there - known.keys() - {*LATER}):
        return f"{more[0]} was not written with it"
    for name, before in known.items():
        if not Path(name).is_relative_to(within):
            continue
        try:
            now = _sum(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if now != before:
            return f"{name} is not what was written"
    return None


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (NAME, f"{NAME}.tmp"):  # the latter of a process that ended writing it
            yield name


def _sum(file: Path) -> list[int | str]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return [file.stat().st_size, digest]
