"""Targets: what is known of them, and that their compilers' figures mean what we say, on programs known by hand."""

import importlib.util
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.compilation_cache import compilation_cache

from jaxpeft import executable
from jaxpeft.errors import InputError, Notice
from jaxpeft.memory import targets
from jaxpeft.memory.kinds import TARGETS
from jaxpeft.methods import lokr

GiB = 2**30
COMPILED = ("cpu", "v5e", "v5p", "h200")
ALIGNMENT = 1 << 16  # a TPU's temporaries are placed at multiples of this


pytestmark = pytest.mark.usefixtures("optimised")


def described(name):
    target = targets.target(name)
    if target.platform == "tpu":
        pytest.importorskip("libtpu")
    if target.platform == "cuda" and not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    return target


# Names.


def test_a_plain_name_is_one_device():
    assert [(t.name, t.chips, t.platform) for t in targets.targets(" h200, v5p,cpu ")] == [
        ("h200", 1, "cuda"),
        ("v5p", 1, "tpu"),
        ("cpu", 1, "cpu"),
    ]


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("v5p:4x4x4", 64),
        ("v5e:16x16", 256),
        ("v5e:1x1", 1),
        ("v4:2x2x1", 4),
        ("tpu7x:2x2x1", 8),
        ("h200x8", 8),
        ("h100x8x2", 16),
        ("a100x4", 4),
    ],
)
def test_a_slice_has_the_devices_that_its_shape_says(name, chips):
    target = described(name)
    assert target.name == name and target.chips == chips == len(targets.devices(target))
    assert len(set(targets.devices(target))) == chips
    if target.platform == "tpu":  # a described GPU is called as its description says
        assert all(device.device_kind in TARGETS[target.kind].names for device in targets.devices(target))
    else:
        assert {device.process_index for device in targets.devices(target)} == set(range(target.shape[1]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h20", "h200"),
        ("", "known"),
        ("V5P", "v5p"),
        ("v5p:", "3 dimensions"),
        ("v5p:4x4", "write v5p:2x2x4 for 16 chips"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v5p:axbxc", "3 dimensions"),
        ("v5p:4x4x4x", "3 dimensions"),
        ("v5p:3x3x3", "no such slice of v5p; near are v5p:2x4x4 (32 chips) or v5p:2x2x4 (16 chips)"),
        ("v5p:0x2x1", "near are v5p:2x2x1 (4 chips)"),
        ("v5p:16x8x8", "near are v5p:8x8x16 (1024 chips)"),
        ("v5e:4x2", "near are v5e:2x4 (8 chips)"),
        ("v6e:32x32", "near are v6e:16x16 (256 chips)"),
        ("h200:2x2", "only a TPU has a slice shape; write h200, or h200x8 for a host of 8"),
        ("h200x3", "a host has 1, 2, 4 or 8 of h200; write h200x8, or h200x8x2 for two"),
        ("h200x", "a host has 1, 2, 4 or 8"),
        ("h200x8x2x2", "a host has 1, 2, 4 or 8"),
        ("h200x4x2", "several hosts, at most 512, have 8 of h200 each"),
        ("h200x8x0", "several hosts, at most 512"),
        ("rtx4090x2", "rtx4090 has no links to others"),
        ("cpu:4", "only a TPU"),
    ],
)
def test_a_bad_name_is_one_line(text, says):
    with pytest.raises(InputError) as error:
        targets.target(text)
    assert says in str(error.value) and repr(text) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_list_is_refused():
    with pytest.raises(InputError, match="at least one"):
        targets.targets(" , ")


@pytest.mark.parametrize(
    ("name", "gib"),  # as published, a little of which is the system's
    [("h200", 141), ("h100", 80), ("a100", 80), ("rtx4090", 24), ("v4", 32), ("v5e", 16), ("v5p", 95), ("v6e", 32)],
)
def test_figures_are_those_of_one_device(name, gib):
    target = targets.target(name)
    assert 0.95 * gib * GiB < target.memory_bytes < 1.05 * gib * GiB
    # All of these do between 100 and 600 operations while they read a byte.
    assert 100 < target.flops / target.bandwidth < 600
    assert target.source


def test_the_cpus_memory_is_this_machines():
    assert targets.target("cpu").memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert targets.devices(targets.target("cpu")) == jax.devices("cpu")[:1]


@pytest.mark.parametrize("name", [name for name, kind in TARGETS.items() if kind.platform == "cuda"])
def test_every_gpu_is_described(name):
    target = described(name)
    [device] = targets.devices(target)
    assert device.platform in ("gpu", "cuda")
    assert f"device_memory_size: {target.memory_bytes}" in TARGETS[name].config


def test_an_empty_description_of_a_gpu_is_impossible():
    target = targets.target("h200")
    with pytest.raises(ValueError, match="no configuration"):
        targets._describe_gpu(target, TARGETS["h200"]._replace(config=" "))


# Missing compilers.


def test_a_missing_compiler_names_its_extra(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'v5p'.*pip install 'jaxpeft\[describe\]'"):
        targets.devices.__wrapped__(targets.target("v5p"))

    def absent(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", absent)
    with pytest.raises(InputError, match=r"'h200'.*pip install 'jaxpeft\[describe\]'"):
        targets.devices.__wrapped__(targets.target("h200"))


def test_a_compiler_that_does_not_load_says_what_failed(monkeypatch):
    """JAX has it in its log alone: `get_topology_desc` says that there is no such platform."""

    def absent(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    class Plugin:
        @staticmethod
        def initialize():
            raise RuntimeError("Unable to load cuFFT. Is it installed?")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", lambda name: Plugin)
    with pytest.raises(InputError, match=r"'h200'.*xla_cuda13\) cannot be loaded: Unable to load cuFFT") as error:
        targets.devices.__wrapped__(targets.target("h200"))
    assert "not installed:" not in str(error.value) and "\n" not in str(error.value)

    def refuses(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: Failed to open libtpu.so: invalid ELF header\nmore")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", refuses)
    for name in ("h200", "v5e"):
        with pytest.raises(InputError, match="INTERNAL: Failed to open libtpu.so: invalid ELF header$"):
            targets.devices.__wrapped__(targets.target(name))


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
        targets.compile(target, jnp.sin, jnp.ones(8))


QUIET = """
import jax, jax.numpy as jnp
from jaxpeft.memory import targets
target = targets.target({name!r})
big = jax.ShapeDtypeStruct((1 << 18, 1 << 18), jnp.bfloat16)
compiled = targets.compile(target, lambda x: (x @ x) @ x, big)
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


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    with targets._environment(targets._NO_TPU):
        assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine" and "TPU_ACCELERATOR_TYPE" in os.environ
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine" and "TPU_ACCELERATOR_TYPE" not in os.environ


# What the figures mean.


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
    memory = targets.compile(target, chain, x, donate_argnums=0 if donated else ()).memory
    assert (memory.arguments, memory.outputs, memory.aliases) == (size, size, size if donated else 0)
    assert 4 * size <= memory.temporaries <= 4 * size + ALIGNMENT
    assert memory.total == memory.temporaries + (size if donated else 2 * size)
    assert memory.host == 0


def test_what_fits_can_be_run():
    x = jnp.ones((4, 8), jnp.float32)
    compiled = targets.compile(targets.target("cpu"), lambda tree: {"y": tree["x"] * 2}, {"x": x})
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
        memory = targets.compile(described("h200"), step, x, own, y).memory
    assert memory.outputs >= x.size * 2 + y.size * 2 and memory.temporaries < x.size * 2


@pytest.mark.parametrize("name", ["v5e", "h200"])
def test_what_does_not_fit_has_its_exact_figure(name):
    target = described(name)
    n = 49152 if name == "v5e" else 155648
    size = 2 * n * n
    x = jax.ShapeDtypeStruct((n, n), jnp.bfloat16)
    assert 3 * size < target.memory_bytes < 4 * size
    compiled = targets.compile(target, lambda x, w: (x @ w) @ w, x, x)
    memory = compiled.memory
    assert not compiled.fits
    assert (memory.arguments, memory.outputs, memory.aliases) == (2 * size, size, 0)
    assert size <= memory.temporaries <= size + ALIGNMENT


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_arguments_that_do_not_fit_a_tpu():
    target = described("v5e")
    state = {"a": jax.ShapeDtypeStruct((4, GiB), jnp.float32), "b": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    compiled = targets.compile(target, lambda state: (state["b"] + 1, state["a"].sum()), state, donate_argnums=0)
    memory = compiled.memory
    assert compiled.executable is None and not compiled.fits
    assert memory.arguments == 16 * GiB + 4 * 2**20
    assert memory.aliases == 4 * 2**20


def test_the_largest_program_that_a_tpu_takes():
    """The table's memory is the compiler's: a program of it is refused, one that is 2 MiB smaller is not."""
    target = described("v5e")

    def compiled(mebibytes):
        x = jax.ShapeDtypeStruct((mebibytes * 256, 1024), jnp.float32)
        return targets.compile(target, lambda x: x[:8, :128], x)

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
        targets.compile(target, pl.pallas_call(kernel, out_shape=block, scratch_shapes=on_chip), block)


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
        return targets.compile(target, layers(POLICIES[policy]), x, weights)

    few, many = compiled(8), compiled(12)
    assert abs(many.memory.temporaries - few.memory.temporaries - 4 * per_layer * size) <= 2 * ALIGNMENT
    assert few.memory.host == few.memory.host_temporaries == (8 * size if policy == "offloaded" else 0)
    if name == "v5e":  # the compiler's other figure; its "temp" is larger by buffers that never exist
        assert abs(few.memory.total - few.executable.memory_analysis().peak_memory_in_bytes) <= 2 * ALIGNMENT


@pytest.mark.parametrize("name", ["cpu", "v5e", "h200"])
def test_a_dump_holds_the_buffer_assignment(name, tmp_path):
    target = described(name)
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
    compiled = targets.compile(target, lambda x: jnp.sin(x) @ x, x, dump=tmp_path / "xla")
    assert compiled.dump == tmp_path / "xla"
    assert list(compiled.dump.glob("*buffer-assignment.txt"))


def test_the_buffer_assignment_says_what_the_executable_says():
    target = described("v5e")
    x = jax.ShapeDtypeStruct((16384, 16384), jnp.bfloat16)

    def function(x, y):
        kept = jax.device_put(x @ y, jax.memory.Space.Host)
        return chain(y) + jax.device_put(kept, jax.memory.Space.Device), x + 1

    compiled = targets.compile(target, function, x, x, donate_argnums=0)
    analysed = executable.analysed(target.platform, compiled.executable.memory_analysis(), None)
    assert compiled.memory[:3] == analysed[:3] and compiled.memory.host == analysed.host == 2 * 16384**2
    assert abs(compiled.memory.temporaries - analysed.temporaries) <= ALIGNMENT


def test_a_slice_divides_what_is_sharded():
    target = described("v5e:2x2")
    mesh = jax.sharding.Mesh(targets.devices(target), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=rows)
    in_args = targets.compile(target, lambda x: x * 2, x).memory
    asked = targets.compile(target, lambda x: x * 2, jnp.ones((4096, 4096)), in_shardings=rows, out_shardings=rows)
    assert in_args.arguments == asked.memory.arguments == asked.memory.outputs == 4096 * 4096 * 4 // 4


# The attached device.


def test_the_attached_device_is_recognised(monkeypatch):
    assert targets.attached(targets.target("cpu"))
    assert not targets.attached(targets.target("h200"))
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert targets.attached(targets.target("v5e:2x2")) and not targets.attached(targets.target("v5e:4x4"))


def test_the_measured_peak(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"peak_bytes_in_use": 12345})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert targets.measured_peak(lambda: 1) == 12345
    device.memory_stats = lambda: None
    with pytest.raises(InputError, match="no memory statistics on gpu"):
        targets.measured_peak(lambda: 1)


def test_a_program_of_the_persistent_cache_is_compiled_anew_for_its_files(tmp_path):
    settings = {"compilation_cache_dir": str(tmp_path / "cache"), "persistent_cache_min_compile_time_secs": 0.0}
    settings["persistent_cache_min_entry_size_bytes"] = -1
    before = {name: getattr(jax.config, f"jax_{name}") for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()
        function = lambda x: jnp.tanh(x) @ x.T
        targets.compile(targets.target("cpu"), function, jnp.ones((8, 8)))
        assert list((tmp_path / "cache").iterdir())
        targets.compile(targets.target("cpu"), function, jnp.ones((8, 8)), dump=tmp_path / "dump")
        assert list((tmp_path / "dump").glob("*buffer-assignment.txt"))
    finally:
        for name, value in before.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()
