"""Ahead of time: that the compilers' figures mean what we say, on programs known by hand."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.compilation_cache import compilation_cache

from jaxpeft import executable
from jaxpeft.errors import InputError, Notice
from jaxpeft.memory import aot, targets
from jaxpeft.methods import lokr
from tests.memory.pods import described

GiB = 2**30
COMPILED = ("cpu", "v5e", "v5p", "h200")
ALIGNMENT = 1 << 16  # a TPU's temporaries are placed at multiples of this


pytestmark = pytest.mark.usefixtures("optimised")


def chain(x):
    """Keeps y1 .. y4 for the way back; at the first product of that five matrices live, one of them in the output's
    buffer: temporaries of four."""
    kept = []
    for _ in range(4):
        kept.append((kept[-1] if kept else x) @ (kept[-1] if kept else x))
    y = kept[-1]
    for matrix in reversed(kept):
        y = y @ matrix
    return y


@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_a_known_chain(name, donated):
    target = described(name)
    # Larger than the on-chip memory of a TPU, where what is small would go; a CPU multiplies bf16 as float32.
    n, dtype = 16384, jnp.float32 if name == "cpu" else jnp.bfloat16
    x = jax.ShapeDtypeStruct((n, n), dtype)
    size = n * n * jnp.dtype(dtype).itemsize
    memory = aot.compile(target, chain, x, donate_argnums=0 if donated else ()).memory
    assert (memory.arguments, memory.outputs, memory.aliases) == (size, size, size if donated else 0)
    assert 4 * size <= memory.temporaries <= 4 * size + ALIGNMENT
    assert memory.total == memory.temporaries + (size if donated else 2 * size)
    assert memory.host == 0


def test_what_fits_can_be_run():
    x = jnp.ones((4, 8), jnp.float32)
    compiled = aot.compile(targets.target("cpu"), lambda tree: {"y": tree["x"] * 2}, {"x": x})
    assert compiled.fits and compiled.dump is None
    assert (compiled.executable({"x": x})["y"] == 2).all()


def test_products_that_have_no_tiles_are_compiled():
    """LoKr's at Llama-2-7B's down_proj, for one of which XLA finds no tiles without a device to try them on."""
    x, y = (jax.ShapeDtypeStruct((4, 768, n), jnp.bfloat16) for n in (11008, 4096))
    own = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in lokr.shapes_of(8, 11008, 4096, None, False).items()
    }

    def step(x, own, dy):
        y, backward = jax.vjp(lambda x, own: lokr.product(x, own, 1.0), x, own)
        return y, *backward(dy)

    with pytest.warns(Notice, match="XLA finds no Triton tiles for a product"):
        memory = aot.compile(described("h200"), step, x, own, y).memory
    assert memory.outputs >= x.size * 2 + y.size * 2 and memory.temporaries < x.size * 2


@pytest.mark.parametrize("name", ["v5e", "h200"])
def test_what_does_not_fit_has_its_exact_figure(name):
    target = described(name)
    n = 49152 if name == "v5e" else 155648
    size = 2 * n * n
    x = jax.ShapeDtypeStruct((n, n), jnp.bfloat16)
    assert 3 * size < target.memory_bytes < 4 * size
    compiled = aot.compile(target, lambda x, w: (x @ w) @ w, x, x)
    memory = compiled.memory
    assert not compiled.fits
    assert (memory.arguments, memory.outputs, memory.aliases) == (2 * size, size, 0)
    assert size <= memory.temporaries <= size + ALIGNMENT


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_arguments_that_do_not_fit_a_tpu():
    target = described("v5e")
    state = {"a": jax.ShapeDtypeStruct((4, GiB), jnp.float32), "b": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    compiled = aot.compile(target, lambda state: (state["b"] + 1, state["a"].sum()), state, donate_argnums=0)
    memory = compiled.memory
    assert compiled.executable is None and not compiled.fits
    assert memory.arguments == 16 * GiB + 4 * 2**20
    assert memory.aliases == 4 * 2**20


def test_the_largest_program_that_a_tpu_takes():
    """The table's memory is the compiler's: a program of it is refused, one that is 2 MiB smaller is not."""
    target = described("v5e")

    def compiled(mebibytes):
        x = jax.ShapeDtypeStruct((mebibytes * 256, 1024), jnp.float32)
        return aot.compile(target, lambda x: x[:8, :128], x)

    mebibytes = target.memory_bytes >> 20
    assert compiled(mebibytes).executable is None and not compiled(mebibytes).fits
    assert compiled(mebibytes - 2).fits


def test_another_refusal_is_not_hidden():
    target = described("v5e")
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(x, out, scratch):
        scratch[:8] = x[...]
        out[...] = scratch[:8]

    block = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    on_chip = [pltpu.VMEM((1 << 18, 1024), jnp.float32)]  # 1 GiB
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
        aot.compile(target, pl.pallas_call(kernel, out_shape=block, scratch_shapes=on_chip), block)


def layers(policy):
    """The gradient of a scan over layers x -> a = tanh(x w) -> tanh(a w^T), each with a policy for `a`."""

    def body(x, w):
        a = checkpoint_name(jnp.tanh(x @ w), "a")
        return jnp.tanh(a @ w.T), None

    def loss(x, weights):
        y, _ = jax.lax.scan(jax.checkpoint(body, policy=policy), x, weights)
        return y.astype(jnp.float32).sum()

    return jax.grad(loss)


POLICIES = {
    "recomputed": jax.checkpoint_policies.nothing_saveable,
    "saved": jax.checkpoint_policies.save_only_these_names("a"),
    "offloaded": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["a"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@pytest.mark.parametrize(("policy", "per_layer"), [("recomputed", 1), ("saved", 2), ("offloaded", 1)])
@pytest.mark.parametrize("name", ["v5e", "h200"])
def test_a_layer_costs_what_it_keeps(name, policy, per_layer):
    """Each layer keeps its input, and `a`: on the device, on the host, or not at all.

    An array is as large as a TPU's on-chip memory; many narrow rows are compiled four times as fast as few wide ones.
    """
    target = described(name)
    rows, d = 262144, 256
    x = jax.ShapeDtypeStruct((rows, d), jnp.bfloat16)
    size = 2 * rows * d

    def compiled(count):
        weights = jax.ShapeDtypeStruct((count, d, d), jnp.bfloat16)
        return aot.compile(target, layers(POLICIES[policy]), x, weights)

    few, many = compiled(8), compiled(12)
    assert abs(many.memory.temporaries - few.memory.temporaries - 4 * per_layer * size) <= 2 * ALIGNMENT
    assert few.memory.host == few.memory.host_temporaries == (8 * size if policy == "offloaded" else 0)
    if name == "v5e":  # the compiler's other figure; its "temp" is larger by buffers that never exist
        assert abs(few.memory.total - few.executable.memory_analysis().peak_memory_in_bytes) <= 2 * ALIGNMENT


@pytest.mark.parametrize("name", ["cpu", "v5e", "h200"])
def test_a_dump_holds_the_buffer_assignment(name, tmp_path):
    target = described(name)
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
    compiled = aot.compile(target, lambda x: jnp.sin(x) @ x, x, dump=tmp_path / "xla")
    assert compiled.dump == tmp_path / "xla"
    assert list(compiled.dump.glob("*buffer-assignment.txt"))


def test_the_buffer_assignment_says_what_the_executable_says():
    target = described("v5e")
    x = jax.ShapeDtypeStruct((16384, 16384), jnp.bfloat16)

    def function(x, y):
        kept = jax.device_put(x @ y, jax.memory.Space.Host)
        return chain(y) + jax.device_put(kept, jax.memory.Space.Device), x + 1

    compiled = aot.compile(target, function, x, x, donate_argnums=0)
    analysed = executable.analysed(target.platform, compiled.executable.memory_analysis(), None)
    assert compiled.memory[:3] == analysed[:3] and compiled.memory.host == analysed.host == 2 * 16384**2
    assert abs(compiled.memory.temporaries - analysed.temporaries) <= ALIGNMENT


def test_a_slice_divides_what_is_sharded():
    target = described("v5e:2x2")
    mesh = jax.sharding.Mesh(targets.devices(target), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=rows)
    in_args = aot.compile(target, lambda x: x * 2, x).memory
    asked = aot.compile(target, lambda x: x * 2, jnp.ones((4096, 4096)), in_shardings=rows, out_shardings=rows)
    assert in_args.arguments == asked.memory.arguments == asked.memory.outputs == 4096 * 4096 * 4 // 4


def test_a_program_of_the_persistent_cache_is_compiled_anew_for_its_files(tmp_path):
    settings = {"compilation_cache_dir": str(tmp_path / "cache"), "persistent_cache_min_compile_time_secs": 0.0}
    settings["persistent_cache_min_entry_size_bytes"] = -1
    before = {name: getattr(jax.config, f"jax_{name}") for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()
        function = lambda x: jnp.tanh(x) @ x.T
        aot.compile(targets.target("cpu"), function, jnp.ones((8, 8)))
        assert list((tmp_path / "cache").iterdir())
        aot.compile(targets.target("cpu"), function, jnp.ones((8, 8)), dump=tmp_path / "dump")
        assert list((tmp_path / "dump").glob("*buffer-assignment.txt"))
    finally:
        for name, value in before.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    "message",
    [
        "UNAVAILABLE: No PTX compilation provider is available. Neither ptxas/nvlink nor nvjtlink is available.",
        "INTERNAL: libdevice not found at ./libdevice.10.bc",
    ],
)
def test_a_missing_assembler_names_its_extra(monkeypatch, message):
    target = described("h200")

    def refuses(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuses)
    with pytest.raises(InputError, match=r"pip install 'jaxpeft\[describe\]'"):
        aot.compile(target, jnp.sin, jnp.ones(8))


QUIET = """
import jax, jax.numpy as jnp
from jaxpeft.memory import aot, targets
target = targets.target({name!r})
big = jax.ShapeDtypeStruct((1 << 18, 1 << 18), jnp.bfloat16)
compiled = aot.compile(target, lambda x: (x @ x) @ x, big)
assert not compiled.fits
"""


@pytest.mark.parametrize("name", ["v5e", "h200"])
def test_nothing_is_written_to_stderr(name):
    described(name)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "TF_CPP", "ALLOW_MULT"))}
    done = subprocess.run(
        [sys.executable, "-c", QUIET.format(name=name)],
        env=clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
