"""How runs end: finished, finished again, with a loss that is not finite, on a full disk; what other methods leave."""

import functools
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import hf, tree
from jaxpeft.checkpoint import Checkpoints, on_disk
from jaxpeft.errors import InputError, RunError
from jaxpeft.train import begin, loop
from jaxpeft.train.metrics import read
from jaxpeft.train.prepare import prepare
from tests import runs

pytestmark = pytest.mark.usefixtures("cache")


def losses(out, split="train"):
    return [row["loss"] for row in read(out / "metrics.jsonl") if row["split"] == split]


def broken_at(monkeypatch, step, name):
    """Makes a metric of the step after `step` steps not finite, in the compiled step itself."""
    made = loop.make_train_step

    def make(*args, **options):
        own = made(*args, **options)

        def function(state, batch):
            new, metrics = own(state, batch)
            return new, {**metrics, name: jnp.where(state.step == step, jnp.nan, metrics[name])}

        return function

    monkeypatch.setattr(loop, "make_train_step", make)


def test_lines_that_are_not_trained_on_are_accounted_for(files, tmp_path, capsys):
    """Bad, dropped and cut lines are counted on stderr and in the report; a line of each kind is in the file."""
    data = tmp_path / "data.jsonl"
    row = '{"prompt": "1+1=", "completion": "%s"}\n'
    data.write_text((files / "train.jsonl").read_text() + "{oops\n" + row % ("ab " * 9) + row % "")
    for too_long, said in (("truncate", "1 truncated"), ("drop", "1 too long and dropped")):
        changes = {"data": str(data), "eval_data": None, "skip_bad_lines": True, "too_long": too_long, "steps": 1}
        report = begin.train(runs.arguments(files, tmp_path / too_long, **changes))
        lines = capsys.readouterr().err
        assert f"{data}: " in lines and said in lines
        assert f"1 bad lines skipped (first: {data}:61: not JSON" in lines
        counts = report["examples"]["data"]
        assert (counts["lines"], counts["bad_lines"]) == (63, 1)
        assert (counts["truncated"], counts["dropped_too_long"]) == ((1, 0) if too_long == "truncate" else (0, 1))


@pytest.mark.parametrize(
    ("name", "words"), [("loss", "loss"), pytest.param("grad_norm", "gradient norm", marks=pytest.mark.slow)]
)
def test_a_loss_that_is_not_finite_names_step_lines_and_checkpoint(files, tmp_path, monkeypatch, name, words):
    broken_at(monkeypatch, 4, name)
    args = runs.arguments(files, tmp_path, pack=False, samples=0)
    with pytest.raises(RunError) as caught:
        begin.train(args)
    batches = prepare(args).data.train
    lines = [next(batches)[1] for _ in range(5)][-1]
    data = files / "train.jsonl"
    assert str(caught.value) == (
        f"step 5: {words} is nan; its batch is {data}, lines {loop.ranges(lines)}; last good checkpoint: step 4"
    )
    assert caught.value.status == 1
    assert on_disk(tmp_path / "checkpoints") == [3, 4]
    assert len(losses(tmp_path)) == 4

    monkeypatch.undo()
    report = begin.train(runs.arguments(files, tmp_path, pack=False, samples=0, resume=True))
    assert (report["steps"], report["resumed_from"]) == (6, 4)


def test_a_state_whose_own_loss_is_not_finite_is_not_saved(files, tmp_path):
    args = runs.arguments(files, tmp_path, lr=1e30, warmup=0, checkpoint_every=1, eval_data=None)
    with pytest.raises(RunError, match=r"step 1: loss after the update is nan; .* no checkpoint has been written yet"):
        begin.train(args)
    assert on_disk(tmp_path / "checkpoints") == []


def test_lines_are_joined_to_ranges():
    assert loop.ranges([[7, 3], [8], [9, 20], [3]]) == "3, 7-9, 20"


