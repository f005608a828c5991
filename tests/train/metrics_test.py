"""metrics.jsonl and TensorBoard events: appended, cut back for a resume, torn lines."""

import json
import math

import pytest
from tensorboardX.proto import event_pb2

from jaxpeft.errors import InputError
from jaxpeft.train import metrics
from jaxpeft.train.metrics import MetricsLog


def train_row(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "split": "train", "loss": loss}


def events(folder) -> list[event_pb2.Event]:
    """The events of every file in a folder, in the TFRecord framing."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path / "run")
    log.write(train_row(1, 2.5))
    assert metrics.read(tmp_path / "run" / "metrics.jsonl") == [train_row(1, 2.5)]
    log.close()


def test_a_non_finite_number_is_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(train_row(1, math.nan))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "split": "train", "loss": None}


def test_numbers_become_events_under_their_split(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(train_row(3, 2.5))
        log.write({"step": 3, "split": "eval", "loss": 1.5, "note": "text is not a scalar"})
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert scalars == [(3, "train/loss", 2.5), (3, "eval/loss", 1.5)]


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(train_row(step))
    with MetricsLog(tmp_path, after_step=3) as log:
        log.write(train_row(4, 9.0))
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 9)]
    starts = [
        event.step
        for event in events(tmp_path / "tensorboard")
        if event.session_log.status == event_pb2.SessionLog.START
    ]
    assert starts[-1] == 4  # TensorBoard drops older events from this step on
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_starts_empty_and_step_0_survives_a_resume(tmp_path):
    before = {"step": 0, "split": "eval", "loss": 4.0}
    with MetricsLog(tmp_path) as log:
        log.write(before)
    with MetricsLog(tmp_path, after_step=0):
        assert metrics.read(tmp_path / "metrics.jsonl") == [before]
    with MetricsLog(tmp_path):
        assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_a_line_cut_off_in_writing_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train_row(1)) + '\n{"step": 2, "spl')
    metrics.truncate(path, 5)
    assert path.read_text() == json.dumps(train_row(1)) + "\n"


@pytest.mark.parametrize("line", ["not json", "[1]", '{"split": "train"}', '{"step": "3"}', ""])
def test_another_file_is_refused_with_its_line_and_left_alone(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = json.dumps(train_row(1)) + f"\n{line}\n"
    path.write_text(text)
    with pytest.raises(InputError, match="line 2"):
        metrics.truncate(path, 5)
    assert path.read_text() == text


def test_truncating_nothing_makes_nothing(tmp_path):
    metrics.truncate(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
