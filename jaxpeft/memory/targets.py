"""Devices that are described, not attached: their names, and what JAX takes for them.

XLA's ahead-of-time compilers for TPUs (libtpu) and NVIDIA GPUs (JAX's CUDA plugin and ptxas) run on any machine with a
CPU; `aot` compiles for them. The kinds of devices and the sources of their figures are in kinds.py.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jaxpeft import tree
from jaxpeft.errors import InputError, first_line
from jaxpeft.memory import slices
from jaxpeft.memory.kinds import GPU_FRACTION, TARGETS, Kind


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
        raise not_installed(target)
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
        # JAX sets 1; the compiler's remarks on memory, warnings and errors of its log, are what `aot.compile` returns.
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
        return not_installed(target)
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


def not_installed(target: Target) -> InputError:
    """What is said where a target's compiler is not there."""
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


# The attached device.


def attached(target: Target) -> bool:
    """Whether the target is what JAX has attached here: such devices, and at least as many."""
    return jax.devices()[0].device_kind in TARGETS[target.kind].names and jax.device_count() >= target.chips
