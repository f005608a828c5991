"""Mosaic GPU kernels without a GPU: interpreted on the CPU, and compiled for a described one.

JAX 0.10's interpreter lacks what our kernels rely on, so it is taught here: wgmma reads transposed references; TMA
reads zeros beyond the end of an array, and writes nothing there. (Later ones do all that, and know wgmma and TMA as
asynchronous, so that they find missing waits and commits too.)
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

from jaxpeft.memory import aot, targets
from pallas_kernels import mosaic_gpu


def distance(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


class Compiled(NamedTuple):
    """What became of a function on an H200.

    opcodes: of the program's instructions, without those that do nothing.
    temporaries: bytes.
    spills: bytes that each kernel stores and loads because it has too few registers.
    in_place: kernels that write an array that they are given.
    """

    opcodes: list[str]
    temporaries: int
    spills: list[int]
    in_place: int


def compiled(capfd: pytest.CaptureFixture[str], function: Callable[..., Any], *args: Any, **static: Any) -> Compiled:
    """Compiles function(*args, **static) for an H200; a kernel that needs too much shared memory is an error."""
    if not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    capfd.readouterr()
    with mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_PTXAS="1"):
        found = aot.compile(targets.target("h200"), lambda *args: function(*args, **static), *args)
    remarks = "".join(capfd.readouterr())
    entry = found.executable.as_text().partition("ENTRY")[2]
    opcodes = re.findall(r"^ +(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(", entry, re.MULTILINE)
    return Compiled(
        [opcode for opcode in opcodes if opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast")],
        found.memory.temporaries,
        [
            int(stored) + int(loaded)
            for stored, loaded in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill l", remarks)
        ],
        entry.count("output_to_operand_aliasing"),
    )


def run(function: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """function(*args, **static, interpret=...) as NumPy arrays; memory begins as NaNs, and a race is an error."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    # With few threads for TMA, whoever waits for one copy seems to have waited for the earlier ones of that thread.
    params = mosaic_gpu.interpreter(detect_races=True, uninitialized_memory="nan", num_tma_threads_per_device=16)
    with contextlib.nullcontext() if hasattr(mosaic_gpu.plgpu, "InterpretGPUParams") else _taught():
        try:
            out = jax.tree.map(np.asarray, function(*args, **static, interpret=params))
            assert not interpreter.get_races().races_found
        finally:
            interpreter.reset_gpu_interpret_mode_state()
    return out


class _Transposed(tuple):
    """A range whose two axes are exchanged when it is read."""


@contextlib.contextmanager
def _taught() -> Iterator[None]:
    from jax._src import core
    from jax._src.pallas.mosaic.interpret import thread_map, utils
    from jax._src.pallas.mosaic_gpu.core import TransposeTransform
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

    memory = shared_memory.GPUSharedMemory
    to_range, get, put = utils.to_range, memory.get_buffer_content, memory.store_buffer_content

    def ranges(transforms):
        plain = to_range([t for t in transforms if not isinstance(t, TransposeTransform)])
        return (
            _Transposed(plain) if len(plain) and any(isinstance(t, TransposeTransform) for t in transforms) else plain
        )

    def read(self, key, place, *args, **kwargs):
        value, *rest = get(self, key, place, *args, **kwargs)
        return value.T if isinstance(place, _Transposed) else value, *rest

    def write(self, key, place, value, *args, **kwargs):
        if place:
            shape = self.mem[key].shape
            place = utils.clip_range_to_shape(place, shape)
            if place is None:
                return False, None, None
            extents = [s.stop - s.start for s in place if isinstance(s, slice)]
            value = value[tuple(slice(extent) for extent in extents)]
        return put(self, key, place, value, *args, **kwargs)

    def zeros_beyond(found, shape, _, dtype, *args):
        whole = np.zeros(shape, dtype)
        if found is not None:
            whole[tuple(slice(extent) for extent in found.shape)] = found
        return whole

    index = gpu_callbacks.get_memory_space_idx

    def index_of(space):
        """A reference of an array that is written in its own place has no space of its own: it is in GMEM."""
        return index(mosaic_gpu.plgpu.GMEM if space is None else space)

    lock, programs = threading.Lock(), {}

    def run_compiled(jaxpr, consts, *args):
        """All threads of all blocks run one program; JAX 0.10 compiles it for each of them."""
        with lock:
            if id(jaxpr) not in programs:
                program = jax.jit(lambda consts, *args: core.eval_jaxpr(jaxpr, consts, *args) and None)
                programs[id(jaxpr)] = program.lower(consts, *args).compile(), jaxpr
        programs[id(jaxpr)][0](consts, *args)

    with (
        mock.patch.object(thread_map, "_run_jaxpr", run_compiled),
        mock.patch.object(gpu_callbacks, "get_memory_space_idx", index_of),
        mock.patch.object(utils, "to_range", ranges),
        mock.patch.object(memory, "get_buffer_content", read),
        mock.patch.object(memory, "store_buffer_content", write),
        mock.patch.object(gpu_callbacks, "_handle_out_of_bounds_read", zeros_beyond),
    ):
        yield
