"""Files and folders that appear whole or not at all; files read up to a bound; YAML."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxpeft import locks
from jaxpeft.errors import InputError

MOST_BYTES = 2**26  # of a document; the largest known, a tokenizer's, have 2^25


def cache_folder() -> Path:
    """Where what can be made again is kept: $JAXPEFT_CACHE, else jaxpeft in the user's cache folder.

    Raises:
      InputError: for a home folder (~, ~name) that the system does not know.
    """
    own = os.environ.get("JAXPEFT_CACHE")
    given = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jaxpeft"
    try:
        return given.expanduser()
    except RuntimeError:
        raise InputError(f"$JAXPEFT_CACHE {given}: there is no such home folder; name one that is there") from None


def expanded(given: str | os.PathLike[str]) -> Path:
    """A path that a user or a file gives, ~ and all.

    Raises:
      InputError: for a home folder that the system does not know, or a zero byte, which no path may hold.
    """
    if "\0" in os.fspath(given):
        raise InputError(f"{os.fspath(given)!r}: holds a zero byte, which no path may")
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise InputError(f"{given}: there is no such home folder") from None


def prune(folder: Path, most_bytes: int) -> None:
    """Deletes what was not used for longest, files and folders in `folder`, until half of `most_bytes` is left.

    Nothing is deleted while they have no more than `most_bytes`. Used is what was read or written (file systems note
    the reading once a day).
    """
    if not folder.is_dir():
        return
    found = []
    for entry in folder.iterdir():
        within = []
        for path in (entry, *entry.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # another process may be deleting
                within += [path.stat()] if path.is_file() else []
        used = max((max(file.st_atime, file.st_mtime) for file in within), default=0.0)
        found.append((used, sum(file.st_size for file in within), entry))
    total = sum(size for _, size, _ in found)
    if total <= most_bytes:
        return
    for _, size, entry in sorted(found):
        if total <= most_bytes // 2:
            break
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        total -= size


def read_text(file: Path, missing: str, most: int = MOST_BYTES, pipe: bool = False) -> str:
    """The text of a file in UTF-8. Arguments and errors are those of `read_bytes`; other bytes are an error."""
    try:
        return read_bytes(file, missing, most, pipe).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 at byte {error.start}") from None


def read_bytes(file: Path, missing: str, most: int = MOST_BYTES, pipe: bool = False) -> bytes:
    """What a file holds.

    Args:
      file: to be read.  missing: what is said if there is none.  most: bytes.
      pipe: whether it may be something else than a regular file, which may keep its reader waiting.

    Raises:
      InputError: `missing` if there is no such file; for one that has more than `most` bytes or cannot be read.
    """
    try:
        if not pipe and not stat.S_ISREG(os.stat(file).st_mode):
            raise InputError(f"{file}: is no regular file")
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(missing) from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except ValueError as error:  # a zero byte in its name
        raise InputError(f"{str(file)!r}: cannot be read: {error}") from None
    if len(data) > most:
        raise InputError(f"{file}: has more than {most} bytes; such a document has fewer")
    return data


def write_json(file: Path, value: Mapping[str, Any], **options: Any) -> None:
    """Writes a JSON file durably; what was there before is replaced at once."""
    text = json.dumps(value, indent=2, ensure_ascii=False, **options) + "\n"
    fresh = file.with_name(file.name + ".tmp")
    try:
        write(fresh, text.encode())
        os.replace(fresh, file)
    except OSError:  # a full disk
        fresh.unlink(missing_ok=True)
        raise


def write(file: Path, data: bytes) -> None:
    """Writes a file and waits until it is on disk."""
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def check_empty(name: str, folder: Path) -> None:
    """Raises InputError if a folder to be filled, given as `name`, is there and not empty, or cannot be made."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{name} {folder}: already exists; give a new or empty folder")
    check_creatable(folder)


def check_creatable(target: Path) -> None:
    """Raises InputError if no folder can be made at `target`, or nothing be written in the one that is there.

    It is tried: a folder is made where the first one would be, and removed. Names and paths may be as long as the file
    system takes, with room for what will be in the folder.
    """
    text = os.fspath(target)
    shown = text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}"
    if "\0" in text:
        raise InputError(f"{text!r}: holds a zero byte, which no path may")
    whole = Path(os.path.abspath(target))
    longest = max((os.fsencode(part) for part in whole.parts), key=len)
    # `os.path.isdir` says False, where Path's own raises, of a name that is too long.
    there = next((path for path in reversed([whole, *whole.parents]) if not os.path.isdir(path)), whole / "new")
    ancestor = there.parent
    name, path = (os.pathconf(ancestor, f"PC_{kind}_MAX") for kind in ("NAME", "PATH"))
    if len(longest) > name:
        raise InputError(f"{shown}: a name in it has {len(longest)} bytes; at most {name} here")
    if (size := len(os.fsencode(whole))) > path - _ROOM:
        raise InputError(f"{shown}: has {size} bytes; at most {path - _ROOM} here, to leave room for what is in it")
    if _occupied(there):
        raise InputError(f"{shown}: {there} is no folder")
    try:
        tempfile.mkdtemp(prefix=_PROBE, dir=ancestor)
    except OSError as error:
        raise InputError(f"{shown}: cannot be made: {ancestor}: {error.strerror}") from None
    for probe in ancestor.glob(f"{_PROBE}*"):  # and what a process left that was killed between these lines
        with contextlib.suppress(OSError):
            probe.rmdir()


