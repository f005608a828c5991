"""A run's checkpoints: what cannot be made again, written asynchronously and atomically (orbax).

    FOLDER/frozen/         frozen leaves that are not made again by loading the base (adapters' frozen leaves, kernels
                           that a method's `prepare` changed; none that are packed while the base is read); they never
                           change, so they are written once, before step 1
    FOLDER/<step>/state/   step, trainable leaves, optimizer state, key
    FOLDER/<step>/meta/    JSON: the data position, and what the run has to report later
    FOLDER/damaged/<step>  a checkpoint that was found not to be what was written

frozen/ and <step>/ hold the sums of their files (`jaxpeft.checksums`), which are compared before anything is read: what
is damaged is put aside, and the run goes on from the newest checkpoint that is whole.

The base weights are in none of them. A checkpoint is written under a temporary name and renamed when it is whole, and
an older one goes only after that, so that a process killed at any moment leaves the last good one as it was. Kept are
the newest ones and the one with the lowest validation loss. Restoring is given the arrays' shapes and shardings and
puts them there, whatever devices had written them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from typing_extensions import TypedDict

from jaxpeft import checksums, distributed, documents, host, tree
from jaxpeft.errors import RunError
from jaxpeft.train.state import TrainState

FROZEN, DAMAGED = "frozen", "damaged"
_UNFINISHED = "*.orbax-checkpoint-tmp*"
_STEP = re.compile("[1-9][0-9]{0,9}")  # its name
_SEGMENT = re.compile(r"layers_(\d+)_(\d+)/")
_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # among the payloads that end tensorstore's messages


class Checkpoints:
    """The checkpoints in a folder; a context manager that waits for the last write at its end.

    Args:
      folder: where they lie; created when absent. What a killed process left half-written is removed, and what is
        damaged put aside.
      keep: how many of the newest to keep, besides the best.

    Attributes:
      damaged: {step: what is wrong with it}, of those put aside.
    """

    def __init__(self, folder: Path, keep: int = 2):
        # A write that fails is reported once, as a RunError, not also as a traceback in the log.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = folder.absolute()
        found = distributed.from_first(self._put_in_order)
        self.damaged: dict[int, str] = {int(step): reason for step, reason in found.items()}
        self._losses: dict[int, float] = {}
        self._begun: int | None = None  # the step that was written last, or is being written
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Preserve(keep, self.best),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sum_up),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        distributed.meet()
        self._opened = os.stat(self.folder)
        for step in self.steps():
            self._note(step, self.meta(step))

    def _put_in_order(self) -> dict[str, str]:
        """Removes what was not finished and puts aside what is damaged; {step: reason} of that."""
        _remove_unfinished(self.folder)
        damaged = {str(step): reason for step, reason in faults(self.folder).items()}
        numbers = [path.name for path in self.folder.glob("*") if path.name.isdigit()]
        strange = [name for name in numbers if not _STEP.fullmatch(name)]
        for name in (*damaged, *strange):  # orbax would take these for steps, too
            _put_aside(self.folder, name)
        return damaged

    def save_frozen(self, leaves: Mapping[str, jax.Array]) -> None:
        """Writes the frozen leaves that only this run has; returns when they are on disk.

        Raises:
          RunError: if they cannot be written.
        """
        if leaves:
            with ocp.StandardCheckpointer() as checkpointer:
                self._guard(FROZEN, lambda: checkpointer.save(self.folder / FROZEN, dict(leaves), force=True))
                self._guard(FROZEN, checkpointer.wait_until_finished)
            if distributed.is_first():
                self._guard(FROZEN, lambda: checksums.write(self.folder / FROZEN))

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint of the state and returns; the state's buffers may be donated from then on.

        Args:
          state: its frozen leaves are left out.
          meta: a JSON object; `meta["eval_loss"]` (a number, or None) is what the best checkpoint is chosen by.

        Raises:
          RunError: if this one, or the one before it, cannot be written.
        """
        step = int(state.step)
        if step in self.steps():
            return
        self.wait()
        self._note(step, meta)
        self._begun = step
        args = ocp.args.Composite(state=ocp.args.StandardSave(_changing(state)), meta=ocp.args.JsonSave(dict(meta)))
        self._guard(step, lambda: self._manager.save(step, args=args))

    def _sum_up(self) -> None:
        """The sums of the checkpoint whose files are written, before it gets its name."""
        if distributed.is_first():
            for path in self.folder.glob(_UNFINISHED):
                checksums.write(path, becomes=path.name.partition(".")[0])

    def check(self) -> None:
        """Raises the RunError of a write that has failed meanwhile."""
        self._guard(self._manager.latest_step(), self._manager.check_for_errors)

    def wait(self) -> None:
        """Waits until the checkpoint being written is on disk.

        Raises:
          RunError: if it cannot be written.
        """
        self._guard(self._manager.latest_step(), self._manager.wait_until_finished)
        if distributed.is_first():
            for step in on_disk(self.folder):
                self._guard(step, functools.partial(checksums.complete, self.folder / str(step)))

    def steps(self) -> list[int]:
        """The steps with a checkpoint, ascending; the one being written among them."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest validation loss; None if none was evaluated."""
        return min(self._losses, key=lambda step: (self._losses[step], step), default=None)

    def loss(self, step: int | None) -> float | None:
        """The validation loss of a checkpoint, None if it was not evaluated."""
        return self._losses.get(step) if step is not None else None

    def meta(self, step: int) -> dict[str, Any]:
        """A checkpoint's JSON."""
        return read_meta(self.folder, step)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint's state and meta.

        Args:
          like: a state of the same structure, of arrays or of `ShapeDtypeStruct`s with shardings: each leaf comes back
            with the type and the sharding that it has here, on these devices. Frozen leaves that no checkpoint holds
            are taken from it.
          step: which; the newest by default.

        Raises:
          RunError: if there is no such checkpoint, it is not of such a state, or the run's frozen leaves are damaged.
        """
        newest = self.latest()  # which was compared with its sums when the folder was opened, or written since
        step = newest if step is None else step
        if step not in self.steps():
            raise RunError(f"{self.folder}: no checkpoint of step {step}; there are {self.steps() or 'none'}")
        if step != newest and (reason := checksums.fault(self.folder / str(step))):
            raise RunError(f"{self.folder / str(step)}: damaged ({reason})")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(_changing(like))))
        try:
            changing = host.typed(self._manager.restore(step, args=args)["state"])
            frozen = {**like.frozen, **self._restore_frozen(like.frozen)}
        except (ValueError, KeyError, OSError) as error:
            raise RunError(f"{self.folder / str(step)}: cannot be restored: {_reason(error)}", 2) from error
        return TrainState(frozen=frozen, **changing), self.meta(step)

    def _restore_frozen(self, like: Mapping[str, Any]) -> tree.Flat:
        folder = self.folder / FROZEN
        if not folder.exists():
            return {}
        if reason := checksums.fault(folder):
            raise RunError(f"{folder}: damaged ({reason}); every checkpoint needs it: begin the run anew", 2)
        with ocp.StandardCheckpointer() as checkpointer:
            paths = checkpointer.metadata(folder).item_metadata.tree
            return checkpointer.restore(folder, _abstract({path: like[path] for path in paths}))

    def there(self) -> bool:
        """Whether the folder is the one that was opened: a write that is going on makes one that is gone anew."""
        try:
            return os.path.samestat(self._opened, os.stat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def close(self) -> None:
        """Waits for the last write and ends the manager's threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(Exception):  # the error that is on its way says more
                self._manager.close()
            _remove_unfinished(self.folder)
            if not self.there():
                self._remove_anew()

    def _remove_anew(self) -> None:
        """Where the folder was deleted or moved, removes what the write that was going on has made there since.

        Its threads are not ours to wait for: twice in a row there has to be nothing.
        """
        absent = 0
        for _ in range(50):
            _remove_unfinished(self.folder)
            shutil.rmtree(self.folder / str(self._begun), ignore_errors=True)
            for path in (self.folder, self.folder.parent):
                with contextlib.suppress(OSError):  # not empty, or not there
                    path.rmdir()
            absent = 0 if self.folder.exists() else absent + 1
            if absent == 2:
                return
            time.sleep(0.1)

    def _note(self, step: int, meta: Mapping[str, Any]) -> None:
        if meta.get("eval_loss") is not None:
            self._losses[step] = meta["eval_loss"]

    def _guard(self, step: int | str | None, call: Callable[[], Any]) -> Any:
        """Runs a call of orbax; what it raises becomes one line that names the last good checkpoint."""
        try:
            return call()
        except Exception as error:  # OSError from Python's own writes, ValueError from tensorstore's
            _remove_unfinished(self.folder)  # makes room again: logs may need it
            good = on_disk(self.folder)
            left = f"last good checkpoint: step {good[-1]}" if good else "no checkpoint has been written yet"
            raise RunError(f"{self.folder / str(step)}: not written: {_reason(error)}; {left}", status=2) from error


