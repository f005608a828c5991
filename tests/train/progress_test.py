"""Progress: numbers from a clock of ours, a bar in a terminal, lines elsewhere."""

import io

import pytest

from jaxpeft.train.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream, steps, start=0, lines=20):
    """Each step takes two seconds, the first twenty."""
    times = iter(20.0 + 2.0 * step for step in range(steps - start))
    with Progress(steps, start, stream=stream, lines=lines, clock=lambda: next(times)) as progress:
        for step in range(start + 1, steps + 1):
            progress.update(step, 3.0, tokens=100)
        progress.note("saved [here]")


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    run(stream, steps=10, lines=2)
    assert stream.getvalue().splitlines() == [
        "step 5/10  loss 3.0000  50 tokens/s  0:10 left",
        "step 10/10  loss 3.0000  50 tokens/s  0:00 left",
        "saved [here]",
    ]


def test_a_resumed_run_counts_only_its_own_steps():
    stream = io.StringIO()
    run(stream, steps=10, start=6, lines=1)
    assert stream.getvalue().splitlines() == [
        "step 8/10  loss 3.0000  50 tokens/s  0:04 left",
        "step 10/10  loss 3.0000  50 tokens/s  0:00 left",
        "saved [here]",
    ]


def test_a_bar_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    run(stream, steps=4)
    shown = stream.getvalue()
    assert "4/4" in shown and "━" in shown and "50 tokens/s" in shown
    assert "saved [here]" in shown


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.2, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text
