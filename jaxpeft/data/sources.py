"""Where rows come from: a file, a folder of files, a dataset of the hub.

file                      of a kind that `jaxpeft.data.records` reads, by the ending of its name (an ending .gz or
.zst is only taken off)
folder                    shards of one kind, read in the order of their names; files of other kinds are left out
owner/name                a dataset of the hub, its split train; owner/name:split and owner/name:config:split name
others; its rows are owner/name:split:row N
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from jaxpeft.data.records import READERS, ROWS, TEXTS, Record, opened, rows
from jaxpeft.errors import InputError, first_line

KINDS = (
    ".jsonl, .json (an array, or lines), .csv, .tsv, these also as .gz or .zst; .parquet, .arrow; a folder of such"
    " files; or a dataset of the hub, owner/name[:config][:split]"
)
_PACKED = (".gz", ".zst")
# What `datasets` and its hub keep beside the rows.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[^:]+))??(?::(?P<split>[^:[]+(\[.*\])?))?"
)


class Source(NamedTuple):
    """Where rows are read from.

    name: as it was given, which opens every message.
    files: in the order of reading; one without a folder, none of a dataset of the hub.
    dataset: of the hub, loaded; None for files.
    """

    name: str
    files: tuple[Path, ...]
    dataset: Any = None

    def records(self) -> Iterator[Record]:
        """All records, in order.

        Raises:
          InputError: a file cannot be read, or is not of the kind that its name says.
        """
        if self.dataset is not None:
            batches = self.dataset.with_format("arrow").iter(batch_size=ROWS)
            yield from rows((table.to_pylist() for table in batches), self.name)
            return
        before = 0
        for path in self.files:
            name = self.name if path == Path(self.name) else f"{self.name}/{path.name}"
            last = 0
            for record in READERS[_kind(path)](path, name):
                last = record.number
                yield record._replace(number=before + last, file="" if name == self.name else path.name)
            before += last

    def bytes(self) -> int | None:
        """Their size on disk; None where there are no files to be read twice (a pipe, a dataset of the hub)."""
        if not self.files or not all(path.is_file() for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    def digests(self) -> list[list[str]]:
        """What the files hold and are called: [[kind, or name in a folder, SHA-256], ...]."""
        found = []
        for path in self.files:
            with opened(path, str(path)) as file:
                digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            found.append([path.suffix if path == Path(self.name) else path.name, digest])
        return found


def find(given: str | os.PathLike[str]) -> Source:
    """What a path, or the name of a dataset of the hub, stands for.

    Raises:
      InputError: there is no such thing, or it is of no kind that is read.
    """
    name = os.fspath(given)
    name = name.rstrip("/") or name
    path = Path(name)
    if name and path.is_dir():
        return Source(name, _shards(path))
    if name and path.exists():
        if _kind(path) not in READERS:
            raise InputError(f"{name}: by its name no kind of file that is read; kinds: {KINDS}")
        return Source(name, (path,))
    hub = _HUB.fullmatch(name)
    if not hub or is_named(path) or path.parent.is_dir():
        raise InputError(f"{name or repr(name)}: no such file")
    return Source(name, (), _of_hub(name, hub["name"], hub["config"], hub["split"] or "train"))


def is_named(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return _kind(path) in READERS.keys() - {""}


def _kind(path: Path) -> str:
    """The ending that says how a file is read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]] or [""]
    if suffixes[-1] not in _PACKED:
        return suffixes[-1]
    inner = suffixes[0] if len(suffixes) > 1 else ""
    return inner if inner in TEXTS else suffixes[-1]


def _shards(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that hold rows.

    Raises:
      InputError: there are none, or several kinds of them.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from error
    shards = [
        path
        for path in entries
        if path.is_file() and not path.name.startswith((".", "_")) and path.name not in _ABOUT and _kind(path)
    ]
    shards = [path for path in shards if _kind(path) in READERS]
    kinds = sorted({_kind(path) for path in shards})
    if len(kinds) > 1:
        raise InputError(f"{folder}: holds files of several kinds ({', '.join(kinds)}); give one file, or one kind")
    if not shards:
        folders = [path.name for path in entries if path.is_dir()][:8]
        more = f" (folders in it: {', '.join(folders)})" if folders else ""
        raise InputError(f"{folder}: holds no file of rows{more}; kinds: {KINDS}")
    return tuple(shards)


# The hub.


def _of_hub(given: str, name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{given}: no such file or folder; as a dataset of the hub it needs the library datasets: "
            "pip install 'jaxpeft[datasets]'"
        ) from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever the hub's client, its transport and its readers raise
        raise InputError(f"{given}: no such file, and no dataset of the hub: {first_line(error)}") from error
