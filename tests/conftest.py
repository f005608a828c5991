"""Shared fixtures. JAX is held to the CPU (unless told otherwise) before its import."""

import gc
import importlib.metadata
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of a test's time is compilation, most of that optimisation of code that runs once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's newer emitters take four times as long to compile for a CPU; later releases have no others.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers, files and the processes that tests start compile many of the same programs: each once in a session.
    # The folder's object lives as long as this module: the session's process, which starts the workers.
    _compiled = tempfile.TemporaryDirectory(prefix="jaxpeft-xla-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    # All of them: of seven files 147 seconds of CPU, 152 where what compiles within 0.3 seconds is not written.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from pathlib import Path

import hypothesis
import jax
import pytest

# What is cached for the next run stays out of the user's folder, and goes with the tests.
_cache = tempfile.TemporaryDirectory(prefix="jaxpeft-cache-")
os.environ.setdefault("JAXPEFT_CACHE", _cache.name)

# Without the phase that explains a failure by the lines that ran, after one: it traces all Python code, and under that
# CPython 3.11 was seen to stay in one instruction for ever.
_phases = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain]
hypothesis.settings.register_profile("untraced", phases=_phases)
hypothesis.settings.load_profile("untraced")

# What a trace makes and drops is collected seldom: of one file (miss_test) 30.0 seconds of CPU in place of 32.8.
gc.set_threshold(200_000, 20, 100)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_make_parametrize_id(val: object) -> str | None:
    """The part of a test's name that `val` gives: bytes give none of their own, None leaves the rest to pytest.

    A file's bytes may hold the time at which they were made (gzip's do), and workers must agree on every test's name.
    """
    return "bytes" if isinstance(val, bytes) else None


def _test_of(case: str) -> str:
    """The name of a test without its case's."""
    return case.partition("[")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases in slow.txt are slow ones, as those with the mark.

    Raises:
      UsageError: where whole files are collected, and one of them lacks a test that the list names, or the list leaves
        no case of it.
    """
    lines = (REPOSITORY / "tests" / "slow.txt").read_text().splitlines()
    slow = {line for line in lines if "::" in line}
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    if any("::" in word for word in config.args):
        return
    files = {item.nodeid.partition("::")[0] for item in items}
    left = {_test_of(item.nodeid) for item in items if item.get_closest_marker("slow") is None}
    if lost := sorted(name for name in slow if name.partition("::")[0] in files and _test_of(name) not in left):
        raise pytest.UsageError(f"tests/slow.txt: without {lost[0]} no case of that test is left")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints and texts: $JAXPEFT_DATA, else ../shared/data; or a skip."""
    folder = Path(os.environ.get("JAXPEFT_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set JAXPEFT_DATA")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _compiled_functions_end_with_their_file():
    """Frees a file's executables. Each maps three regions of memory, of which Linux gives a process 65,530
    (`vm.max_map_count`); XLA's compiler dies of a segmentation fault where it gets no more. What lives on is of the
    process (torch, transformers), and is not gone through again: of twelve files 207 seconds of CPU in place of 219."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def optimised():
    """A whole file compiles as its user would: for tests of compiled programs' memory."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
