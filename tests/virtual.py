"""Processes of several virtual devices."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def devices(count: int, *flags: str) -> dict[str, str]:
    """The environment of a process of `count` virtual CPU devices, which compiles as this one does (conftest.py)."""
    words = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={count}", *flags]
    return {**os.environ, "XLA_FLAGS": " ".join(words), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
