"""How programs are compiled, and kept for the next run: JAX's persistent compilation cache, in the user's cache folder.

    CACHE/compiled/MACHINE/   JAX's files, one for each program

CACHE is `files.cache_folder()`. MACHINE is a digest of what the processor can do: a program for a CPU is its machine
code, and a home folder may serve several machines. Everything else that a program follows from, the versions of JAX
and XLA, flags and devices, is in JAX's own keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxpeft import files
from jaxpeft.errors import Notice

MOST_BYTES = 2 * 2**30
# JAX's own defaults leave out what compiles within a second: most of what a small model's start waits for.
_SETTINGS: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_raise_persistent_cache_errors": False,
}

# XLA has no 16-bit arithmetic on a CPU: it widens a layer's slice of a stack as the slice of a widened stack. Without
# this pass that stays where it is, and costs a layer; with it, the widened stack is made before the loop, and kept.
_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}}

_READING, _WRITING = (f"Error {doing} persistent compilation cache" for doing in ("reading", "writing"))


def folder() -> Path:
    """Where the programs of this machine are kept."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    able = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))} or set(lines)
    digest = hashlib.sha256("\n".join([platform.machine(), *sorted(able)]).encode()).hexdigest()
    return files.cache_folder() / "compiled" / digest[:16]


def in_use() -> str | None:
    """The folder in which JAX keeps compiled programs now, None where it keeps none."""
    return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


@contextlib.contextmanager
def cached(wanted: bool = True) -> Iterator[Path | None]:
    """Within it, what JAX compiles is kept on disk, and what is there is not compiled; gives the folder, None without.

    Where JAX has been given a folder of the user's ($JAX_COMPILATION_CACHE_DIR), that one is used, as it was set up.
    The files that were least recently used go when there are more than MOST_BYTES.

    Warns if the folder cannot be written, or holds damaged files, which are removed; programs are compiled then.
    """
    if not wanted or not jax.config.jax_enable_compilation_cache:
        with _settings({"jax_enable_compilation_cache": False}):
            yield None
        return
    if theirs := jax.config.jax_compilation_cache_dir:
        with _in_one_line(Path(theirs), ours=False):
            yield Path(theirs)
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=place).close()
        files.prune(place, MOST_BYTES)
    except OSError as error:
        warnings.warn(f"{place}: compiled programs are not kept: {error.strerror or error}", Notice, 3)
        yield None
        return
    with _settings({"jax_compilation_cache_dir": str(place), **_SETTINGS}), _in_one_line(place):
        yield place


def options(platform: str) -> dict[str, Any]:
    """The compiler's options for whole steps on "cpu", "cuda" or "tpu", as `jax.jit(compiler_options=...)` takes them.

    On a CPU they keep a step in a 16-bit type from holding the stacks of kernels and of kept arrays in float32 as well.
    """
    return dict(_OPTIONS.get(platform, {}))


def compiled(lowered: Any) -> Any:
    """`lowered` compiled with `options` for the default backend, of which the `memory_analysis()` is known.

    Not every platform can say it of a program that comes from the cache; there it is compiled.
    """
    chosen = options(jax.default_backend())
    executable = lowered.compile(chosen) if chosen else lowered.compile()
    with contextlib.suppress(Exception):  # what a platform raises that cannot is its own
        if executable.memory_analysis() is not None:
            return executable
    with _settings({"jax_enable_compilation_cache": False}):
        return lowered.compile(chosen)  # options, though there be none: without them it would give the same one again


@contextlib.contextmanager
def _settings(values: dict[str, Any]) -> Iterator[None]:
    """JAX's configuration with these values; the cache is opened anew with them, and with the old ones afterwards."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    if values:
        compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        if values:
            compilation_cache.reset_cache()


@contextlib.contextmanager
def _in_one_line(place: Path, ours: bool = True) -> Iterator[None]:
    """What JAX warns of files in the cache is said once; damaged ones of ours go: JAX would not replace them."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        said: set[str] = set()

        def one_line(message: Warning | str, category: type[Warning], *where: Any) -> None:
            text = str(message)
            if text.startswith(_READING):
                line = f"{place}: compiled programs are damaged, and made again"
                if ours:
                    _remove(place, text)
                else:
                    line = f"{place}: compiled programs cannot be read: {text.partition(': ')[2]}"
            elif text.startswith(_WRITING):
                line = f"{place}: compiled programs are not kept: {text.partition(': ')[2]}"
            else:
                show(message, category, *where)
                return
            if not said:
                said.add(line)
                show(Notice(line), Notice, *where)

        warnings.showwarning = one_line  # type: ignore[assignment]
        yield


def _remove(place: Path, warning: str) -> None:
    """Removes the programs of the name that a warning of JAX's names, or all of them."""
    name = re.search(r"entry for '([\w.-]+)'", warning)
    with contextlib.suppress(OSError):
        for entry in place.glob(f"{name[1]}-*" if name else "*"):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
