"""A run's configuration on disk, OUT/config.json: what `--resume` compares with, and what other commands read a run by.

    {"jax": version, "arguments": {flag's field: value}, "method": [[name, arguments], ...], "content": {name: digest},
     "labels": [names of what rows are classified as], "text": what `jaxpeft.template` keeps beside a result, or null,
     "rows": with --prune-embeddings, the ids of the tokens whose rows are there,
     "adapters": with --adapters, {name: [[method's name, arguments], ...]}}

Files are compared by content, so that a run continues where its model and data have been moved to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, Required

import jax
import jax.numpy as jnp
from typing_extensions import TypedDict

from jaxpeft import documents, files, host, launched, recipe, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Spec
from jaxpeft.models import rotary
from jaxpeft.models.labels import SCOPE
from jaxpeft.template import Document as Text
from jaxpeft.template import Template
from jaxpeft.train import several
from jaxpeft.train.checks import flag
from jaxpeft.train.report import SCORES
from jaxpeft.train.run import Run

FILE = "config.json"
REPORT = "report.json"
# What a run leaves in its folder; one of these there, and the folder holds a run.
RESULTS = ("adapter", "adapters", "model")  # of which a finished run has one
TRACES = (FILE, REPORT, "metrics.jsonl", "checkpoints", *RESULTS, "tensorboard")
# Fields that may differ when a run is continued: they don't bear on its numbers ...
_FREE = {"out", "resume", "data_cache", "compile_cache", "mesh", "profile_steps", "profile_process", *launched.FLAGS}
_FREE |= {"checkpoint_every", "keep"}
# ... or are compared by what the files hold ...
_BY_CONTENT = {"model", "data", "eval_data", "adapter", "template"}
# ... or by what the run began with, where the one that continues it doesn't say ...
_FROM_BEGIN = {"template_date"}
# ... or by the method that they make together.
_OF_METHOD = {"method", "rank", "alpha", "targets", "method_options"}


def describe(
    args: Run,
    specs: Iterable[Spec],
    content: Mapping[str, str | None],
    labels: Sequence[str] = (),
    template: Template | None = None,
    rows: str | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document of a run.

    Args:
      args: the run.
      specs: `Method.specs`; of several adapters those of all of them.
      content: digests of "model", "adapter", "data", "eval_data" and "template" (None without).
      labels: names of what rows are classified as, in order; none where none are.
      template: what conversations and instructions became text by; None where there are none.
      rows: ids of the rows of the embedding table that are there (`unused_rows.spelt`); None: all.
      adapters: of several, `several.Adapters.document`; None: there is one, or none.
    """
    names = [field.name for field in dataclasses.fields(Run) if field.name not in _FREE]
    arguments = {name: getattr(args, name) for name in names}
    document = {
        "jax": jax.__version__,
        "arguments": arguments,
        "method": [[spec.name, spec.config] for spec in specs],
        "content": dict(content),
        "labels": list(labels),
        "text": template.document() if template else None,
    }
    document |= {"rows": rows} if rows is not None else {}
    document |= {"adapters": adapters} if adapters is not None else {}
    return json.loads(json.dumps(document, default=str))  # as it will be read: tuples are lists, paths text


# A run's arguments; those of an older version may lack some.
_Arguments = TypedDict("_Arguments", typing.get_type_hints(Run), total=False)  # type: ignore[misc]


class _Content(TypedDict, total=False):
    model: Required[documents.Text]
    adapter: documents.Text | None
    data: documents.Text
    eval_data: documents.Text | None
    template: documents.Text | None


class Document(TypedDict):
    """OUT/config.json."""

    arguments: Any
    method: documents.Specs
    content: _Content
    labels: NotRequired[list[documents.Text]]
    text: NotRequired[Text | None]
    rows: NotRequired[documents.Text]
    adapters: NotRequired[dict[documents.Text, documents.Specs]]


class _Sample(TypedDict):
    prompt: documents.Text
    reference: documents.Text
    before: documents.Text
    after: documents.Text


_Judged = TypedDict(  # type: ignore[misc]
    "_Judged",
    {f"{name}_{when}": documents.Number | None for name in SCORES for when in ("before", "after")},
    total=False,
)


_Scores = dict[documents.Text, documents.Number | None]


class _InContext(TypedDict):
    """How it was with examples in context (`Run.shots`)."""

    shots: documents.Whole
    eval_loss: documents.Number | None
    overlap: documents.Number | None
    exact: documents.Number | None


class Report(TypedDict):
    """OUT/report.json, as far as it is read again."""

    out: documents.Text
    method: documents.Text
    steps: documents.Index
    tokens: documents.Whole
    train_loss: documents.Number
    trainable_parameters: documents.Whole
    frozen_parameters: documents.Whole
    total_parameters: documents.Whole
    memory_bytes: dict[documents.Text, documents.Number]
    sample: _Sample | None
    in_context: NotRequired[_InContext | None]
    dtype: NotRequired[documents.Text | None]
    remat: NotRequired[documents.Text]
    optimizer: NotRequired[documents.Text]
    compile_cache: NotRequired[documents.Text | None]


