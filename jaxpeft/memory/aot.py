"""Compiling ahead of time for a target: what its compiler says a function needs there.

Compiling for abstract arguments allocates nothing and gives the compiler's own buffer assignment:

    total = arguments + outputs - aliases + temporaries

An alias is an output that takes a donated argument's buffer. Where a TPU's compiler refuses a program because it does
not fit, it still writes the assignment that was too large; `compile` reads that, so the figure is exact there too. (The
message's "total memory required for HLO temporaries (24.12G)" is that sum, arguments and outputs included, rounded.)
A GPU's compiler never refuses. Both recompute by themselves before they go beyond the device (a GPU's, beyond 90 % of
it): a program close to the limit may be another one than on a larger device.

On a TPU `memory_analysis().temp_size_in_bytes` is not the assignment's: for a program with loops it is larger, by
buffers that never exist (a scan over layers whose arguments, outputs and "temp" make 16.25 GiB is accepted on a v5e of
15.75 GiB; its assignment, and `peak_memory_in_bytes`, are 13.25 GiB). `compile` reports the assignment's.

A TPU keeps small intermediates in on-chip memory (128 MiB on v5e and v5p), which `temporaries` doesn't count: a small
model's temporaries may be 0 there.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from jaxlib.mlir import ir

from jaxpeft.errors import Notice
from jaxpeft.executable import Memory, analysed, assigned
from jaxpeft.memory import hlo
from jaxpeft.memory.kinds import GPU_FRACTION
from jaxpeft.memory.targets import Target, devices, not_installed
from pallas_kernels.platform import tracing_for


class Compiled(NamedTuple):
    """What the target's compiler made of a function.

    Attributes:
      memory: what it needs, of one device.
      executable: None if the compiler refused it because it does not fit.
      fits: whether `memory.total` is within the target's `usable_bytes`, and the compiler did not refuse.
      dump: the folder of XLA's files, if one was asked for.
    """

    memory: Memory
    executable: Any
    fits: bool
    dump: Path | None


def compile(
    target: Target,
    function: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    dump: str | os.PathLike[str] | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles `function(*args)` for a target; nothing is allocated or run.

    Args:
      target: what to compile for.
      function: as for `jax.jit`.
      *args: pytrees of `ShapeDtypeStruct`s or arrays. A leaf without a sharding goes to the target's first device.
      donate_argnums: arguments whose buffers the outputs may take.
      dump: a folder for XLA's files: HLO before and after optimisation, buffer assignment, live ranges.
      in_shardings: as for `jax.jit`, over `devices(target)`, in place of the arguments' own.
      out_shardings: as for `jax.jit`; None leaves them to the compiler.
      options: of the compiler, as `jax.jit(compiler_options=...)` takes them.

    Raises:
      InputError: if the target's compiler is not installed.
      jax.errors.JaxRuntimeError: if the compiler refuses for another reason than the device's memory.
    """
    shardings = {"in_shardings": in_shardings} if in_shardings is not None else {}
    shardings |= {"out_shardings": out_shardings} if out_shardings is not None else {}
    default = None if in_shardings is not None else SingleDeviceSharding(devices(target)[0])
    with tracing_for(target.platform, devices(target)[0]):
        lowered = jax.jit(function, donate_argnums=donate_argnums, **shardings).lower(*abstract(args, default))
    return compile_lowered(target, lowered, dump, options)


def in_host_memory(lowered: Any) -> Any:
    """The lowered function, whose donated arguments lie in the host's memory where the results in their place do.

    JAX says so itself where devices show the memories that they have, which a described GPU does not.
    """
    module = lowered.compiler_ir()
    (main,) = (each for each in module.body.operations if str(each.attributes["sym_name"]).strip('"') == "main")
    results = list(main.attributes["res_attrs"])
    with module.context:
        changed = []
        for argument in main.attributes["arg_attrs"]:
            place = argument["tf.aliasing_output"].value if "tf.aliasing_output" in argument else None
            if place is not None and "mhlo.memory_kind" in results[place]:
                own = {each.name: each.attr for each in argument}
                argument = ir.DictAttr.get({**own, "mhlo.memory_kind": results[place]["mhlo.memory_kind"]})
            changed.append(argument)
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(changed)
    return lowered


