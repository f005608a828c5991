"""The command for a device, at its whole length on a CPU: real code, toy sizes, figures of nothing."""

import json
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.on_device import __main__ as command
from experiments.on_device import layers, process, record, report, right, steps
from experiments.on_device.record import Record
from jaxpeft.memory import targets


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """A folder after the whole command; about a minute."""
    folder = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        assert command.main(["--out", str(folder), "--minutes", "30", "--commit", "abc"]) == 0
    return folder


@pytest.mark.slow
def test_every_step_writes_its_rows(figures):
    assert {file.name for file in figures.iterdir()} == {f"{step}.json" for step in command.STEPS}
    for step in command.STEPS:
        found = Record(figures, step)
        assert found.header["device"] == "cpu" and found.header["figures"] is False
        assert found.header["versions"]["jax"] and "flash_attn" in found.header["missing"]
        assert found.rows and all(row["commit"] == "abc" and re.match(r"20\d\d-.*Z", row["run"]) for row in found.rows)
        assert not [row for row in found.rows if "failed" in row]


@pytest.mark.slow
def test_the_kernels_rows_are_errors_against_float64(figures):
    for row in Record(figures, "kernels").rows:
        assert row["right"] and 1e-4 < row["worst"] < 2 * right.BOUND
    assert {"y", "dx", "da", "db"} == set(Record(figures, "kernels").rows[0]["cases"]["dropout 0.25"]["errors"])


@pytest.mark.slow
def test_a_layer_is_timed_beside_its_frozen_product_and_peft(figures):
    (row,) = [row for row in Record(figures, "layers").rows if row["key"]["kind"] == "layer"]
    for of in ("forward", "both"):
        assert {"frozen", "xla", "ours", "nf4", "peft"} <= set(row["seconds"][of])
        assert all(second > 0 for second in row["seconds"][of]["peft"])


@pytest.mark.slow
def test_the_plan_is_the_program_that_ran(figures):
    (row,) = Record(figures, "plans").rows
    assert row["target"] == "cpu" and row["predicted"] == row["compiled_here"]


@pytest.mark.slow
def test_steps_of_both_sides(figures):
    rows = {row["key"]["side"]: row for row in Record(figures, "steps").rows}
    assert set(rows) == {"trace", "peft"} and all(len(row["seconds"]) == 2 for row in rows.values())
    assert rows["trace"]["flops"] > 0


@pytest.mark.slow
def test_a_second_run_measures_nothing_again(figures, capfd):
    before = {file.name: file.read_text() for file in figures.iterdir()}
    assert command.main(["--out", str(figures), "--commit", "later"]) == 0
    assert {file.name: file.read_text() for file in figures.iterdir()} == before
    assert capfd.readouterr().err.count(", 0 to go") == len(command.STEPS)


@pytest.mark.slow
def test_the_report_is_drawn(figures):
    assert command.main(["--draw", "--out", str(figures)]) == 0
    text = (figures / "report.md").read_text()
    (figures / "report.md").unlink()
    assert "| lora_matmul | few rows | dropout 0.25 |" in text and "commits abc" in text
    assert "not enough memory" not in text and "What failed" not in text


def test_the_page_says_what_the_figures_say():
    page = report.PAGE.read_text()
    assert page == report.with_section(page, report.section(report.devices()))
    for folder in report.devices():
        assert (folder / "report.md").read_text() == report.report(folder)
        assert len(list(folder.iterdir())) <= 8
        for step in command.STEPS:
            assert Record(folder, step).header.get("figures", True)


def test_without_figures_it_says_so(tmp_path):
    assert "not measured yet" in report.section([])
    assert report.section([tmp_path]).count("not measured yet") == 6
    assert report.report(tmp_path).count("not measured yet") == 8


