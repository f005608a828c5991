"""Tables of tuned tiles: what is read, which entry a call takes, what the tuner writes; nothing is timed."""

import json
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jaxpeft.memory import targets
from pallas_kernels import lora_matmul, timing, tune, tuning
from pallas_kernels.lora_matmul import gpu
from pallas_kernels.tuning import Sizes

TABLE = {"a GPU": {"lora_matmul.forward": {"512 256 16 bfloat16": [[1024, {"width": 4}], [8192, {"width": 8}]]}}}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The table as the one that the environment names."""
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(TABLE))
    monkeypatch.setenv(tuning.VARIABLE, str(file))
    return file


def test_the_nearest_number_of_rows_is_taken(stored):
    find = lambda rows, device="a GPU", r=16: tuning.find(
        "lora_matmul.forward", device, Sizes(rows, 512, 256, r, jnp.bfloat16)
    )
    assert [find(rows) for rows in (1, 2048, 4096, 10**6)] == [{"width": 4}, {"width": 4}, {"width": 8}, {"width": 8}]
    assert find(1024, "another GPU") is None and find(1024, r=8) is None


def test_sizes_are_of_the_call():
    x, w, a, z = (jnp.ones(s, jnp.bfloat16) for s in ((7, 512), (512, 256), (512, 16), (16, 7)))
    assert lora_matmul.sizes_of_both(x, w, a, None).key == "512 256 16 bfloat16"
    assert lora_matmul.sizes_of_low(x, a) == (7, 512, 0, 16, jnp.bfloat16)
    assert lora_matmul.sizes_of_factor(z, x) == (7, 512, 0, 16, jnp.bfloat16)


def test_a_stored_configuration_reaches_the_kernel(tmp_path, monkeypatch):
    """By the kind of the device that the program is for."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    device = targets.devices(targets.target("h200"))[0]
    config = gpu.Config(columns=128, slots=3)
    entry = {device.device_kind: {"lora_matmul.forward": {"256 128 16 bfloat16": [[256, config._asdict()]]}}}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(entry))
    monkeypatch.setenv(tuning.VARIABLE, str(file))
    seen = []

    def forward(x, w, a, b, seed, **static):
        seen.append(static["config"])
        return jnp.zeros((256, 128), x.dtype), jnp.zeros((16, 256), x.dtype)

    monkeypatch.setattr(gpu, "forward", forward)
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = ((256, 256), (256, 128), (256, 16), (16, 128))
    structs = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in shapes]
    jax.jit(lambda *args: lora_matmul.lora_matmul(*args)).lower(*structs)
    assert seen == [config]


@pytest.mark.parametrize("text", ["[1]", '{"a": {"b": {"c": [[0, {}]]}}}', '{"a": {"b": {"c": [[1, 2]]}}}', "{"])
def test_what_is_no_table(tmp_path, text):
    file = tmp_path / "tuned.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json: not a table of tuned kernels"):
        tuning.read(file)


class Config(NamedTuple):
    tiles: int


def kernels(seconds):
    """A file of kernels whose configurations take the times that are given; one of them does not compile."""

    def forward(x, config):
        if config.tiles == 3:
            raise ValueError("too large")
        return x

    return types.SimpleNamespace(
        forward=forward, configs=lambda function, *args: [Config(i) for i in range(len(seconds))]
    )


def test_the_fastest_that_compiles_wins(monkeypatch, capsys):
    seconds = [3.0, 1.0, 2.0, 0.1]
    fake = lambda runs, rounds, inner: timing.Times({config: [seconds[config.tiles]] for config in runs})
    monkeypatch.setattr(timing, "paired", fake)
    assert tune.best(kernels(seconds), "forward", (jnp.ones(2),), {}, 1, 1) == Config(1)
    assert "Config(tiles=3): too large" in capsys.readouterr().err
    assert tune.best(kernels([1.0]), "forward", (jnp.ones(2),), {}, 1, 1) == Config(0)


def test_without_a_device_that_has_kernels(tmp_path, capsys):
    assert tune.main(["--out", str(tmp_path / "tuned.json")]) == 2
    assert "the attached device is a cpu; a GPU or TPU is needed" in capsys.readouterr().err
    assert not (tmp_path / "tuned.json").exists()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_call_of_the_tuner_has_candidates(platform):
    """Of the file that the attached device's platform would have; the first is the rule's own choice.

    Few rows: for many, a GPU's packed kernels are unpacked before the product, and there is no choice.
    """
    import importlib

    shape = tune.MODELS["llama3-1b"][1]
    for package, function, sizes, args, static in tune.calls(shape, 16, 128, jnp.bfloat16):
        file = importlib.import_module(f"pallas_kernels.{package}.{platform}")
        assert getattr(file, f"supports_{function}")(*args, **static), function
        configs = file.configs(function, *args)
        assert configs and len(set(configs)) == len(configs)
        assert all(isinstance(config, file.Config) for config in configs)
        assert sizes(*args).rows == 128
