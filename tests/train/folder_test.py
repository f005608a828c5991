"""A run's folder: one process at a time, and what happens when it is taken away."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from jaxpeft import locks
from jaxpeft.errors import InputError, Notice, RunError
from jaxpeft.train import begin, folder, loop, run
from tests import runs

ROOT = Path(__file__).resolve().parent.parent.parent
HOLDS = "import sys, time; from pathlib import Path; from jaxpeft import locks\n"
HOLDS += "with locks.held(Path(sys.argv[1]), 'process 7 on there'):\n    print('held', flush=True)\n    time.sleep(600)"


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    (tmp_path / "run").mkdir()
    argv = [sys.executable, "-c", HOLDS, str(tmp_path / "run" / folder.LOCK)]
    with subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("cache")
def test_the_lock_dies_with_its_process_and_the_second_is_told_who_holds_it(files, tmp_path, holder):
    args = runs.arguments(files, tmp_path / "run", steps=1, samples=0, eval_data=None)
    with pytest.raises(InputError) as error:
        begin.train(args)
    assert str(error.value) == (
        f"--out {tmp_path}/run: process 7 on there runs in it; wait for its end, or give another folder"
    )
    assert os.listdir(tmp_path / "run") == [folder.LOCK]
    holder.kill()
    holder.wait()
    killed = args.out / ".adapter.12345678"  # while it wrote its result
    (killed / "new").mkdir(parents=True)
    (killed / "lock").write_text("adapter")
    begin.train(args)
    assert [name for name in os.listdir(args.out) if name.startswith(".")] == []
    with folder.alone(tmp_path / "run"):  # which a finished run's report does not need
        assert begin.train(runs.arguments(files, args.out, steps=1, samples=0, eval_data=None, resume=True))
        with pytest.raises(InputError, match=rf"process {os.getpid()} on .* runs in it"), folder.alone(args.out):
            pass


def test_what_was_made_for_the_lock_goes_if_nothing_was_written(tmp_path):
    with folder.alone(tmp_path / "a" / "b"):
        assert os.listdir(tmp_path / "a" / "b") == [folder.LOCK]
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with folder.alone(tmp_path / "mine" / "b"):
        (tmp_path / "mine" / "b" / "x").write_text("")
    with folder.alone(tmp_path / "mine"):
        pass
    assert os.listdir(tmp_path / "mine" / "b") == ["x"]


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(locks.UNSUPPORTED[0], "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.warns(Notice, match="no lock keeps a second run out of it: Function not"), folder.alone(tmp_path / "a"):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from jaxpeft import files

        with files.appearing(tmp_path / "b") as made:
            (made / "x").write_text("")
    assert os.listdir(tmp_path) == ["b"]


def test_a_run_on_a_read_only_file_system_is_one_line(files, tmp_path, monkeypatch):
    """As when one that lies there is to be continued; a new one is refused sooner."""

    def read_only(file, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))

    monkeypatch.setattr(locks, "_open", read_only)
    with pytest.raises(InputError, match=rf"--out {tmp_path}/run: cannot be written: Read-only file system"):
        begin.train(runs.arguments(files, tmp_path / "run"))
    assert os.listdir(tmp_path) == []


def test_two_runs_that_begin_at_once_have_a_folder_each(tmp_path, monkeypatch):
    """The first comes between the second's choice of a folder and its lock."""
    monkeypatch.chdir(tmp_path)
    taken = []

    def train(args):
        if not taken:
            taken.append(args.out)
            args.out.mkdir(parents=True)
            raise folder.Taken("taken")
        return {"out": args.out}

    monkeypatch.setattr(begin, "train", train)
    assert run.run()["out"] == Path("out/run-2") and taken == [Path("out/run-1")]


@pytest.mark.parametrize("inner", ["run/adapter", "run/checkpoints/2/mine"])
def test_a_run_in_a_runs_folder_is_refused(files, tmp_path, inner):
    (tmp_path / "run").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # no run's
    (tmp_path / "run" / "config.json").write_text('{"arguments": {}, "method": []}')
    with pytest.raises(InputError, match=rf"{inner}: is inside the run in {tmp_path}/run; give a folder outside of it"):
        begin.train(runs.arguments(files, tmp_path / inner))
    assert os.listdir(tmp_path / "run") == ["config.json"]


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("name", "moved"),
    [("", True), ("", False), ("metrics.jsonl", False), ("config.json", False), ("checkpoints", True)],
)
def test_what_is_taken_away_ends_the_run_at_the_next_step(files, tmp_path, monkeypatch, name, moved):
    out = tmp_path / "run"
    account = loop.Loop._account

    def taking(self, pending):
        account(self, pending)
        if pending.step == 3:  # while the checkpoint of step 2 may still be written
            gone = out / name
            if moved:
                gone.rename(tmp_path / "moved")
            else:
                self.checkpoints.wait()  # a folder that is written into cannot be deleted at once
                shutil.rmtree(gone) if gone.is_dir() else gone.unlink()

    monkeypatch.setattr(loop.Loop, "_account", taking)
    with pytest.raises(
        RunError, match="deleted or moved while the run was going, which has ended at step [34]"
    ) as error:
        begin.train(runs.arguments(files, out, eval_data=None, samples=0))
    assert str(error.value).startswith(f"{out / name}: ") and error.value.status == 2
    assert not (out / name).exists(), sorted(out.rglob("*"))


@pytest.mark.slow
def test_two_commands_at_once(files, cache, tmp_path):
    """One runs; the other says one line, and the first one's checkpoints stay."""
    args = runs.arguments(files, tmp_path / "run", steps=400, checkpoint_every=5, samples=0)
    argv, environment = runs.command(args, cache)
    pipe = subprocess.PIPE
    both = [subprocess.Popen(argv, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    while all(process.poll() is None for process in both):
        both[0].poll()
        os.sched_yield()
    second, first = sorted(both, key=lambda process: process.poll() is None)
    lines = second.communicate()[1].splitlines()
    assert second.returncode == 2 and len(lines) == 1, lines
    assert f"process {first.pid} on " in lines[0] and "runs in it; wait for its end" in lines[0]
    first.send_signal(signal.SIGTERM)
    assert first.communicate(timeout=120)[1] and first.returncode == 143


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path)])
def test_what_is_no_lock_is_named_and_stays(make, tmp_path):
    lock = tmp_path / folder.LOCK
    make(lock)
    with pytest.raises(InputError, match=r"its lock, .*\.lock, .*; remove it"), folder.alone(tmp_path):
        pass
    assert os.path.lexists(lock)
