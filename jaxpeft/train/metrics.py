"""A run's numbers on disk: metrics.jsonl, one JSON object a line, and TensorBoard events.

A row is a flat dict of numbers and short texts with at least `step` (int: the steps done, 0 for
an evaluation before the first) and `split` ("train" or "eval"). Rows are appended and flushed one
at a time, so that a killed run loses at most the line it was writing; `truncate` takes back what
lies beyond the checkpoint to resume.
"""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from jaxpeft import documents
from jaxpeft.errors import InputError


class MetricsLog:
    """Appends rows to FOLDER/metrics.jsonl and their numbers to events in FOLDER/tensorboard.

    Args:
        folder: the run's folder; created when absent.
        after_step: the step of the checkpoint that the run continues from: rows and events beyond
            it are dropped. None starts anew and drops them all.
    """

    def __init__(self, folder: Path, after_step: int | None = None):
        import tensorboardX

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        last = -1 if after_step is None else after_step
        truncate(self.path, last)
        self._file = self.path.open("a", encoding="utf-8")
        self._opened = os.fstat(self._file.fileno())
        # TensorBoard hides the events from purge_step on that an earlier, killed run left behind.
        self._events = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row: `step`, `split` and plain Python numbers or texts.

        A non-finite number becomes null: JSON has no word for it.
        """
        row = {key: None if _non_finite(value) else value for key, value in row.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                self._events.add_scalar(f"{row['split']}/{key}", value, row["step"])
        if row["split"] == "eval":
            self._events.flush()

    def there(self) -> bool:
        """Whether what is written is in the file of this name: neither it nor the folder was deleted or moved."""
        try:
            return os.path.samestat(self._opened, os.stat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def close(self) -> None:
        """Writes what is still buffered."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Unwritten(MetricsLog):
    """The log of a process that writes none."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"

    def write(self, row: dict[str, Any]) -> None:
        """Writes nothing."""

    def there(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Does nothing."""


class _Row(TypedDict):
    step: documents.Index
    split: Literal["train", "eval"]
    loss: NotRequired[documents.Number | None]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that was cut off in writing.

    Raises:
        InputError: for any other line that is not a JSON object with an integer `step`.
    """
    *lines, _ = path.read_bytes().split(b"\n")  # _: empty, or a line cut off
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}: not a row of metrics"
        try:
            rows.append(documents.checked(where, _Row, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, InputError) else InputError(f"{where}: {line[:80]!r}") from None
    return rows


def truncate(path: Path, step: int) -> None:
    """Keeps the rows up to and including a step, atomically; an absent file stays absent.

    Raises:
        InputError: for a file that is not a metrics.jsonl.
    """
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
