"""Shared fixtures. JAX is held to the CPU (unless told otherwise) before its import."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of a test's time is compilation, most of that optimisation of code that runs once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

from pathlib import Path

import jax
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints and texts: $JAXPEFT_DATA, else ../shared/data; or a skip."""
    folder = Path(os.environ.get("JAXPEFT_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set JAXPEFT_DATA")
    return folder


@pytest.fixture(scope="module")
def optimised():
    """A whole file compiles as its user would: for tests of compiled programs' memory."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
