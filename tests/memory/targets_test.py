"""Targets: what is known of them, and what is said where their compilers are not there."""

import importlib.util
import os
import types

import jax
import pytest

from jaxpeft.errors import InputError
from jaxpeft.memory import targets
from jaxpeft.memory.kinds import TARGETS
from tests.memory.pods import described

GiB = 2**30


pytestmark = pytest.mark.usefixtures("optimised")


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


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    with targets._environment(targets._NO_TPU):
        assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine" and "TPU_ACCELERATOR_TYPE" in os.environ
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine" and "TPU_ACCELERATOR_TYPE" not in os.environ


# The attached device.


def test_the_attached_device_is_recognised(monkeypatch):
    assert targets.attached(targets.target("cpu"))
    assert not targets.attached(targets.target("h200"))
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert targets.attached(targets.target("v5e:2x2")) and not targets.attached(targets.target("v5e:4x4"))
