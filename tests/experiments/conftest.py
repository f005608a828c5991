"""What tests of committed figures share: they are drawn from data, never measured again."""

import pytest

from jaxpeft.memory import aot


@pytest.fixture
def no_compiler(monkeypatch) -> None:
    """Nothing is compiled for a target: a figure that is not in the data is an error here, not minutes of compiling."""

    def refuse(*args, **kwargs):
        raise AssertionError("nothing should be compiled")

    monkeypatch.setattr(aot, "_compiled", refuse)
