"""The benchmarks run, on shapes small enough for a CPU, and their ratios are ratios; no time is asserted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import timing
from pallas_kernels.lora_matmul import bench as dense
from pallas_kernels.lora_matmul.shapes import Shape
from pallas_kernels.multi_lora_matmul import bench as multi
from pallas_kernels.multi_lora_matmul import multi_lora_matmul
from pallas_kernels.quant_lora_matmul import bench as quantized

SMALL = Shape("small", 128, 64)


def test_ratios_are_taken_within_rounds():
    """A machine that becomes twice as slow moves the medians of both, and no ratio."""
    times = timing.Times({"a": [2, 2, 4, 4, 4], "b": [1, 1, 2, 2, 2]})
    assert times.ratio("a", "b") == (2, 2, 2)
    assert times.median("a") == 4


def test_functions_take_turns():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = timing.paired(functions, rounds=3, inner=2)
    assert [len(seconds) for seconds in times.seconds.values()] == [3, 3, 3]
    # One round more, which compiles; each function first in turn.
    assert "".join(calls[::2]) == "cab" + "abc" + "bca" + "cab"


@pytest.mark.parametrize(
    ("bench", "names"),
    [
        (dense, ["frozen", "xla", "ours"]),
        (quantized, ["ours", "nf4", "int4", "int8", "nf4 xla"]),
        (multi, ["ours", "multi", "multi xla", "multi ranks", "ragged_dot"]),
    ],
    ids=["lora", "quant", "multi"],
)
def test_what_is_compared_is_the_same(bench, names):
    """All functions of a pass give the same y, up to the rounding of bfloat16 and of the packed kernels.

    128 tokens are one row of the batch, with the first of several adapters, the one that "ours" has too.
    """
    passes = bench.functions(SMALL, 8, 128, jnp.float32)
    assert list(passes) == ["forward", "both"]
    for name, group in passes.items():
        assert list(group) == names
        out = {key: function() for key, function in group.items()}
        ys = {key: np.asarray(value if name == "forward" else value[0]) for key, value in out.items()}
        for key in names:
            if key != "frozen":
                error = np.linalg.norm(ys[key] - ys[names[1]]) / np.linalg.norm(ys[names[1]])
                assert error < (0.2 if bench is quantized else 1e-5), (name, key)


def test_ragged_dot_is_the_same_map():
    """y, dx, dA and dB of four adapters of ranks 4, 2, 1 and 3, the second of which owns no row."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, w, dy = normal(5, 128, 24), normal(24, 16), normal(5, 128, 16)
    a, b = multi.padded(normal(24, 4), normal(4, 16), [4, 2, 1, 3])
    a, b = a * normal(4, 1, 1), b * normal(4, 1, 1)
    adapter, scales = jnp.array([2, 3, 0, 2, 0]), jnp.array([0.5, 7.0, 2.0, 1.0])

    def derived(form, **options):
        y, pull = jax.vjp(lambda x, a, b: form(x, w, a, b, adapter, scales=scales, **options), x, a, b)
        return [np.asarray(v) for v in (y, *pull(dy))]

    found, wanted = derived(multi.ragged_dot), derived(multi_lora_matmul, implementation="xla")
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-6 * np.linalg.norm(theirs)
    da, db = found[2:]
    assert not da[1].any() and not db[1].any()
    assert not da[2, :, 1:].any() and not db[2, 1:].any()


def test_adapters_have_ranks_of_their_own():
    assert multi.own_ranks(16) == [16, 8, 4, 2] * 2
    assert multi.own_ranks(2) == [2, 1, 1, 1] * 2


def test_figures_are_written(tmp_path, capsys):
    rows = timing.measure(dense.functions, [SMALL], [4], [16], "float32", rounds=2, inner=1)
    assert [row["pass"] for row in rows] == ["forward", "both"]
    timing.report(rows, "frozen", str(tmp_path / "figures.json"))
    out, err = capsys.readouterr()
    assert "map=small n=128 m=64 rank=4 rows=16" in out and "ours/frozen" in out
    assert "this is a CPU" in err
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["rows"] == json.loads(json.dumps(rows)) and written["platform"] == "cpu"
