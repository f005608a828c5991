"""Devices that are described, not attached, and what their compilers say a function needs there.

XLA's ahead-of-time compilers for TPUs (libtpu) and NVIDIA GPUs (JAX's CUDA plugin and ptxas) run on any machine with a
CPU. Compiling for abstract arguments allocates nothing and gives the compiler's own buffer assignment:

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

The kinds of devices and the sources of their figures are in kinds.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxlib.mlir import ir

from jaxpeft import tree
from jaxpeft.errors import InputError, Notice, first_line
from jaxpeft.executable import Memory, analysed, assigned
from jaxpeft.memory import hlo, slices
from jaxpeft.memory.kinds import GPU_FRACTION, TARGETS, Kind
from jaxpeft.memory.resident import most_resident
from pallas_kernels.platform import tracing_for


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for: one device, a slice of TPUs, or hosts of GPUs.

    Attributes:
      name: as the user wrote it: "v5p:4x4x4", "h200", "h200x8x2", "cpu".
      platform: "tpu", "cuda" or "cpu".
      chips: devices: a slice's chips (on tpu7x, where JAX shows two devices per chip, twice as many), all GPUs of all
        hosts; 1 for a plain name.
      memory_bytes, bandwidth, flops, source, host_bandwidth: of ONE device; see `Kind`. What a run may take of the
        memory is `usable_bytes`.
      kind: the key of TARGETS.
      shape: chips in every dimension of the slice; (GPUs of a host, hosts); () for a plain name.
    """

    name: str
    platform: str
    chips: int
    memory_bytes: int
    bandwidth: float | None
    flops: float | None
    source: str
    kind: str
    shape: tuple[int, ...] = ()
    host_bandwidth: float | None = None

    @property
    def usable_bytes(self) -> int:
        """Of one device's memory, what a run may take: see kinds.py."""
        return int(GPU_FRACTION * self.memory_bytes) if self.platform == "cuda" else self.memory_bytes


def target(text: str) -> Target:
    """The target that `text` names: a key of TARGETS, with a slice's shape or numbers of GPUs for several devices.

    Raises:
      InputError: for an unknown name, or a shape that such devices don't come in (see `slices`).
    """
    name, colon, written = text.strip().partition(":")
    name, kind, shape = (name, TARGETS[name], ()) if name in TARGETS else _hosts(text, name)
    if colon and kind.platform != "tpu":
        several = f", or {name}x8 for a host of 8" if kind.link else ""
        raise InputError(f"target {text!r}: only a TPU has a slice shape; write {name}{several}")
    if colon:
        shape = slices.of_tpu(text, name, kind, written)
    chips = math.prod(shape) * kind.devices_per_chip if shape else 1
    figures = (kind.memory_bytes, kind.bandwidth, kind.flops, kind.source)
    return Target(text.strip(), kind.platform, chips, *figures, name, shape, kind.host_bandwidth)


def _hosts(text: str, written: str) -> tuple[str, Kind, tuple[int, ...]]:
    """What h200x8x2 names."""
    for name, kind in TARGETS.items():
        if kind.platform == "cuda" and re.fullmatch(rf"{name}x[\dx]*", written):
            return name, kind, slices.of_gpus(text, name, kind, written.removeprefix(f"{name}x"))
    raise InputError(
        f"target {text!r} is not known; did you mean {tree.nearest(written, TARGETS, 2)}? Known: {', '.join(TARGETS)}"
    )