class _Before(TypedDict):
    """How the model was before the first step."""

    scores: _Scores
    overlap: documents.Number | None
    exact: NotRequired[documents.Number | None]
    texts: list[documents.Text]
    in_context: NotRequired[_InContext | None]


class Progress(TypedDict):
    """A checkpoint's meta; `run`: the `identity` of its run, `frozen`: whether that has frozen leaves of its own."""

    run: NotRequired[documents.Text]
    frozen: NotRequired[documents.Flag]
    data: dict[documents.Text, Any]
    tokens: documents.Whole
    loss: documents.Number
    before: _Before
    eval_loss: documents.Number | None
    last_scores: _Scores
    eval_step: documents.Index | None


def read(out: Path) -> dict[str, Any]:
    """The document of the run in a folder.

    Raises:
      InputError: if there is none, or for a field that is not what it should be.
    """
    document = documents.read_json(out / FILE, f"{out}: holds no run (no {FILE})", Document)
    documents.checked(str(out / FILE), _Arguments, document["arguments"], "arguments", as_json=True)
    return document


def read_report(out: Path) -> dict[str, Any]:
    """The report of the run in a folder.

    Raises:
      InputError: if there is none, or for a field that is not what it should be.
    """
    report = documents.read_json(out / REPORT, f"{out}: holds no finished run (no {REPORT})", Report)
    return documents.checked(str(out / REPORT), _Judged, report)


def stored_date(document: Mapping[str, Any]) -> str | None:
    """The day that a run's templates have been told; None where it tells none."""
    return document.get("arguments", {}).get("template_date")


def shared(args: Run) -> dict[str, Any]:
    """What has to be alike in all processes of a run, by flag."""
    fields = [field.name for field in dataclasses.fields(Run) if field.name not in launched.FLAGS]
    return {flag(name): getattr(args, name) for name in fields}


def check_folder(out: Path) -> None:
    """Raises InputError for a path that cannot be a folder which can be written in, or is in another run's."""
    if os.path.isfile(out):
        raise InputError(f"--out {out}: is a file; give a folder")
    try:
        files.check_creatable(out)
    except InputError as error:
        raise InputError(f"--out {error}") from None
    for parent in Path(os.path.realpath(out)).parents:
        if _holds_run(parent):
            raise InputError(f"--out {out}: is inside the run in {parent}; give a folder outside of it")


def _holds_run(folder: Path) -> bool:
    try:
        return {"arguments", "method"} <= documents.read_json(folder / FILE, "").keys()
    except InputError:
        return False


def check_new(out: Path) -> None:
    """`check_folder`, and raises InputError for a folder that holds a run."""
    check_folder(out)
    if found := [name for name in TRACES if (out / name).exists()]:
        raise InputError(
            f"--out {out}: already holds a run ({', '.join(found)}); give another folder, or --resume to continue it"
        )