def test_mistakes(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path), "--draw"]) == 0
    assert command.main(["--draw", "--out", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    for words, said in (
        (["--only", "kernel"], "'kernel' is no step; known: kernels, layers, plans, steps, fits"),
        (["--minutes", "0"], "must be above 0"),
        (["--match", "("], "--match (:"),
        (["--out", __file__], "is not a folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.main(words)
        assert said in capsys.readouterr().err
    (tmp_path / "fits.json").write_text("[]")
    assert command.main(["--draw", "--out", str(tmp_path)]) == 2
    assert "fits.json: is not a file of figures" in capsys.readouterr().err


def test_figures_of_two_devices_are_kept_apart(tmp_path):
    found = Record(tmp_path, "kernels")
    found.begin({"device": "NVIDIA H100"})
    found.add({"key": {"a": 1}, "x": 1})
    found.add({"key": {"a": 1}, "x": 2})
    again = Record(tmp_path, "kernels")
    assert again.rows == [{"key": {"a": 1}, "x": 2}] and again.header == {"device": "NVIDIA H100"}
    with pytest.raises(ValueError, match=r"figures of a NVIDIA H100, this is a cpu"):
        again.begin({"device": "cpu"})


def test_a_failure_takes_no_figure_away(tmp_path):
    found = Record(tmp_path, "fits")
    found.begin({"device": "NVIDIA H100"})
    key = {"a": 1}
    found.add({"key": key, "named": {"rows": 2}})
    found.add({"key": key, "failed": "out of memory", "run": "now"})
    assert found.rows == [{"key": key, "named": {"rows": 2}, "failed": "out of memory"}]
    found.add({"key": key, "named": {"rows": 2}, "runs": True, "run": "now"})
    found.add({"key": key, "failed": "again", "run": "later"})
    assert found.rows == [{"key": key, "named": {"rows": 2}, "runs": True, "run": "now", "failed_again": "again"}]


def test_one_run_at_a_time(tmp_path):
    with (
        command._alone(tmp_path),
        pytest.raises(ValueError, match="another run is measuring"),
        command._alone(tmp_path),
    ):
        pass


def test_a_size_is_named_for_one_device(tmp_path, capsys):
    for target in ("cpu", "v5p:2x2x1"):
        assert command.main(["--name", target, "--out", str(tmp_path)]) == 2
        assert "one GPU or TPU is tried" in capsys.readouterr().err
    Record(tmp_path, "fits").begin({"device": "TPU v5"})
    assert command.main(["--name", "h100", "--out", str(tmp_path)]) == 2
    assert "figures of a TPU v5, not of h100" in capsys.readouterr().err


def test_a_worker_ends_with_what_it_started():
    """A worker that has a worker of its own, ended before either is done."""
    key = {"geometry": "toy", "method": "lora", "save": "matmuls", "extent": "rows"}
    worker = process.Worker("fits", key, True, "cpu", {"JAX_PLATFORMS": "cpu"})
    assert worker.hear(200).startswith("ready")
    worker.say("go")
    group = ["pgrep", "--runstates", "D,R,S", "-g", str(worker.process.pid)]  # not those that nobody has waited for
    running = lambda: len(subprocess.run(group, capture_output=True, text=True).stdout.split())
    until = time.monotonic() + 60
    while running() < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert running() >= 2
    worker.end()
    while running() and time.monotonic() < until + 10:
        time.sleep(0.1)
    assert not running()


def test_a_row_that_fails_leaves_the_others(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    wave = [{"op": "lora_matmul", "shape": "no such"}, {"op": "lora_matmul", "shape": "few rows"}]
    found = process.rows("kernels", wave, True, "cpu", {}, math.inf, 200.0, right.ahead)
    first, second = (row for _, row in found)
    assert first == {"failed": "KeyError: 'no such'"} and second["right"]


BARE = """
import sys
for name in ("grain", "tyro", "tensorboardX", "matplotlib", "transformers"):
    sys.modules[name] = None  # an import of it fails
import jax, optax
import jaxpeft as jp
from experiments.on_device import fits, layers, plans, right, steps
from jaxpeft.memory import planner, resident, targets
from pallas_kernels import attention, lora_matmul, multi_lora_matmul, quant_lora_matmul, tune
step = plans.step_of({"geometry": "toy", "rows": 1, "length": 8, "method": "lora", "save": "matmuls"})
jax.make_jaxpr(step.function)(step.state, step.batch)
assert callable(resident.measured_peak) and plans.target_of("NVIDIA H100 80GB HBM3").name == "h100"
"""


@pytest.mark.slow
def test_kernels_planner_and_step_import_only_what_they_use():
    subprocess.run(
        [sys.executable, "-c", BARE], check=True, cwd=record.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )


def test_what_was_not_written_is_an_error():
    assert right.distance(np.array([1.0, np.nan]), np.ones(2)) == 1e30
    assert right.distance(np.ones(2), np.ones(2)) == 0


def test_tiles_are_a_table(tmp_path):
    entry = ["lora_matmul.forward", "8 8 4 bfloat16", 64, {"columns": 64}]
    table = layers.table([{"key": {}, "entries": [entry]}, {"key": {}, "entries": [entry]}], "a GPU")
    assert table == {"a GPU": {"lora_matmul.forward": {"8 8 4 bfloat16": [[64, {"columns": 64}]]}}}
    command._write_tiles(table, tmp_path, figures=False)
    assert json.loads((tmp_path / "tuned.json").read_text()) == table


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_product_mosaic_gpu_kernel", "our products"),
        ("lora_low_product_mosaic_gpu_kernel", "our thin products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("loop_dynamic_slice_fusion_2", "copies"),
        ("loop_dynamic_update_slice_fusion_18", "elementwise"),
        ("memcpy32_post", "copies"),
    ],
)
def test_kernels_have_kinds(name, kind):
    assert next(kind for kind, pattern in steps.KINDS.items() if re.search(pattern, name)) == kind


def test_a_plan_may_fill_what_jax_is_given():
    gpu, tpu = targets.target("h100"), targets.target("v5e")
    assert gpu.usable_bytes == int(0.95 * gpu.memory_bytes) and tpu.usable_bytes == tpu.memory_bytes
    # The limit of JAX's allocator, as an H100 said it.
    assert 0 <= 80767614976 - gpu.usable_bytes < 0.002 * gpu.memory_bytes
