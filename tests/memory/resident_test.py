"""What a call takes of memory, as the device or the system counts it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.errors import InputError
from jaxpeft.memory import resident

pytestmark = pytest.mark.usefixtures("optimised")


def test_the_most_that_is_resident_is_of_the_call():
    """Not what was there before it, nor what it has given back at the end."""
    size = 64 * 2**20
    there = np.ones(size, np.uint8)
    assert resident.most_resident(lambda: np.ones(size, np.uint8).sum() + there[0]) == pytest.approx(size, rel=0.05)


def test_a_system_that_does_not_count_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(resident, "_PROCESS", tmp_path / "absent")
    with pytest.raises(InputError, match="no memory statistics on this cpu: .*; measure on Linux, a GPU or a TPU"):
        resident.measured_peak(jnp.sin, jnp.ones(8))


def test_the_measured_peak(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"peak_bytes_in_use": 12345})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert resident.measured_peak(lambda: 1) == 12345
    device.memory_stats = lambda: None
    with pytest.raises(InputError, match="no memory statistics on gpu"):
        resident.measured_peak(lambda: 1)