def take_back(out: Path) -> None:
    """Removes what a new run, for which `check_new` has found room, has written before its first step."""
    for path in (out / name for name in TRACES):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def identity(document: Mapping[str, Any]) -> str:
    """Tells a run from others, however long it is and wherever its files have been moved: a checkpoint names it."""
    apart = {"steps", *_BY_CONTENT}
    arguments = {name: value for name, value in document["arguments"].items() if name not in apart}
    own = [arguments, *(document.get(name) for name in ("method", "content", "labels"))]
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def with_steps(document: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The document of a run that is continued to more steps."""
    return {**document, "arguments": {**document.get("arguments", {}), "steps": steps}}


def named_otherwise(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is compared by content and has another name than it had (old -> new)."""
    before, now = old.get("arguments", {}), new["arguments"]
    names = sorted({*_BY_CONTENT, "adapters"})  # these by their folders' contents, too
    return [_renamed(name, before, now) for name in names if (before.get(name) or None) != (now.get(name) or None)]


def _renamed(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, is_ = (_words(arguments.get(name)) or "the default" for arguments in (before, now))
    return f"{flag(name)} {was} -> {is_}"


def check_arguments(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """`check_same` of what the arguments alone say, before anything is read; new["method"] is [] if they name none."""
    before, now = old.get("arguments", {}), new["arguments"]
    as_before = all(_meaning(name, before.get(name)) == _meaning(name, now[name]) for name in _OF_METHOD)
    method = old.get("method") if as_before or not new["method"] else new["method"]
    check_same(out, old, {**old, "arguments": now, "method": method}, named_otherwise(old, new))


def check_same(out: Path, old: Mapping[str, Any], new: Mapping[str, Any], named_otherwise: Sequence[str] = ()) -> None:
    """Raises InputError with every field in which a run is to be continued otherwise than it began (old -> new).

    A method may be spelt otherwise: `--rank 4`, `rank=4` and `lora.rank=4` are the same. More steps are no difference
    where the schedule is constant; a falling one has the number of steps in every rate. What is named otherwise is said
    beside a difference, which may be another model's default.
    """
    before, now = old.get("arguments", {}), new["arguments"]
    same_method = old.get("method") == new["method"]
    constant = before.get("schedule") == now.get("schedule") == "constant"
    if constant and not now.get("rounds") and now.get("steps", 0) > before.get("steps", 0):
        before = {**before, "steps": now["steps"]}  # a rate that is constant goes on
    changes = [
        f"{flag(name)} {_words(before.get(name))} -> {_words(now.get(name))}"
        for name in [*now, *(name for name in before if name not in now)]
        if name not in _BY_CONTENT | _FREE
        and not (name in _FROM_BEGIN and now.get(name) is None)
        and not (same_method and name in _OF_METHOD)
        and _meaning(name, before.get(name)) != _meaning(name, now.get(name))
    ]
    other = {name for name in _BY_CONTENT if old.get("content", {}).get(name) != new["content"].get(name)}
    if "model" in other:  # whose tokenizer makes other tokens of the same texts
        other -= {name for name in ("data", "eval_data") if before.get(name) == now.get(name)}
    if now.get("adapters"):  # of several, whose contents are one
        other = {"adapters" if name == "adapter" else name for name in other}
    changes += [f"{_renamed(name, before, now)} (other content)" for name in sorted(other)]
    if not changes and old.get("labels", []) != new.get("labels", []):
        changes.append(f"the labels {old.get('labels')} -> {new.get('labels')}")
    if not changes and old.get("rows") != new.get("rows"):
        changes.append("the tokens of its data, and so the rows of --prune-embeddings")
    if not changes and old.get("adapters") != new.get("adapters"):
        changes.append(f"the adapters' methods {old.get('adapters')} -> {new.get('adapters')}")
    if not changes and not same_method:
        changes.append(f"the method's defaults {old.get('method')} -> {new['method']}")
    if changes:
        ends = ""
        if now.get("steps", 0) > before.get("steps", 0):
            rounds = (before.get("rounds") or 1) > 1
            whose = f"{before['rounds']} rounds end" if rounds else f"{before.get('schedule')} schedule ends"
            goes_on = "a run of one round" if rounds else "a constant one"
            ends = f" (the {whose} at step {before.get('steps')}; {goes_on} goes on)"
        beside = f"; named otherwise, too: {'; '.join(named_otherwise)}" if named_otherwise else ""
        raise InputError(f"--resume {out}: the run was begun otherwise: {'; '.join(changes)}{ends}{beside}")


def _meaning(name: str, value: Any) -> Any:
    """What a field is compared by: options by their values, in any order."""
    if name == "rope_scaling" and value is not None:
        return rotary.parse(value)
    if name == "remat":
        return value or "loops"  # a run from before there was a choice
    if name == "optimizer_memory":
        return value or "device"  # likewise
    if name == "shots":
        return value or 0  # likewise
    if name == "adapters":
        return [*several.read(value or ())]  # by name: folders by what they hold
    if name in ("update_in_backward", "prune_embeddings"):
        return bool(value)  # likewise
    return recipe.read(value or ()) if name == "method_options" else value


def _words(value: Any) -> Any:
    return (" ".join(value) or None) if isinstance(value, list) and all(isinstance(x, str) for x in value) else value


def digest_of_base(params: Mapping[str, Any], sums: Mapping[str, jax.Array] | None = None) -> str:
    """The `digest` of nested parameters without a classifier of rows, which may be new."""
    return digest({path: leaf for path, leaf in tree.flatten(params).items() if not path.startswith(SCOPE)}, sums)


def digest(leaves: Mapping[str, Any], sums: Mapping[str, jax.Array] | None = None) -> str:
    """A fingerprint of arrays' bits, made on their devices: equal for equal leaves, whatever their sharding.

    For each leaf, its `checksum`; of a packed kernel, that of its arrays.

    Args:
      leaves: `{path: leaf}`.
      sums: `{path: checksum}` of leaves that are not stored as they were; these count as they were.
    """
    result = hashlib.blake2b(digest_size=8)
    for path, leaf in sorted(leaves.items()):
        value = (sums or {}).get(path)
        total = sum(map(_checksum, jax.tree.leaves(leaf))) if value is None else int(value)
        result.update(f"{path}:{leaf.shape}:{leaf.dtype}:{total};".encode())
    return result.hexdigest()


def _checksum(leaf: jax.Array) -> int:
    """The `checksum` of an array; of one in the host's memory layer by layer."""
    if not host.holds(leaf):
        return int(checksum(leaf))
    parts = (checksum(host.row(leaf, i)[None], i) for i in range(len(leaf)))
    return sum(map(int, parts)) % 2**32


@jax.jit
def checksum(leaf: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """The sum of an array's words, each times an odd number that depends on where it stands; () uint32.

    Words are unsigned integers, sums are modulo 2^32. A part of an array whose axis 0 begins at index `first` of the
    whole has its share of the whole's sum.
    """
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    bits = jnp.dtype(leaf.dtype).itemsize * 8
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    odd = jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(words.shape):
        shape = [length if i == axis else 1 for i in range(words.ndim)]
        at = jnp.arange(length, dtype=jnp.uint32) + (jnp.uint32(first) if axis == 0 else jnp.uint32(0))
        odd = odd * jnp.uint32(1000003) + at.reshape(shape)
    return jnp.sum(words * (2 * odd + 1), dtype=jnp.uint32)