def _occupied(path: Path) -> bool:
    """Whether something that is no folder lies at a path; another process may be making or removing a folder."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return os.path.islink(path)


_PROBE = ".jaxpeft-probe-"
_ROOM = 512  # bytes of a path within a run's folder, the longest of which are checkpoints' while they are written


def check_target(target: Path, replaceable: str | None = None) -> None:
    """Raises InputError if a folder cannot be made at `target`.

    Args:
      target: the folder; it may exist if it is empty.
      replaceable: a file's name: a folder that holds such a file may be replaced.
    """
    if not os.path.lexists(target):
        return check_creatable(target)
    if not target.is_dir():
        raise InputError(f"{target}: is a file; give a folder")
    if not any(target.iterdir()):
        return
    if replaceable is None:
        raise InputError(f"{target}: exists and is not an empty directory; choose another or remove it first")
    if not (target / replaceable).is_file():
        raise InputError(f"{target}: holds something else (no {replaceable}) and is not replaced")


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place at the end, or is gone after an error.

    An old folder is moved aside first and deleted last: at every moment one of the two is whole. What a process leaves
    that is killed meanwhile, `clear_leftovers` puts in order: the next that makes this target calls it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target.parent, target.name)
    with contextlib.ExitStack() as stack:
        temporary = _temporary(target, stack)
        stack.callback(_settle, temporary, target)
        folder = temporary / _NEW  # made by mkdir, so with the user's usual permissions
        folder.mkdir()
        yield folder
        _sync(folder)
        if target.is_dir() and any(target.iterdir()):
            target.replace(temporary / _OLD)
        folder.replace(target)
        _sync(target.parent)


# What is in a temporary folder: a lock that lives as long as its process and holds the target's name, and two folders.
_LOCK, _NEW, _OLD = "lock", "new", "old"


def _temporary(target: Path, stack: contextlib.ExitStack) -> Path:
    """A new temporary folder, whose lock is held until the stack's end."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:32]}.", dir=target.parent))
        try:
            stack.enter_context(locks.held(temporary / _LOCK, target.name))
        except (locks.Held, FileNotFoundError):  # another process took it for a leftover, as it had no lock yet
            continue
        except OSError as error:
            if error.errno not in locks.UNSUPPORTED:  # where there are none, nobody clears anything
                _settle(temporary, target)
                raise
        return temporary


def clear_leftovers(parent: Path, name: str | None = None) -> None:
    """Puts in order what killed processes left of `appearing` in a folder; what a living one is making stays.

    A new folder that is whole takes its place where the old one had already been moved aside; all else goes.

    Args:
      parent: the folder, where there is one.
      name: of the only target that is looked after; None: of all.
    """
    start = r".{1,32}" if name is None else re.escape(name[:32])
    pattern = re.compile(rf"\.{start}\.[a-z0-9_]{{8}}", re.DOTALL)
    with contextlib.suppress(OSError):
        for temporary in [parent / found for found in os.listdir(parent) if pattern.fullmatch(found)]:
            with contextlib.suppress(locks.Held, OSError):
                _clear(temporary, name)


def _clear(temporary: Path, name: str | None) -> None:
    lock = temporary / _LOCK
    if temporary.is_symlink():
        return
    if not lock.exists():
        return temporary.rmdir()  # its process was killed before all else, or after; another's folder is not empty
    text = lock.read_text(encoding="utf-8")
    if os.path.basename(text) != text or (text and name not in (None, text)):
        return
    with locks.held(lock):
        _settle(temporary, temporary.parent / (text or _NEW))


def _settle(temporary: Path, target: Path) -> None:
    """The end of a temporary folder; the lock goes last, so that what is left of it at any moment is known."""
    new, old = temporary / _NEW, temporary / _OLD
    if new.exists() and old.exists() and not os.path.lexists(target):
        try:
            new.replace(target)
        except OSError:
            old.replace(target)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        (temporary / _LOCK).unlink(missing_ok=True)
        temporary.rmdir()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_DEEPEST = 50  # YAML; method options have two or three levels
# YAML's numbers as everybody writes them: version 1.1 reads 1e-4 as text, because it has no dot.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


def from_yaml(where: str, text: str) -> Any:
    """The value of YAML text.

    Raises:
      InputError: for what is not YAML; the line begins with `where`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # which could stand for exponentially much
                raise InputError(f"{where}: holds *{self.peek_event().anchor}; aliases are not read")
            if self.depth >= _DEEPEST:
                raise InputError(f"{where}: is nested more than {_DEEPEST} deep")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
                line = node.start_mark.line + 1
                raise InputError(f"{where}: the mapping that begins in line {line} has {twice[1]!r} twice")
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> int:
            if (value := super().construct_yaml_int(node)).bit_length() > 1024:  # thousands of digits, in base 16
                raise ValueError(f"a number of {len(node.value)} digits")
            return value

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    try:
        return yaml.load(text, Loader)
    except InputError:
        raise
    except Exception as error:  # constructors of YAML's own types raise whatever Python does
        raise InputError(f"{where}: is not YAML: {' '.join(str(error).split())[:300]}") from None


def to_yaml(where: str, value: Any) -> str:
    """A value as YAML on one line, which `from_yaml` reads back.

    Raises:
      InputError: for a value that YAML cannot hold; the line begins with `where`.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    try:
        text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**6, sort_keys=False)
    except yaml.YAMLError:
        raise InputError(f"{where}: YAML cannot hold {value!r}") from None
    return text.removesuffix("\n...\n").strip()
