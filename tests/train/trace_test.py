"""Steps that JAX's profiler records."""

import re

import jax
import pytest

from jaxpeft.errors import InputError
from jaxpeft.train.run import Run
from jaxpeft.train.trace import Trace, parse


def test_steps():
    assert (parse("3"), parse("10-12")) == ((3, 3), (10, 12))


@pytest.mark.parametrize("text", ["", "0", "3-", "5-4", "a-b", "1-2-3", "-1"])
def test_refusals(text):
    with pytest.raises(InputError, match=re.escape(f"--profile-steps {text}: should be a step or FIRST-LAST")):
        parse(text)
    with pytest.raises(InputError, match="--profile-steps 9-11: the run has 10 steps"):
        Run(steps=10, profile_steps="9-11").check()


def test_a_range_of_steps_is_recorded(tmp_path, monkeypatch):
    """From the first of them that is taken on, also where the run goes on within it; what has begun is ended."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("begin"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("end"))
    for first, expected in ((2, [2, "begin", 3, 4, "end", 5]), (4, ["begin", 4, "end", 5]), (5, [5])):
        calls.clear()
        trace = Trace(tmp_path, "3-4")
        for step in range(first, 6):
            trace.before(step)
            calls.append(step)
            trace.after(step, None)
        assert calls == expected
    trace = Trace(tmp_path, "1-4")
    trace.before(1)
    trace.close()
    trace.close()
    assert calls[-2:] == ["begin", "end"]
