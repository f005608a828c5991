"""Files and compiled programs that the tests of whole runs share."""

from pathlib import Path

import jax
import pytest

from tests import runs


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl and eval.jsonl."""
    return runs.make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """What XLA has compiled, for this process and those that the tests start: what short runs spend their time on."""
    folder = tmp_path_factory.mktemp("xla")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
