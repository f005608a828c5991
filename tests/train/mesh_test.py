"""Whole runs on eight host devices: the losses and the adapter of one device, continued on another mesh."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft.train.metrics import read
from tests import virtual

WORKER = """
import json, sys
import jaxpeft as jp
for arguments in json.loads(sys.argv[1]):
    jp.run(**arguments)
"""

# Prints {name: [exit status, stderr]} of commands.
REFUSALS = """
import contextlib, io, json, sys
from jaxpeft.cli import main

def run(words):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(words)
    return status, said.getvalue()

print(json.dumps({name: run(words) for name, words in json.loads(sys.argv[1]).items()}))
"""


def process():
    """How a process of eight devices is started."""
    return {"env": virtual.devices(8), "capture_output": True, "text": True}


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """Folders of a run on one device, and of one that began on a mesh and went on on another."""
    out = tmp_path_factory.mktemp("mesh")
    common = {"model": str(files / "model"), "data": str(files / "train.jsonl"), "eval_data": str(files / "eval.jsonl")}
    common |= {"batch_size": 8, "seq_len": 64, "schedule": "constant", "lr": 1e-2, "rank": 4, "samples": 1}
    common |= {"checkpoint_every": 2, "eval_every": 2, "dtype": "float32"}
    one, moved = {**common, "out": str(out / "one")}, {**common, "out": str(out / "moved")}
    wanted = [
        {**one, "steps": 4},
        {**moved, "steps": 2, "mesh": "auto"},
        {**moved, "steps": 4, "mesh": "tensor=2,seq=4", "resume": True},
    ]
    done = subprocess.run([sys.executable, "-c", WORKER, json.dumps(wanted)], **process())
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "one", out / "moved"


def test_losses_are_those_of_one_device(trained):
    one, moved = ([(row["split"], row["step"], row["loss"]) for row in read(out / "metrics.jsonl")] for out in trained)
    assert [row[:2] for row in one] == [row[:2] for row in moved]
    np.testing.assert_allclose([row[2] for row in one], [row[2] for row in moved], rtol=1e-5)


def test_the_adapter_is_that_of_one_device(trained):
    one, moved = (load_file(out / "adapter" / "adapter_model.safetensors") for out in trained)
    assert one.keys() == moved.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(moved[name], tensor, rtol=1e-3, atol=1e-4 * np.abs(tensor).max(), err_msg=name)


REFUSED = {
    "--mesh data=3": "--mesh data=3: 3 devices, there are 8",
    "--mesh data=8 --batch-size 12": "--batch-size 12: must be a multiple of the mesh's data x fsdp = 8",
    "--mesh data=8 --batch-size 16 --accumulate 4": "data x fsdp = 8 devices, times --accumulate 4: 32",
    "--mesh seq=8 --seq-len 30": "--seq-len 30: must be a multiple of the mesh's seq = 8 devices",
    "--mesh rows=8": "'rows=8' should be AXIS=DEVICES with one of data, fsdp, tensor, seq",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """({flags: (status, what was said)} of the command in one process with eight devices, the folder of the runs)."""
    out = tmp_path_factory.mktemp("refused")
    commands = {flags: ["train", "--out", str(out / "run"), *flags.split()] for flags in REFUSED}
    done = subprocess.run([sys.executable, "-c", REFUSALS, json.dumps(commands)], **process())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), out


@pytest.mark.parametrize("flags", REFUSED)
def test_refusals(refused, flags):
    """One line, exit status 2, and nothing written."""
    found, out = refused
    status, said = found[flags]
    assert status == 2
    assert REFUSED[flags] in said and said.count("\n") == 1
    assert not (out / "run").exists()