def targets(text: str) -> list[Target]:
    """The targets of a list with commas: "h200,v5p". Raises as `target` does, and InputError for an empty list."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"targets {text!r}: name at least one of {', '.join(TARGETS)}")
    return [target(name) for name in names]


# Their devices.


@functools.cache
def devices(target: Target) -> list[jax.Device]:
    """The described devices (for the cpu: this machine's, one), for use in shardings and meshes.

    Raises:
      InputError: if the target's compiler is not installed, cannot be loaded, or does not accept the slice.
    """
    kind = TARGETS[target.kind]
    if target.platform == "cpu":
        return jax.devices("cpu")[:1]
    describe = _describe_tpu if target.platform == "tpu" else _describe_gpu
    described = list(describe(target, kind).devices)
    return described if target.shape else described[:1]


def _describe_tpu(target: Target, kind: Kind) -> Any:
    if not _installed("libtpu") and not os.environ.get("TPU_LIBRARY_PATH"):
        raise _missing(target)
    shape = target.shape or kind.host
    options = dict(kind.options)
    if set(shape) == {1}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        with _environment({} if _tpu_attached() else _NO_TPU):
            return topologies.get_topology_desc(f"{target.kind}:{'x'.join(map(str, shape))}", platform="tpu", **options)
    except (RuntimeError, OSError) as error:
        raise InputError(f"target {target.name!r}: libtpu does not describe it: {first_line(error)}") from error


def _describe_gpu(target: Target, kind: Kind) -> Any:
    if not kind.config.strip():  # the compiler would take an empty text, and plan for no GPU at all
        raise ValueError(f"{target.kind} has no configuration")
    try:
        # JAX sets 1; the compiler's remarks on memory, as warnings and errors of its log, are what `compile` returns.
        with _environment({"TF_CPP_MIN_LOG_LEVEL": "3"}, replace="1"):
            gpus, hosts = target.shape or (1, 1)
            topology = f"1x{hosts}x{gpus}"
            return topologies.get_topology_desc(
                platform="cuda", topology_name=target.kind, topology=topology, target_config=kind.config
            )
    except NotImplementedError:
        raise _without_plugin(target) from None
    except (RuntimeError, OSError) as error:
        raise InputError(f"target {target.name!r}: its compiler does not describe it: {first_line(error)}") from error


def _without_plugin(target: Target) -> InputError:
    """Why JAX has no plugin for NVIDIA's GPUs: where it could not be loaded, JAX has said so in its log alone."""
    installed = [name for name in _GPU_PLUGINS if _installed("jax_plugins") and _installed(name)]
    if not installed:
        return _missing(target)
    try:
        importlib.import_module(installed[0]).initialize()
        why = "was not there when JAX looked for it"
    except Exception as error:  # of whatever kind it is, one line serves the user
        why = f"cannot be loaded: {first_line(error)}"
    # The plugin then asks for none of CUDA's libraries that only a program on a device needs.
    remedy = "; on a machine without a GPU set JAX_PLATFORMS=cpu" if jax.config.jax_platforms != "cpu" else ""
    return InputError(f"target {target.name!r}: its compiler ({installed[0]}) {why}{remedy}")


_GPU_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _missing(target: Target) -> InputError:
    return InputError(f"target {target.name!r}: its compiler is not installed: pip install 'jaxpeft[describe]'")


# libtpu asks these of the machine's metadata, and complains where there is none; the last three are about its log.
_NO_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device, so nothing that only one process may hold
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def _tpu_attached() -> bool:
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


@contextlib.contextmanager
def _environment(values: Mapping[str, str], replace: str | None = None) -> Iterator[None]:
    """Sets the variables that are unset (or are `replace`), for the time in which a compiler's library reads them."""
    before = {key: os.environ.get(key) for key in values}
    ours = [key for key, value in before.items() if value is None or value == replace]
    os.environ.update({key: values[key] for key in ours})
    try:
        yield
    finally:
        for key in ours:
            if (value := before[key]) is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


# What a function needs there.


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
                raise _missing(target) from error
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


# The attached device.


def attached(target: Target) -> bool:
    """Whether the target is what JAX has attached here: such devices, and at least as many."""
    return jax.devices()[0].device_kind in TARGETS[target.kind].names and jax.device_count() >= target.chips


def measured_peak(function: Callable[..., Any], *args: Any) -> int:
    """Bytes in use at the peak, on the attached device, after `function(*args)` has run.

    An accelerator's allocator counts from the start of the process: measure in a fresh one, whose arguments are what
    the plan has. A CPU's memory is the process's, of which Linux says the most that was resident: what `function`,
    compiled (`jax.stages.Compiled`), adds to its arguments while it runs.

    Raises:
      InputError: if neither keeps such statistics.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        jax.block_until_ready(function(*jax.tree.map(jnp.copy, args)))  # the code comes into memory, too, once
        return sum(x.nbytes for x in jax.tree.leaves(args)) + most_resident(lambda: function(*args))
    jax.block_until_ready(function(*args))
    statistics = device.memory_stats()
    if not statistics or "peak_bytes_in_use" not in statistics:
        raise InputError(f"no memory statistics on {device.platform}: measure on an attached GPU or TPU")
    return int(statistics["peak_bytes_in_use"])
