"""SIGINT and SIGTERM at any moment of a command: its status, one line, and nothing of Python's own."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = [signal.SIGINT, signal.SIGTERM]
FRAME = """
import gc, os, signal, sys, time
from jaxpeft import interrupts

def send():
    os.kill(os.getpid(), signal.{name})
    for _ in range(10_000):  # in which Python has its turn
        pass

with interrupts.EndTheCommand():
    try:
{body}
    finally:
        print("undone", flush=True)
        {then}
"""


def begin(*argv: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *argv], env=environment, stdout=pipe, stderr=pipe, text=True)


def script(number: int, body: str, then: str = "") -> subprocess.Popen:
    body = "".join(f"        {line}\n" for line in body.strip().splitlines())
    return begin("-c", FRAME.format(name=signal.Signals(number).name, body=body, then=then))


def check(process: subprocess.Popen, number: int) -> str:
    """What an interrupted process left on stdout; on stderr there is the one line."""
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    assert stderr == f"jaxpeft: interrupted by {signal.Signals(number).name}\n"
    return stdout


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "body",
    [
        "send()",
        # What Python drops: as JAX's callback does, each collection runs ours.
        "gc.callbacks.append(lambda phase, info: phase == 'start' and gc.callbacks.pop() and send())\n"
        "gc.collect()\ntime.sleep(60)",
        "type('Dying', (), {'__del__': lambda self: send()})()\ntime.sleep(60)",
        # What JAX logs.
        "def discover_pjrt_plugins():\n    try:\n        send()\n    except:\n        print('logged')\n"
        "discover_pjrt_plugins()\ntime.sleep(60)",
        # What a library makes something else of.
        "try:\n    send()\nexcept BaseException as error:\n    raise ImportError('half imported') from error",
    ],
    ids=["at once", "gc", "del", "logged", "converted"],
)
def test_a_signal_is_never_dropped(number, body):
    assert check(script(number, body), number) == "undone\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_who_swallows_it_is_ended_after_a_while_and_a_second_ends_at_once(number):
    swallowing = "interrupts.GRACE_SECONDS = 0.1\ntry:\n    send()\nexcept BaseException:\n    time.sleep(60)"
    assert check(script(number, swallowing), number) == ""
    process = script(number, "send()", then="time.sleep(60)")
    assert process.stdout.readline() == "undone\n"
    process.send_signal(number)
    check(process, number)


def test_what_is_answered_goes_on():
    """Ctrl-C in a conversation ends an answer, as often as it is typed; then Python's own end is one line, too."""
    body = "interrupts.GRACE_SECONDS = 0.1\nfor _ in range(3):\n    try:\n        send()\n"
    body += "    except KeyboardInterrupt:\n        interrupts.answered()\ntime.sleep(0.3)"
    process = script(signal.SIGINT, body)
    assert process.communicate(timeout=60) == ("undone\n", "") and process.returncode == 0
    process = begin(
        "-c", FRAME.format(name="SIGINT", body="        pass", then="") + "\nimport atexit\natexit.register(send)"
    )
    check(process, signal.SIGINT)


def test_a_forked_process_ends_by_itself_alone():
    body = "interrupts.GRACE_SECONDS = 0.1\nread, write = os.pipe()\nif not (child := os.fork()):\n"
    body += "    os.write(write, b'.')\n    time.sleep(60)\nos.read(read, 1)\nos.kill(child, signal.SIGTERM)\n"
    body += "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\ntime.sleep(0.3)"
    process = script(signal.SIGTERM, body)
    assert process.communicate(timeout=60) == ("-15\nundone\n", "") and process.returncode == 0


def heard(process: subprocess.Popen) -> None:
    """Waits until the process has its handlers; Python's own ends it before, if it must."""
    status, bit = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGTERM - 1)
    if not status.exists():
        pytest.skip("no /proc to see a process's handlers in")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & bit:
        assert process.poll() is None
        time.sleep(0.001)


def interrupted(command: list[str], delay: float, number: int) -> str:
    """What is on stderr when a command is interrupted a while after its first line."""
    process = begin("-m", "jaxpeft", *command)
    heard(process)
    time.sleep(delay)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, (delay, process.returncode, stderr)
    assert not re.search(r"Traceback|Exception ignored|Error\b", stderr), (delay, stderr)
    return stderr


@pytest.mark.parametrize(("number", "delay"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.4), (signal.SIGINT, 0.8)])
def test_a_command_is_interrupted_while_it_imports(number, delay):
    flags = ["--prompt", "def add(a, b):", "--no-compile-cache", "--max-new-tokens", "4000"]
    stderr = interrupted(["generate", *flags], delay, number)
    assert stderr == f"jaxpeft: interrupted by {signal.Signals(number).name}\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_command_is_interrupted_at_any_moment_of_its_start(command, tmp_path):
    chance = random.Random(1)
    for i in range(12):
        out = tmp_path / str(i)
        flags = ["--steps", "300", "--out", str(out)]
        if command == "generate":
            flags = ["--prompt", "def add(a, b):", "--max-new-tokens", "4000"]
        number = chance.choice(NUMBERS)
        said = interrupted([command, *flags], chance.uniform(0, 12), number)
        trained = f"stopped by {signal.Signals(number).name}" in said
        assert trained or said.endswith(f"jaxpeft: interrupted by {signal.Signals(number).name}\n"), said
        assert trained or not out.exists()
