"""Real processes that train one model: the losses of one, through a death, a signal and other numbers of processes."""

import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft import errors, launched
from jaxpeft.cli import main
from jaxpeft.train.metrics import read
from tests import runs, virtual

# The command, in which the process gets a signal once step 4 has been accounted for.
WORKER = """
import os, sys
from jaxpeft.cli import main
from jaxpeft.train import loop

number, *flags = sys.argv[1:]
account = loop.Loop._account


def struck(self, pending):
    account(self, pending)
    if pending.step == 4:
        os.kill(os.getpid(), int(number))


if int(number):
    loop.Loop._account = struck
sys.exit(main(flags))
"""


def start(args, count, devices=1, struck=None, number=0, differ=None):
    """The processes of a run; `struck` gets the signal `number`, process 1 other fields if some differ."""
    environment = {**runs.command(args)[1], **virtual.devices(devices)}
    changed = [differ if differ and index == 1 else {} for index in range(count)]
    words = [runs.command(replaced(args, **own))[0][3:] for own in changed]
    return launch([["-c", WORKER, str(number if i == struck else 0), *own] for i, own in enumerate(words)], environment)


def launch(commands, environment):
    """Processes of Python with these arguments, and the flags that connect them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    where = ["--processes", str(len(commands)), "--coordinator", f"127.0.0.1:{port}", "--process-id"]
    return [
        subprocess.Popen([sys.executable, *words, *where, str(index)], env=environment, **pipes)
        for index, words in enumerate(commands)
    ]


def replaced(args, **fields):
    return type(args)(**{**vars(args), **fields})


def ends(started):
    """[(status, stdout, stderr)] of processes; all are killed should one hang."""
    try:
        return [(process.returncode, *said) for process in started for said in [process.communicate(timeout=150)]]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def told(files, tmp_path_factory):
    """A run in one process; another in four, of which one dies, then in two, of which one gets SIGTERM, then in one."""
    out = tmp_path_factory.mktemp("processes")
    common = {"steps": 7, "batch_size": 8, "schedule": "constant", "checkpoint_every": 2, "samples": 1, "eval_every": 0}
    one = runs.arguments(files, out / "one", **common)
    jp.run(**{name: value for name, value in vars(one).items() if name not in ("config", "json")})
    several = runs.arguments(files, out / "several", **common)
    traced = {"profile_steps": "2", "profile_process": 1}
    four = start(replaced(several, mesh="data=2,fsdp=2", **traced), 4, struck=2, number=9)
    while four[2].poll() is None:
        time.sleep(0.1)
    died = time.monotonic()
    four = ends(four)
    patience = time.monotonic() - died
    two = ends(start(replaced(several, mesh="fsdp=4", resume=True), 2, devices=2, struck=1, number=15))
    last = runs.run(replaced(several, resume=True))
    assert last.returncode == 0, last.stderr
    return {"one": out / "one", "several": out / "several", "four": four, "two": two, "patience": patience}


def test_the_losses_and_the_order_are_those_of_one_process(told):
    """Of the same examples in the same order, whatever devices and processes they were on."""
    one, several = (read(told[name] / "metrics.jsonl") for name in ("one", "several"))
    counted = ("split", "step", "tokens", "target_tokens", "lr")
    assert [[row.get(name) for name in counted] for row in one] == [
        [row.get(name) for name in counted] for row in several
    ]
    np.testing.assert_allclose([row["loss"] for row in several], [row["loss"] for row in one], rtol=1e-5)


def test_the_adapter_is_that_of_one_process(told):
    one, several = (load_file(told[name] / "adapter" / "adapter_model.safetensors") for name in ("one", "several"))
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(several[name], tensor, rtol=1e-3, atol=1e-4 * np.abs(tensor).max(), err_msg=name)


def test_steps_are_recorded_by_the_process_that_was_asked_to(told):
    assert len([*(told["several"] / "trace").rglob("*.xplane.pb")]) == 1


def test_a_death_stops_the_others_with_one_line_that_names_it(told):
    """Within a minute, and with exit status 1."""
    status, _, said = zip(*told["four"], strict=True)
    assert status == (1, 1, -9, 1)
    assert told["patience"] < 60
    assert re.search(r"jaxpeft: error: process 2 \(process \d+ on .*\): died, or hangs; .*--resume goes on", said[0])
    assert "Traceback" not in "".join(said)


def test_a_signal_to_one_process_stops_all_where_they_saved(told):
    status, _, said = zip(*told["two"], strict=True)
    assert status == (143, 143)
    assert "".join(said).count("stopped by SIGTERM at step") == 1
    assert "continuing from step 2" in said[0]


def test_one_process_speaks(told):
    """What the others say is why they have ended, or nothing."""
    for _, out, said in [*told["four"][1:], *told["two"][1:]]:
        assert out == ""
        assert not [line for line in said.splitlines() if "error" not in line and "SIGTERM: waits" not in line]


@pytest.mark.slow
def test_two_processes_merge_what_one_does(told, files, tmp_path):
    """The same bytes, of which each had a part."""
    adapter = str(told["one"] / "adapter")
    words = ["merge", "--model", str(files / "model"), "--adapter", adapter, "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    _, environment = runs.command(runs.arguments(files, tmp_path))
    found = ends(launch([["-m", "jaxpeft", *words, str(tmp_path / "two"), "--mesh", "auto"]] * 2, environment))
    assert [status for status, _, _ in found] == [0, 0], found
    assert "folded in" in found[0][1] and found[1][1:] == ("", "")
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("mesh", "differ", "message"),
    [
        (None, {"lr": 0.5}, "the processes disagree: --lr is 0.01 in process 0 and 0.5 in process 1"),
        ("data=3", None, "--mesh data=3: 3 devices, there are 2"),
    ],
)
def test_refusals_are_one_line_of_one_process(files, tmp_path, mesh, differ, message):
    args = runs.arguments(files, tmp_path / "run", mesh=mesh)
    status, _, said = zip(*ends(start(args, 2, differ=differ)), strict=True)
    assert status == (2, 2)
    (line,) = [line for one in said for line in one.splitlines()]
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"), [pytest.param("file", "is a file", marks=pytest.mark.slow), ("ran", "already holds a run")]
)
def test_a_folder_that_cannot_be_used_is_one_line_of_the_first(files, tmp_path, name, message):
    """The others do not look at it, and end."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "ran").mkdir()
    (tmp_path / "ran" / "config.json").write_text("{}")
    status, _, said = zip(*ends(start(runs.arguments(files, tmp_path / name), 2)), strict=True)
    assert status == (2, 2)
    assert message in said[0] and said[0].count("\n") == 1 and said[1] == ""
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_waits_in_vain_says_so(files, tmp_path, index):
    """After what JAX prints itself."""
    args = runs.arguments(files, tmp_path / "run", processes=2, process_id=index, coordinator="127.0.0.1:1")
    argv, environment = runs.command(args)
    hasty = (
        "import sys; from jaxpeft import cli, distributed; distributed._ARRIVAL = 2; sys.exit(cli.main(sys.argv[1:]))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", hasty, *argv[3:], "--coordinator", f"127.0.0.1:{port}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "--processes 2: waited for 2 seconds at 127.0.0.1" in done.stderr.splitlines()[-1]


def test_a_host_that_there_is_not_is_named(files, tmp_path):
    args = runs.arguments(files, tmp_path / "run", processes=2, process_id=0, coordinator="no-such-host.invalid:80")
    argv, environment = runs.command(args)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "--coordinator no-such-host.invalid:80: there is no host 'no-such-host.invalid'" in done.stderr


# Which process this is.


@pytest.mark.parametrize(
    ("flags", "environment", "place"),
    [
        ((None, None, None), {}, None),
        ((1, None, None), {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, None),
        ((4, 2, "host:80"), {}, (4, 2, "host:80")),
        ((None, None, None), {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "h:1"},
         (2, 1, "h:1")),
        ((2, None, None), {"JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "h:1"}, (2, 1, "h:1")),
        ((None, None, None), {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, (None, None, None)),
        ((None, None, None), {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, (None, None, None)),
        (
            (None, None, None),
            {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
             "JAX_COORDINATOR_ADDRESS": "h:1"},
            (8, 5, "h:1", 1),
        ),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "WARNING: not known, please set it"}, None),
        (("auto", None, None), {}, (None, None, None)),
    ],
)  # fmt: skip
def test_place(flags, environment, place):
    found = launched.place(*flags, environment)
    assert found == (None if place is None else launched.Place(*place))


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ((4, None, "h:1"), {}, "--processes 4: needs --process-id, from 0 to 3"),
        ((4, 4, "h:1"), {}, "--process-id 4: must be from 0 to 3, with --processes 4"),
        ((4, 1, None), {}, "--processes 4: needs --coordinator, HOST:PORT of process 0"),
        ((4, 1, "h"), {}, "--coordinator h: should be HOST:PORT"),
        ((None, 1, None), {}, "--process-id: needs --processes"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: should be a whole number"),
    ],
)
def test_place_refusals(flags, environment, message):
    with pytest.raises(errors.InputError, match=re.escape(message)):
        launched.place(*flags, environment)