def test_full_leaves_a_model_and_a_finished_run_is_not_run_again(files, tmp_path, capsys):
    args = runs.arguments(files, tmp_path, method="full", rank=None, accumulate=2, weight_decay=0.1)
    report = begin.train(args)
    assert report["trainable_parameters"] == report["total_parameters"]
    assert report["memory_bytes"]["adapters"] == 0
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(prepare(args).state)
    _, params = hf.load_pretrained(tmp_path / "model", jnp.float32)
    saved = tree.flatten(params)
    assert saved.keys() == state.trainable.keys()
    for path, leaf in saved.items():
        np.testing.assert_array_equal(leaf, state.trainable[path], err_msg=path)

    again = begin.train(runs.arguments(files, tmp_path, **{**changes_of(args), "resume": True}))
    assert again == json.loads(json.dumps(report))
    assert "the run is finished" in capsys.readouterr().err
    # By other names: its own data is no other run's, what others hold is.
    rows = (files / "train.jsonl").read_text()
    asked = functools.partial(runs.arguments, files, tmp_path, **{**changes_of(args), "resume": True})
    (tmp_path / "moved.jsonl").write_text(rows)
    assert begin.train(asked(data=str(tmp_path / "moved.jsonl"))) == again
    (tmp_path / "other.jsonl").write_text(rows.replace("ab", "ba"))
    with pytest.raises(InputError, match=r"other.jsonl \(other content\)$"):
        begin.train(asked(data=str(tmp_path / "other.jsonl")))
    with pytest.raises(InputError, match=r"--lr 0.01 -> 0.1; named otherwise, too: --data .*other.jsonl$"):
        begin.train(asked(data=str(tmp_path / "other.jsonl"), lr=0.1))
    assert json.loads((tmp_path / "report.json").read_text()) == again
    # What it wrote can be made again of its last checkpoint.
    shutil.rmtree(tmp_path / "model")
    begin.train(runs.arguments(files, tmp_path, **{**changes_of(args), "resume": True}))
    assert "what the run wrote is gone; it is made again" in capsys.readouterr().err
    written = tree.flatten(hf.load_pretrained(tmp_path / "model", jnp.float32)[1])
    assert all((written[path] == leaf).all() for path, leaf in saved.items())
    again = json.loads((tmp_path / "report.json").read_text())
    # How often it is saved is not what it is.
    shutil.copytree(tmp_path, tmp_path.parent / "elsewhere")
    elsewhere = runs.arguments(files, tmp_path.parent / "elsewhere", **{**changes_of(args), "resume": True}, keep=1)
    assert begin.train(elsewhere) == {**again, "out": str(tmp_path.parent / "elsewhere")}


def changes_of(args):
    return {name: getattr(args, name) for name in ("method", "rank", "accumulate", "weight_decay")}


def test_steps_that_a_run_does_not_reach_are_said(files, tmp_path, capsys):
    options = ("density=0.05", "accumulate=5")
    changes = {"method": "spiel", "rank": None, "method_options": options, "samples": 0, "checkpoint_every": 0}
    begin.train(runs.arguments(files, tmp_path, steps=1, **changes))
    assert "--steps 1: spiel's accumulate=5 steps are not over by then" in capsys.readouterr().err


def test_accumulated_parts_train_as_the_whole_batch(files, tmp_path):
    for parts in (1, 2):
        begin.train(runs.arguments(files, tmp_path / str(parts), accumulate=parts, samples=0, checkpoint_every=0))
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "2"), rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "1", "eval"), losses(tmp_path / "2", "eval"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "option", "own"),
    [("lora", "init=pissa", "a0"), pytest.param("lora_fa", "store_a=true", "lora_fa/a", marks=pytest.mark.slow)],
)
def test_frozen_leaves_of_the_run_survive_a_resume_elsewhere(files, tmp_path, method, option, own):
    changes = {"method": method, "method_options": (option,), "samples": 0, "buckets": (8,), "pack": False}
    begin.train(runs.arguments(files, tmp_path, **changes))
    args = runs.arguments(files, tmp_path, **changes)
    job = prepare(args)
    assert any(own in path for path in job.own)
    other = {path: jax.tree.map(jnp.zeros_like, leaf) for path, leaf in job.own.items()}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(job.state._replace(frozen={**job.state.frozen, **other}))
    for path, leaf in job.own.items():
        np.testing.assert_array_equal(state.frozen[path], leaf, err_msg=path)


def test_the_validation_loss_is_the_mean_over_completion_tokens(files, tmp_path):
    job = prepare(runs.arguments(files, tmp_path, samples=0))
    total, weight = 0.0, 0.0
    for batch, _ in job.data.validation():
        logits = job.model.apply(tree.combine(job.state.trainable, job.state.frozen), batch)
        of_target = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        total -= float((of_target * batch["loss_weights"]).sum())
        weight += float(batch["loss_weights"].sum())
    rows = [json.loads(line) for line in (files / "eval.jsonl").read_text().splitlines()]
    assert weight == sum(len(row["completion"]) + 1 for row in rows)
    step, batches = loop.Compiled(job.task.eval_step(job.model)), (batch for batch, _ in job.data.validation())
    assert job.task.scores(step, job.state, batches, 0) == {"loss": pytest.approx(total / weight, rel=1e-5)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_on_a_full_disk_goes_on_where_there_is_room_again(files, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    try:
        (disk / "filler").write_bytes(bytes(4 * 2**20 - 400_000))
        changes = {"checkpoint_every": 1, "keep": 9, "samples": 0}
        with pytest.raises(
            RunError, match=r"checkpoints/\d: not written: No space left on device; last good"
        ) as caught:
            begin.train(runs.arguments(files, disk / "run", **changes))
        assert caught.value.status == 2
        good = on_disk(disk / "run" / "checkpoints")
        assert good
        (disk / "filler").unlink()
        report = begin.train(runs.arguments(files, disk / "run", resume=True, **changes))
        assert (report["steps"], report["resumed_from"]) == (6, good[-1])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