def compile_lowered(
    target: Target,
    lowered: Any,
    dump: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """What `compile` does with a function that is lowered for the target's devices."""
    executable, refusal = None, None
    with _dump_folder(target, dump) as folder:
        options = {**(_GPU_OPTIONS if target.platform == "cuda" else {}), **(options or {})}
        if folder is not None:
            options = {**options, "xla_dump_to": str(folder), **hlo.DUMP_OPTIONS}
        try:
            with contextlib.nullcontext() if folder is None else without_cache():
                executable = _compiled(lowered, options)
        except jax.errors.JaxRuntimeError as error:
            if _NO_TOOLKIT.search(str(error)):
                raise not_installed(target) from error
            if not _REFUSED.search(str(error)):
                raise
            refusal = error
        assignment = _newest(folder, "*buffer-assignment.txt") if target.platform == "tpu" else None
        written = None if assignment is None else assigned(assignment.read_text())
    if executable is None and written is None:
        assert refusal is not None
        raise refusal
    memory = analysed(target.platform, executable.memory_analysis(), written) if executable is not None else written
    assert memory is not None
    fits = executable is not None and memory.total <= target.usable_bytes
    return Compiled(memory, executable, fits, None if dump is None else Path(dump))


def _compiled(lowered: Any, options: dict[str, Any]) -> Any:
    """The executable, of a GPU without Triton's products where the first of its tilings cannot be.

    With no device there is no autotuner to try others; the library's products take their place, as advised in the
    review of openxla/xla#36792.
    """
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not _NO_TILES.search(str(error)):
            raise
    said = "XLA finds no Triton tiles for a product and has no device to try others on; all are compiled without Triton"
    warnings.warn(said, Notice, stacklevel=4)
    return lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False})


# XLA computes again what would go beyond a share, in percent, of the memory that it may count on: of the allocator's
# where a device is attached, of 80 % of the device's where one is described. So the described one's share is that of
# the attached one, 95 %, of a larger part.
_GPU_OPTIONS = {"xla_gpu_memory_limit_slop_factor": round(95 * GPU_FRACTION / 0.8)}

# Not the on-chip memories ("... in memory space vmem"): those are a kernel's mistake.
_REFUSED = re.compile(r"Ran out of memory (on|in memory space) hbm", re.IGNORECASE)
_NO_TILES = re.compile("Couldn't find output tile sizes")
_NO_TOOLKIT = re.compile("No PTX compilation provider|libdevice not found")  # the wheels nvidia-cuda-nvcc, nvidia-nvvm


def abstract(args: Any, default: SingleDeviceSharding | None) -> Any:
    """Arguments as ShapeDtypeStructs; an array's own device, which is not the target's, is forgotten."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        struct = x if isinstance(x, jax.ShapeDtypeStruct) else jax.eval_shape(lambda x: x, x)
        own = x.sharding if isinstance(x, jax.ShapeDtypeStruct) and default is not None else None
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=own or default, weak_type=struct.weak_type)

    return jax.tree.map(leaf, args)


@contextlib.contextmanager
def _dump_folder(target: Target, dump: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """`dump`; else one that goes away for a TPU, whose compiler may refuse; else None."""
    if dump is not None:
        yield Path(dump)
    elif target.platform == "tpu":
        with tempfile.TemporaryDirectory(prefix="jaxpeft-xla-") as folder:
            yield Path(folder)
    else:
        yield None


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Without JAX's persistent compilation cache, whose executables come without the compiler's files."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether it is in use is asked once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _newest(folder: Path | None, pattern: str) -> Path | None:
    return max(folder.glob(pattern), key=lambda file: file.stat().st_mtime, default=None) if folder else None
