"""Whole runs: what they leave, and that one which was killed or stopped ends as if it had not been."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpeft.checkpoint import Checkpoints, on_disk
from jaxpeft.cli.export import chosen_step
from jaxpeft.errors import InputError, Notice
from jaxpeft.train import begin
from jaxpeft.train.metrics import read
from jaxpeft.train.prepare import prepare
from tests import runs

LONG = {"steps": 40, "eval_every": 5, "checkpoint_every": 2, "method_options": ("dropout=0.1",)}


def final(args):
    """Every array of the last checkpoint's state, as bytes by name, and the rows of metrics.jsonl."""
    with Checkpoints(args.out / "checkpoints") as checkpoints:
        state, meta = checkpoints.restore(prepare(args).state)
    state = state._replace(key=jax.random.key_data(state.key))
    arrays = {
        jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    return arrays, meta, read(args.out / "metrics.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(files, cache, tmp_path_factory):
    args = runs.arguments(files, tmp_path_factory.mktemp("a") / "run", json=True, **LONG)
    return args, runs.run(args, cache)


def start(args, cache) -> subprocess.Popen:
    argv, environment = runs.command(args, cache)
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def when(process: subprocess.Popen, condition, seconds: float = 240) -> None:
    """Waits until a condition holds while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended before it could be stopped: {process.stderr.read()}"
        assert time.monotonic() < end, "the run made no progress"
        time.sleep(0.0005)


def rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_json_is_one_document_and_nothing_else_on_stdout(uninterrupted):
    args, done = uninterrupted
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 40
    assert report["out"] == str(args.out)
    assert report["train_loss"] < 3.6
    assert report["eval_loss_after"] < report["eval_loss_before"]
    assert report["total_parameters"] == report["trainable_parameters"] + report["frozen_parameters"]
    assert "step 40/40" in done.stderr


def test_what_a_run_leaves(uninterrupted):
    args, done = uninterrupted
    report = json.loads(done.stdout)
    for name in (
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "loss.png",
        "tensorboard",
        "config.json",
    ):
        assert (args.out / name).exists(), name
    log = read(args.out / "metrics.jsonl")
    assert [row["step"] for row in log if row["split"] == "train"] == list(range(1, 41))
    assert [row["step"] for row in log if row["split"] == "eval"] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert log[0]["loss"] == report["eval_loss_before"]
    assert log[-1]["loss"] == report["eval_loss_after"]
    best = min((row for row in log if row["split"] == "eval" and row["step"]), key=lambda row: row["loss"])
    assert report["best_step"] == best["step"]
    assert on_disk(args.out / "checkpoints") == sorted({38, 40, best["step"]})
    assert sum(report["memory_bytes"][name] for name in ("weights", "adapters")) == 4 * report["total_parameters"]


def test_checkpoints_hold_no_base_weights(uninterrupted):
    args, _ = uninterrupted
    metadata = json.loads((args.out / "checkpoints" / "40" / "state" / "_METADATA").read_text())
    assert "lora" in str(metadata)
    assert "q_proj/kernel" not in str(metadata)
    assert "embed_tokens" not in str(metadata)
    assert not (args.out / "checkpoints" / "frozen").exists()


@pytest.mark.slow
def test_an_adapter_trains_on(uninterrupted, files, cache, tmp_path):
    """--adapter begins where the adapter is, with its own method, and leaves one that is trained further."""
    first = json.loads(uninterrupted[1].stdout)
    source = uninterrupted[0].out / "adapter"
    args = runs.arguments(files, tmp_path / "run", adapter=source, rank=None, json=True)
    done = runs.run(args, cache)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["trainable_parameters"] == first["trainable_parameters"]
    assert report["eval_loss_before"] == pytest.approx(first["eval_loss_after"], rel=1e-6)
    name = "adapter_model.safetensors"
    assert (args.out / "adapter" / name).read_bytes() != (source / name).read_bytes()


def test_a_run_killed_at_many_moments_ends_with_the_same_bits(uninterrupted, files, cache, tmp_path):
    args = runs.arguments(files, tmp_path / "run", **LONG)
    checkpoints = args.out / "checkpoints"

    def writing():
        return any(checkpoints.glob("*.orbax-checkpoint-tmp"))

    moments = [
        lambda: rows(args.out) >= 1,  # before the first checkpoint
        lambda: rows(args.out) >= 12 and writing(),  # while a checkpoint is written
        lambda: rows(args.out) >= 30,
    ]
    resume = False
    for moment in moments:
        process = start(runs.arguments(files, args.out, resume=resume, **LONG), cache)
        when(process, moment)
        process.kill()
        process.communicate()
        assert not (args.out / "report.json").exists()
        resume = True
    done = runs.run(runs.arguments(files, args.out, resume=True, json=True, **LONG), cache)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_from"] >= 20

    expected, meta, log = final(uninterrupted[0])
    arrays, own_meta, own_log = final(args)
    assert arrays.keys() == expected.keys()
    assert [name for name in arrays if arrays[name] != expected[name]] == []
    assert own_log == log
    assert own_meta == meta
    adapter = "adapter/adapter_model.safetensors"
    assert (args.out / adapter).read_bytes() == (uninterrupted[0].out / adapter).read_bytes()


def test_a_damaged_checkpoint_is_not_trained_on(uninterrupted, files, tmp_path, capsys):
    finished, _ = uninterrupted
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    (out / "report.json").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 7,' not in line))
    checkpoints = out / "checkpoints"
    *_, older, newest = on_disk(checkpoints)
    file = max((checkpoints / str(newest) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.warns(Notice, match=rf"/{newest}: damaged \(state/.* is not what was written\); passed over"):
        assert chosen_step(checkpoints, None, best=False) == older
    with pytest.raises(InputError, match=rf"/{newest}: damaged \(state/.*\); whole checkpoints: .*{older}"):
        chosen_step(checkpoints, newest, best=False)

    report = begin.train(runs.arguments(files, out, resume=True, **LONG))
    said = capsys.readouterr().err
    assert f"{newest}: damaged (state/" in said and f"put aside in {checkpoints / 'damaged'}" in said
    assert f"{newest - older} steps are lost and taken again" in said and "rows of steps 7 are missing" in said
    assert report["resumed_from"] == older
    adapter = "adapter/adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (finished.out / adapter).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_goes_on(uninterrupted, files, cache, tmp_path, number, status):
    settings = {**LONG, "checkpoint_every": 0}
    args = runs.arguments(files, tmp_path / "run", **settings)
    process = start(args, cache)
    when(process, lambda: rows(args.out) >= 9)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    assert stdout == ""
    (step,) = on_disk(args.out / "checkpoints")
    last = stderr.strip().splitlines()[-1]
    assert f"stopped by {signal.Signals(number).name} at step {step}, which is saved; --resume continues it" in last
    assert "waits for the end of this step" in stderr and "Traceback" not in stderr

    report = begin.train(runs.arguments(files, args.out, resume=True, **settings))
    assert report["resumed_from"] == step
    expected, _, log = final(uninterrupted[0])
    arrays, _, own_log = final(args)
    assert [name for name in arrays if arrays[name] != expected[name]] == []
    assert own_log == log
