"""Encoded rows on disk, so that long data are tokenized once.

    CACHE/data/KEY/rows.arrow   a row for each example-to-be: line, ids, runs, source (see `encodings.Chunk`); it is
                                mapped into memory, never read whole
    CACHE/data/KEY/about.json   the report of the reading, a digest of the rows, and the file's own

CACHE is `files.cache_folder()`. KEY is a digest of all that the rows follow from: what the files hold, the tokenizer
with its template, the settings that the caller names, the versions of the libraries, and our code. The
sequence length is none of it: rows are kept whole, and cut when they are read. So that a cached row is what would be
made anew, the file is compared with its digest before it is used, and one that is damaged is made again. What was not
used for longest goes when there is more than MOST_BYTES.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxpeft import files, special, template
from jaxpeft.data.encodings import Chunk, Digest, Encodings
from jaxpeft.data.sources import Source
from jaxpeft.errors import Notice

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
ROWS, ABOUT = "rows.arrow", "about.json"
# Smaller files are tokenized in a second or two, sooner than anybody would look for where the disk's space went.
LEAST_BYTES = 2**20
# Of all rows in the cache, when new ones are written.
MOST_BYTES = 16 * 2**30


class Cached(NamedTuple):
    """What is in the cache: the rows, and the caller's account of how they were read, plain JSON."""

    encodings: Encodings
    report: dict[str, Any]


def place(source: Source, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> Path | None:
    """The folder for the rows of a source; None where it is small, or something has no identity.

    Args:
      source: the files.
      tokenizer: its kind, vocabulary, rules and template count. A slow one is code, which has no identity.
      settings: whatever else the rows follow from, by name; plain values, tuples and sets.
    """
    size = source.bytes()
    if size is None or size < LEAST_BYTES or not tokenizer.is_fast:
        return None
    identity = {
        "format": FORMAT,
        "source": source.digests(),
        "tokenizer": identify(tokenizer),
        "settings": dict(settings),
        "code": _code(),
    }
    text = json.dumps(identity, sort_keys=True, default=_plain)
    return files.cache_folder() / "data" / hashlib.sha256(text.encode()).hexdigest()[:32]


def identify(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the output of a fast tokenizer follows from, as plain values; where its files lie is none of it."""
    backend = tokenizer.backend_tokenizer.to_str()
    # How the last call padded and truncated comes first in it, and is no property of the tokenizer.
    rules = hashlib.sha256(backend[backend.index('"added_tokens"') :].encode()).hexdigest()
    flags = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int | float)}
    for name in ("is_local", "local_files_only", "model_max_length"):  # where it was found; only a warning follows
        flags.pop(name, None)
    return {
        "class": type(tokenizer).__name__,
        "rules": rules,
        "template": tokenizer.chat_template,
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "flags": flags,
    }


def _code() -> dict[str, str]:
    """The versions of the libraries that encode, and a digest of our code that does."""
    from importlib.metadata import version

    own = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(special.__file__), Path(template.__file__)):
        own.update(file.read_bytes())
    return {"own": own.hexdigest(), **{name: version(name) for name in ("transformers", "tokenizers", "jinja2")}}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def read_or_make(folder: Path, make: Callable[[], tuple[Iterator[Chunk], Callable[[], dict[str, Any]]]]) -> Cached:
    """The rows in a folder of the cache, which is made if it isn't there or is damaged.

    Args:
      folder: of `place`.
      make: () -> (the chunks, a function that gives the report once these are read).

    Warns if a folder is damaged; or cannot be made (no space, no rights), in which case the rows stay in memory.
    """
    found = _read(folder)
    if found is not None:
        return found
    try:
        files.clear_leftovers(folder.parent)
        files.prune(folder.parent, MOST_BYTES)
        _write(folder, *make())
        found = _read(folder)
    except OSError as error:
        found = _read(folder)  # another run may have been faster
        if found is None:
            warnings.warn(f"{folder}: the tokenized data are not cached: {error.strerror or error}", Notice, 3)
    if found is None:
        chunks, report = make()
        found = Cached(Encodings.in_memory(chunks), report())
    return found


def _write(folder: Path, chunks: Iterable[Chunk], report: Callable[[], dict[str, Any]]) -> None:
    import pyarrow as pa

    lists = [(name, pa.list_(pa.int32())) for name in ("ids", "runs")]
    schema = pa.schema([("line", pa.int64()), *lists, ("source", pa.int32())])
    digest = Digest()
    with files.appearing(folder) as fresh:
        with pa.OSFile(str(fresh / ROWS), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for chunk in chunks:
                digest.update(chunk)
                ids, runs = (
                    pa.ListArray.from_arrays(pa.array(at), pa.array(values))
                    for at, values in ((chunk.at, chunk.ids), (chunk.runs_at, chunk.runs))
                )
                columns = [pa.array(chunk.lines), ids, runs, pa.array(chunk.sources)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        about = {"rows": digest.hexdigest(), "sha256": _sha256(fresh / ROWS), "report": report()}
        files.write_json(fresh / ABOUT, about)


def _read(folder: Path) -> Cached | None:
    """What is in a folder of the cache; None if there is none, or it is damaged, with a warning."""
    if not folder.is_dir():
        return None
    import pyarrow as pa

    try:
        about = json.loads((folder / ABOUT).read_bytes())
        if about["sha256"] != _sha256(folder / ROWS):
            raise ValueError(f"{ROWS} is not what was written")
        file = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
        chunks = [_chunk(file.get_batch(i)) for i in range(file.num_record_batches)]
        return Cached(Encodings(chunks, about["rows"]), dict(about["report"]))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are of these
        warnings.warn(f"{folder}: the cached data are damaged and made again: {error}", Notice, 4)
        return None


def _chunk(batch: Any) -> Chunk:
    view = lambda array: array.to_numpy(zero_copy_only=True)
    lines, ids, runs, sources = batch.columns
    of_ids, of_runs = ((view(x.values), view(x.offsets)) for x in (ids, runs))
    return Chunk(view(lines), *of_ids, *of_runs, view(sources))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
