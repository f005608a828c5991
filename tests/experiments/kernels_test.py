"""The experiments on the kernels' speed: both sides run, at a size for a CPU; tables are drawn from figures."""

import re
import sys

import pytest

from experiments.kernels import end_to_end, layers, memory
from experiments.memory import common
from pallas_kernels.lora_matmul.shapes import Shape


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(end_to_end, "WARM", 0)
    monkeypatch.setattr(end_to_end, "STEPS", 2)


@pytest.mark.parametrize(("base", "how"), [("bfloat16", ("matmuls", "kernels")), ("nf4", ("blocks", "xla"))])
def test_our_step(short, shared_data, base, how):
    found = end_to_end.ours(base, 2, 32, *how, geometry=str(shared_data / "checkpoints/stories260K"))
    assert len(found["seconds"]) == 2


def test_their_step(short, shared_data):
    pytest.importorskip("torch")
    geometry = str(shared_data / "checkpoints/stories260K")
    found = end_to_end.theirs("bfloat16", 2, 32, "eager", "checkpointing", geometry=geometry)
    assert len(found["seconds"]) == 2


def test_their_layer():
    """The same map with the same number of trained parameters; y is what peft computes."""
    pytest.importorskip("torch")
    functions = layers.peft_functions(Shape("small", 32, 16), 4, 8)
    assert functions["forward"]().shape == functions["both"]().shape == (8, 16)


def test_every_configuration_is_measured_once():
    found = list(end_to_end.configurations())
    assert len(found) == len(set(found)) == 2 * len(end_to_end.SIZES) * (len(end_to_end.OURS) + len(end_to_end.THEIRS))


def test_tables():
    seconds = {"frozen": [1.0, 1.0], "xla": [1.5, 1.5], "ours": [1.1, 1.1], "nf4": [1.2, 1.2], "peft": [2.2, 2.2]}
    row = {"model": "m", "map": "q", "n": 1, "m": 1, "rank": 8, "rows": 64, "pass": "both", "seconds": seconds}
    where = {"device": "a GPU", "jax": "1", "torch": "2", "peft": "3"}
    text = layers.document({**where, "rows": [row]})
    assert "| m | q | 8 | 64 | both | 1000.000 | 1.100 (1.100 to 1.100) | 1.500 | 2.000 | 1.091 |" in text
    rows = [
        {
            "base": "nf4",
            "rows": 1,
            "length": 100,
            "side": "ours",
            "how": ["blocks", "xla"],
            "seconds": [0.5],
            "peak": 2**30,
        },
        {
            "base": "nf4",
            "rows": 1,
            "length": 100,
            "side": "peft",
            "how": ["eager", "kept"],
            "seconds": [1.0],
            "peak": 2**31,
        },
        {
            "base": "nf4",
            "rows": 1,
            "length": 100,
            "side": "peft",
            "how": ["compile", "kept"],
            "failed": "out of memory",
        },
    ]
    text = end_to_end.document({**where, "roofline": {"flops": 7e14, "bandwidth": 4e12}, "rows": rows})
    assert "| nf4 | 1 x 100 | ours | blocks | xla | 200 | 1.0 | 2.00 |" in text
    assert "out of memory" in text and "700 TFLOP/s, 4.00 TB/s" in text


@pytest.mark.parametrize("experiment", [layers, end_to_end], ids=["layers", "end_to_end"])
def test_without_a_gpu_nothing_is_written(experiment, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["experiment"])
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    assert experiment.main() == 2
    assert "no NVIDIA GPU is attached" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_kernels_cost_no_memory():
    """The committed figures: a document drawn from them, the docstring's numbers, kernels never above plain JAX."""
    rows = memory.collect(common.Figures(memory.NAME), ["h200", "v5p"])
    assert memory.document(rows) == (common.RESULTS / f"{memory.NAME}.md").read_text()
    figures = {(row["target"], row["base"], row["products"]): row["temporaries"] / common.GIB for row in rows}
    text = " ".join(memory.__doc__.split())
    for target in ("h200", "v5p"):
        for base in ("bfloat16", "nf4"):
            ours, plain = (figures[target, base, products] for products in ("kernels", "xla"))
            assert ours <= plain
            assert re.search(rf"{ours:.2f}( GiB with the kernels)? and {plain:.2f}", text), (target, base)