class _Preserve:
    """orbax's policy: the newest `keep` and the best."""

    def __init__(self, keep: int, best: Callable[[], int | None]):
        self._keep, self._best = keep, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        newest = sorted(checkpoint.step for checkpoint in checkpoints)[-self._keep :]
        return [checkpoint.step in newest or checkpoint.step == self._best() for checkpoint in checkpoints]


def _remove_unfinished(folder: Path) -> None:
    """Deletes what orbax began to write and never renamed."""
    if distributed.is_first():
        for path in folder.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def on_disk(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a folder, ascending, without opening any."""
    return sorted(int(path.name) for path in folder.glob("*") if _STEP.fullmatch(path.name)) if folder.is_dir() else []


class Meta(TypedDict, total=False):
    """A checkpoint's JSON, as far as it is read here."""

    eval_loss: documents.Number | None
    run: documents.Text
    frozen: documents.Flag


def foreign(folder: Path, step: int, run: str) -> str | None:
    """Why a checkpoint cannot serve a run of this identity, in a few words; None if it can, as far as is known."""
    meta = read_meta(folder, step)
    if meta.get("run", run) != run:
        return "is a checkpoint of another run"
    if meta.get("frozen") and not (folder / FROZEN).is_dir():
        return f"needs {folder / FROZEN}, which is missing"
    return None


def read_meta(folder: Path, step: int) -> Any:
    """The `Meta` of a checkpoint in a folder.

    Raises:
      InputError: if it cannot be read, or for a field that is not what it should be.
    """
    file = folder / str(step) / "meta" / "metadata"
    return documents.read_json(file, f"{file}: is missing", Meta)


def faults(folder: Path) -> dict[int, str]:
    """What is wrong with checkpoints in a folder, {step: reason}.

    Of those before the newest whole one only the files of meta are compared, which alone are read of each.
    """
    found, whole = {}, False
    for step in reversed(on_disk(folder)):
        at = folder / str(step)
        if reason := checksums.fault(at, within="meta" if whole else ""):
            found[step] = reason
        else:
            whole = True
    return found


def _put_aside(folder: Path, name: str) -> None:
    target = folder / DAMAGED / name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    (folder / name).replace(target)


def not_in_base(frozen: Mapping[str, Any], base: Mapping[str, Any]) -> tree.Flat:
    """The frozen leaves that differ from the base's, bit for bit, or that it lacks.

    Args:
      frozen: `{path: leaf}` of an adapted model; its stack may be cut into segments.
      base: `{path: leaf}` of the base as it was loaded, packed kernels and all, in one segment.
    """
    return {path: leaf for path, leaf in frozen.items() if not _same(leaf, _in_base(path, base))}


def _in_base(path: str, base: Mapping[str, Any]) -> Any:
    if path in base or not (cut := _SEGMENT.match(path)):
        return base.get(path)
    whole = base.get(tree.canonical(path))
    return None if whole is None else jax.tree.map(lambda leaf: leaf[int(cut[1]) : int(cut[2])], whole)


def _same(leaf: Any, other: Any) -> bool:
    if leaf is other or other is None:
        return leaf is other
    ours, theirs = jax.tree.leaves(leaf), jax.tree.leaves(other)
    return len(ours) == len(theirs) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(jnp.array_equal(x, y))
        for x, y in zip(ours, theirs, strict=True)
    )


def _changing(state: TrainState) -> dict[str, Any]:
    """What a step changes, and the key."""
    fields = state._asdict()
    del fields["frozen"]
    if not state.moved:
        del fields["moved"]
    return fields


def _abstract(leaves: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), leaves)


def _reason(error: BaseException) -> str:
    """Why a write or a read failed, in a few words: tensorstore's messages run over many lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if found := _OS_ERROR.search(text):
        return os.strerror(int(found[1]))
    return text[:200] or type(error).__name__
