"""How much computing passes before anything is seen: the first step of `jaxpeft train`, the first token of `generate`?

    python -m experiments.start                  # five minutes on two CPU cores
    python -m experiments.start --tree FOLDER    # of another version of the library, in that folder; nothing is written
    python -m experiments.start --draw           # table from the data

Training takes 18 CPU seconds to its first step once its programs are in the cache, and 34 before; 47 at commit 960c41b,
without a cache. A continuation takes 4.1 and 8.5; it was 11.6.

Both commands run as a newcomer types them, on the embedded model, each in a process of its own that is killed when
metrics.jsonl has its first training row, or standard output its first byte. Seconds are of CPU, user and system, of
the whole process, read when that is seen (every hundredth of a second): what else the machine does bears on them
less than on the clock. `first` has an empty cache of compiled programs, `again` finds there what `first` has compiled;
`off` is --no-compile-cache. torch is installed beside the library, as it is with many users. Before its first step
training scores the model as it was, on 256 texts and with 32 answers. Data in results/start/start.json, table in
start.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.memory.common import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments/results/start"
TIMES = 3
COMMANDS = {"train": ["train"], "generate": ["generate", "--prompt", "Once upon a time"]}


def until(command: list[str], seen: Callable[[subprocess.Popen[bytes]], bool], tree: Path, cache: str) -> float:
    """Seconds of CPU of a process until `seen`, which also ends it.

    Raises:
      RuntimeError: if it ends before.
    """
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment = {**mine, "PYTHONPATH": str(tree), "JAXPEFT_CACHE": cache}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=tree)
        try:
            while not seen(process):
                if process.poll() is not None:
                    errors.seek(0)
                    raise RuntimeError(f"{' '.join(command)}: {errors.read().decode()[-2000:]}")
                time.sleep(0.01)
            # After the command's name in brackets; user and system time are the 14th and 15th field of all.
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()


def first_step(tree: Path, cache: str, flags: list[str]) -> float:
    """Seconds of CPU until the first step of training on the embedded model and texts is done."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"

        def seen(process: subprocess.Popen[bytes]) -> bool:
            log = out / "metrics.jsonl"
            return log.is_file() and '"train"' in log.read_text()

        command = [sys.executable, "-m", "jaxpeft", *COMMANDS["train"], *flags, "--out", str(out)]
        return until(command, seen, tree, cache)


def first_token(tree: Path, cache: str, flags: list[str]) -> float:
    """Seconds of CPU until the first token of a continuation is printed."""

    def seen(process: subprocess.Popen[bytes]) -> bool:
        assert process.stdout is not None
        return bool(process.stdout.read(1))

    return until([sys.executable, "-m", "jaxpeft", *COMMANDS["generate"], *flags], seen, tree, cache)


def measure(tree: Path, with_cache: bool) -> list[dict[str, Any]]:
    """A row for each command and state of the cache: the seconds of every time."""
    rows = []
    for name, until_seen in (("train", first_step), ("generate", first_token)):
        seconds: dict[str, list[float]] = {}
        for _ in range(TIMES):
            with tempfile.TemporaryDirectory() as cache:
                if with_cache:
                    for state in ("first", "again"):
                        seconds.setdefault(state, []).append(until_seen(tree, cache, []))
                    seconds.setdefault("off", []).append(until_seen(tree, cache, ["--no-compile-cache"]))
                else:
                    seconds.setdefault("as it is", []).append(until_seen(tree, cache, []))
        rows += [{"command": name, "cache": state, "cpu_seconds": found} for state, found in seconds.items()]
    return rows


def draw(rows: list[dict[str, Any]]) -> str:
    """A table of medians and ranges."""
    body = [
        [
            row["command"],
            row["cache"],
            f"{statistics.median(row['cpu_seconds']):.1f}",
            f"{min(row['cpu_seconds']):.1f} to {max(row['cpu_seconds']):.1f}",
        ]
        for row in rows
    ]
    return table(["command", "cache of programs", "CPU seconds, median", "range"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="folder of another version of the library")
    parser.add_argument("--draw", action="store_true", help="make the table from the data alone")
    args = parser.parse_args()
    file = RESULTS / "start.json"
    if args.draw:
        rows = json.loads(file.read_text())
    else:
        rows = measure(args.tree or ROOT, with_cache=args.tree is None)
    if args.tree is None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "start.md").write_text(draw(rows))
    print(draw(rows), end="")


if __name__ == "__main__":
    main()
