"""Compiled programs on disk: found again, made again where damaged, and left out where they cannot be kept."""

import contextlib
import os
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from jaxpeft import compilation, files
from jaxpeft.errors import InputError, Notice

CACHE = "jax_compilation_cache_dir"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own, where JAX has been given none."""
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update(CACHE, None)
    yield tmp_path / "cache"
    jax.config.update(CACHE, before)


@contextlib.contextmanager
def events():
    """What JAX says of its cache meanwhile: how often a program was found and not found."""
    counts = {"hits": 0, "misses": 0}

    def listen(event, **_):
        name = event.rpartition("/cache_")[2]
        if name in counts:
            counts[name] += 1

    jax.monitoring.register_event_listener(listen)
    yield counts
    jax.monitoring.unregister_event_listener(listen)


def compute(wanted=True):
    """Compiles and runs a small program under the cache; what the cache had of it."""
    jax.clear_caches()
    with compilation.cached(wanted) as folder, events() as counts:
        assert jax.jit(lambda x: jnp.cumsum(x) * 3)(jnp.arange(4))[3] == 18
    return folder, counts


def test_a_program_is_compiled_once(cache):
    folder, counts = compute()
    assert folder == compilation.folder() and folder.parent == cache / "compiled"
    assert counts["misses"] and not counts["hits"]
    assert list(folder.glob("jit*"))
    assert folder.stat().st_mode & 0o077 == 0
    assert compute()[1] == {"hits": counts["misses"], "misses": 0}
    assert jax.config.jax_compilation_cache_dir is None


def folder_instead(file):
    file.unlink()
    (file / "below").mkdir(parents=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: os.truncate(file, 0),
        lambda file: file.write_bytes(file.read_bytes()[::-1]),
        folder_instead,
    ],
)
def test_damaged_programs_are_made_again(cache, damage):
    folder, counts = compute()
    other = folder / "other-0-cache"
    for file in [*folder.iterdir()]:
        damage(file)
    other.write_text("of another program")
    with pytest.warns(Notice, match="compiled programs are damaged, and made again") as said:
        compute()
    assert len(said) == 1 and other.exists()
    assert compute()[1] == {"hits": counts["misses"], "misses": 0}


def test_programs_that_cannot_be_kept(cache):
    cache.write_text("a file")
    with pytest.warns(Notice, match=r"compiled programs are not kept: Not a directory"):
        assert compute()[0] is None
    cache.unlink()

    with pytest.warns(Notice, match="not kept: OSError: no space left$") as said, compilation.cached():
        for name in ("jit_step", "jit_other"):  # as JAX says it
            warnings.warn(
                f"Error writing persistent compilation cache entry for '{name}': OSError: no space left", stacklevel=1
            )
    assert len(said) == 1


def test_a_folder_of_the_users_own_is_left_as_it_is(cache, tmp_path):
    own = tmp_path / "own"
    jax.config.update(CACHE, str(own))
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    with compilation.cached() as folder:
        assert folder == own and jax.config.jax_persistent_cache_min_compile_time_secs == before
    assert not cache.exists()
    with compilation.cached(False) as folder:
        assert folder is None and not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache
    compute()
    for file in own.iterdir():
        file.write_bytes(b"")
    with pytest.warns(Notice, match=f"{own}: compiled programs cannot be read: ") as said:
        compute()
    assert len(said) == 1 and all(file.stat().st_size == 0 for file in own.iterdir())


def test_not_wanted(cache):
    folder, counts = compute(wanted=False)
    assert folder is None and not any(counts.values()) and not cache.exists()
    jax.config.update("jax_enable_compilation_cache", False)  # as $JAX_ENABLE_COMPILATION_CACHE=false
    assert compute()[0] is None and not cache.exists()
    jax.config.update("jax_enable_compilation_cache", True)


def test_a_home_folder_that_is_not_there(cache, monkeypatch):
    monkeypatch.setenv("JAXPEFT_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(InputError, match=r"\$JAXPEFT_CACHE ~nobody-of-this-name/cache: there is no such home folder"):
        compute()


@pytest.mark.parametrize("unknown", [lambda: None, lambda: 1 / 0])
def test_a_program_from_the_cache_that_does_not_know_its_memory_is_compiled(unknown):
    class Lowered:
        def compile(self, options=None):
            known = options is not None and not jax.config.jax_enable_compilation_cache
            return types.SimpleNamespace(memory_analysis=(lambda: "bytes") if known else unknown)

    assert compilation.compiled(Lowered()).memory_analysis() == "bytes"
    assert jax.config.jax_enable_compilation_cache
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(3))
    assert compilation.compiled(lowered).memory_analysis().argument_size_in_bytes == 12


def test_what_was_not_used_for_longest_is_deleted(tmp_path):
    for age, name in enumerate(["new", "folder", "old", "older"]):
        entry = tmp_path / name
        if name == "folder":
            entry.mkdir()
            entry /= "rows"
        entry.write_bytes(bytes(100))
        os.utime(entry, (1e9 - age, 1e9 - age))
    files.prune(tmp_path, 400)
    assert len(list(tmp_path.iterdir())) == 4
    files.prune(tmp_path, 399)
    assert {entry.name for entry in tmp_path.iterdir()} == {"new"}
    files.prune(tmp_path / "nowhere", 1)


def test_a_command_neither_imports_torch_nor_compiles_twice(tmp_path):
    code = (
        "import sys; sys.argv[1:] = ['generate', '--prompt', 'The', '--max-new-tokens', '2']; "
        "from jaxpeft.cli import main; main(); sys.exit(str(sys.modules.get('torch')))"
    )
    environment = {**os.environ, "JAXPEFT_CACHE": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    kept = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stderr == "None\n" and done.stdout.startswith("The")
        kept.append(sorted(file.name for file in tmp_path.glob("compiled/*/*")))
    assert kept[0] == kept[1] and any(name.startswith("jit__steps") for name in kept[0])
