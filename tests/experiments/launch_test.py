"""The scripts that launch several processes: their syntax, and what they start, against processes of this machine."""

import os
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from jaxpeft.train.metrics import read
from tests import runs

LAUNCH = runs.ROOT / "experiments" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

# In place of `srun`: four tasks, two for each command that stands for one, as SLURM tells them.
SRUN = """#!/usr/bin/env bash
shift
for ((i = 0; i < 2; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost "$@" &
    started+=($!)
done
for process in "${started[@]}"; do wait "$process" || exit $?; done
"""
# In place of `gcloud`: notes what it is asked, and says that the slice is there at the second time.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$NOTES"
case "$*" in
    *format*) if [ "$(grep -c format "$NOTES")" = 1 ]; then echo WAITING_FOR_RESOURCES; else echo ACTIVE; fi ;;
    *describe*) exit 1 ;;
esac
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return runs.make_files(tmp_path_factory.mktemp("files"))


def flags(files, out, **changes):
    short = {"steps": 2, "batch_size": 4, "samples": 0, "eval_data": None, "eval_every": 0, "checkpoint_every": 1}
    return runs.flags(runs.arguments(files, out, **short, **changes))


def environment(tmp_path, **programs):
    """Of a script, with these programs before all others."""
    found = runs.command(runs.arguments(tmp_path, tmp_path))[1] | {"PYTHON": sys.executable}
    for name, text in programs.items():
        program = tmp_path / name
        program.write_text(text)
        program.chmod(0o755)
    return found | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def finished(out, log):
    """Whether a run of two steps has ended, and one process alone has spoken."""
    assert [row["step"] for row in read(out / "metrics.jsonl")] == [1, 2]
    assert (out / "report.json").is_file() and log.count("last training loss") == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_syntax(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if checker := shutil.which("shellcheck"):
        done = subprocess.run([checker, "--shell=bash", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_local_processes(files, tmp_path):
    out = tmp_path / "run"
    command = [LAUNCH / "local.sh", "2", "train", *flags(files, out, mesh="fsdp=2")]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    finished(out, done.stdout)


@pytest.mark.slow
def test_slurm(files, tmp_path):
    """JAX's own detection of SLURM, by the variables that `srun` sets; submitted again, the run goes on."""
    out = tmp_path / "run"
    variables = environment(tmp_path, srun=SRUN) | {"SLURM_JOB_ID": str(random.randrange(2**20))}
    for steps in ("1", "2"):
        command = ["bash", LAUNCH / "slurm.sbatch", *flags(files, out, schedule="constant"), "--steps", steps]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert "continuing from step 1" in done.stderr
    finished(out, done.stdout)
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=variables, capture_output=True, text=True)
    assert done.returncode and "needs --out" in done.stderr


@pytest.mark.parametrize("words", [["--out", "a run"], ["--out=a run"]])
def test_a_slurm_job_that_is_there_goes_on(tmp_path, words):
    """However its folder is named."""
    known = environment(tmp_path, srun='#!/bin/sh\necho "$@"\n')
    command = ["bash", LAUNCH / "slurm.sbatch", *words, "--steps", "3"]
    begins = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run/config.json").touch()
    goes_on = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert begins.endswith("--steps 3\n") and goes_on == begins.replace("\n", " --resume\n")
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "--out"], env=known, capture_output=True, text=True)
    assert done.returncode and "needs --out" in done.stderr


SAVES = """#!/bin/sh
trap 'sleep 1; touch "saved $JAX_PROCESS_ID"; exit $JAX_PROCESS_ID' TERM
touch "began $JAX_PROCESS_ID"
while :; do sleep 0.1; done
"""


def test_after_a_signal_local_processes_are_waited_for(tmp_path):
    """The script ends behind the last of them, with the status of one that has failed."""
    known = environment(tmp_path, saves=SAVES) | {"PYTHON": str(tmp_path / "saves"), "PORT": "1"}
    with subprocess.Popen(["bash", LAUNCH / "local.sh", "3", "train"], env=known, cwd=tmp_path) as script:
        while len([*tmp_path.glob("began *")]) < 3:
            time.sleep(0.05)
        script.terminate()
        assert script.wait(timeout=60) == 2
    assert len([*tmp_path.glob("saved *")]) == 3


def test_queued_resource(tmp_path):
    """It is asked for, waited for, and gets the same command on all hosts; flags arrive as they were given."""
    notes = tmp_path / "notes"
    variables = {
        "NOTES": str(notes),
        "NAME": "tune",
        "ZONE": "z",
        "TYPE": "v5p-64",
        "OUT": "/mnt/a run",
        "PATIENCE": "0",
    }
    command = [LAUNCH / "tpu.sh", "--data", "my rows.jsonl", "--mesh", "fsdp=32"]
    known = environment(tmp_path, gcloud=GCLOUD) | variables
    subprocess.run(command, env=known, check=True, timeout=60)
    asked = notes.read_text().splitlines()
    assert [re.search(r"describe|create|ssh", line)[0] for line in asked] == [
        "describe", "create", "describe", "describe", "ssh", "ssh",
    ]  # fmt: skip
    assert "--worker=all" in asked[-1] and "--processes auto" in asked[-1]
    assert r"--out /mnt/a\ run --data my\ rows.jsonl --mesh fsdp=32" in asked[-1]
    known.pop("TYPE")
    done = subprocess.run(command, env=known, capture_output=True, text=True)
    assert done.returncode and "accelerator type" in done.stderr


def test_gke():
    """A pod for each host of the slice, as many devices as the mesh has, and a folder that all of them see."""
    (document,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    devices = job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    shape = [int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    (script,) = container["args"]
    assert devices == shape[0] * shape[1] * shape[2] and f"--mesh fsdp={devices} " in script
    assert subprocess.run(["bash", "-n", "-c", script], capture_output=True).returncode == 0
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
