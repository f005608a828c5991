"""A run's progress on stderr: a bar in a terminal, a line now and then anywhere else."""

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TextIO

import rich.console
import rich.progress

from jaxpeft import distributed
from jaxpeft.errors import printable


class Progress:
    """Shows loss, tokens/s and the time left while a run goes on.

    The rate is the mean since the first step ended, because that one holds the compilation.

    Args:
        steps: the run's last step.
        start: the step that the run continues from.
        stream: where to write; stderr by default.
        lines: how many lines to write, about, where the stream is not a terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        stream: TextIO | None = None,
        lines: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = rich.console.Console(file=stream or sys.stderr, highlight=False)
        self._steps, self._clock = steps, clock
        self._every = max(1, (steps - start) // lines)
        self._first: tuple[float, int] | None = None  # when and at which step the rate's mean began
        self._tokens = 0
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, numbers="compiling")

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Tells that a step is done.

        Args:
            step: its number, from start + 1 to steps.
            loss: its mean loss.
            tokens: the tokens in its batch, padding left out.
        """
        numbers = f"loss {loss:.4f}" + self._pace(step, tokens)
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal and (step % self._every == 0 or step == self._steps):
            self.note(f"step {step}/{self._steps}  {numbers}")

    def note(self, text: str) -> None:
        """Writes a line of its own, above the bar where there is one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _pace(self, step: int, tokens: int) -> str:
        now = self._clock()
        if self._first is None:
            self._first = (now, step)
            return ""
        began, first_step = self._first
        self._tokens += tokens
        seconds = max(now - began, 1e-9)
        left = seconds / max(step - first_step, 1) * (self._steps - step)
        return f"  {self._tokens / seconds:,.0f} tokens/s  {duration(left)} left"

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss, rounded up.

    >>> duration(59.2), duration(3723)
    ('1:00', '1:02:03')
    """
    whole = int(-(-seconds // 1))
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"


def say(text: str) -> None:
    """A line on stderr; of several processes the first one's."""
    if distributed.is_first():
        sys.stderr.write(printable(text) + "\n")


def ranges(lines: Iterable[Iterable[int]]) -> str:
    """Line numbers in order, neighbours joined.

    >>> ranges([[7, 3], [8], [9, 20]])
    '3, 7-9, 20'
    """
    parts: list[list[int]] = []
    for line in sorted({line for row in lines for line in row}):
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
