"""How long until the first batch of long data, and in how much memory?

    python -m experiments.long_data                 # ten minutes on two CPU cores, 2 GiB of disk
    python -m experiments.long_data --rows 0.01     # a hundredth of the rows; nothing is written
    python -m experiments.long_data --draw          # table from the data

In seconds, once it has been read before: a million short rows (27.6 million tokens) took 5.6 s, 1.2 of CPU, where the
first reading took 208 s and 117 of CPU; 200,000 conversations 2.0 s after 184 s. Memory grew by 182 MiB at most; with
every row's tokens as an object of its own, 100,000 rows alone were 59 to 136 MiB. The machine's two cores were
shared with other work, so that CPU is what to compare.

Short random rows, written to a temporary folder, are read by `load_examples` and packed into the first 20 batches of
8 x 256 tokens, each time in a process of its own: without the cache, with an empty one, and once more. Conversations go
through a ChatML template that is rendered for every turn. Seconds of CPU are those of all processes, workers included;
memory is the growth of the reading process's peak (what a mapped file shows of itself counts, and can be given back at
any time). The tokenizer is the embedded model's. Data in results/long_data/long_data.json, table in long_data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.memory.common import table
from jaxpeft import assets, data, hf

RESULTS = Path(__file__).resolve().parent / "results/long_data"
ROWS = {"texts": 1_000_000, "conversations": 200_000}
READINGS = ("without the cache", "first", "second")
WORDS = "the a little dog cat ran to from house tree garden one two three happy sad big small and then said".split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows_of(kind: str, count: int) -> Iterator[dict[str, Any]]:
    """`count` short rows, the same ones every time."""
    rng = random.Random(0)
    text = lambda: " ".join(rng.choices(WORDS, k=8))
    for _ in range(count):
        if kind == "texts":
            yield {"prompt": text(), "completion": " " + text()}
        else:
            turns = [("user", text()), ("assistant", text())]
            yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def read(file: str, cache: bool) -> dict[str, Any]:
    """Reads a file up to its first batches, in this process."""
    tokenizer = hf.load_tokenizer(assets.MODEL)
    tokenizer.chat_template = TEMPLATE
    before, start = used(), time.perf_counter()
    examples, report = data.load_examples(file, tokenizer, 256, cache=cache)
    batches = data.make_batches(examples, 8, 256, 0, pack=True)
    for _ in range(20):
        next(batches)
    wall, after = time.perf_counter() - start, used()
    return {
        "examples": report.examples,
        "tokens": report.positions,
        "seconds": wall,
        "cpu_seconds": after[0] - before[0],
        "peak_growth": after[1] - before[1],
        "identity": batches.get_state()["identity"],
    }


def used() -> tuple[float, int]:
    """Seconds of CPU of this process and those it has waited for, and its peak memory in bytes."""
    mine, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime
    return seconds, mine.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(share: float) -> list[dict[str, Any]]:
    """All kinds and readings, each in a process of its own."""
    found = []
    for kind, most in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{kind}.jsonl"
            with file.open("w") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows_of(kind, int(most * share)))
            for reading in READINGS:
                command = [sys.executable, "-m", "experiments.long_data", "--read", str(file), "--reading", reading]
                environment = {**os.environ, "JAXPEFT_CACHE": str(Path(folder) / "cache")}
                said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
                row = {"kind": kind, "reading": reading, "cores": os.cpu_count(), "bytes": file.stat().st_size}
                found.append({**row, **json.loads(said)})
                print(found[-1], file=sys.stderr, flush=True)
    return found


def document(rows: list[dict[str, Any]]) -> str:
    """The table."""
    body = [
        [
            row["kind"],
            f"{row['examples']:,}",
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['tokens']:,}",
            row["reading"],
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_growth'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    names = ["rows", "number", "MiB", "tokens", "reading", "seconds", "CPU seconds", "MiB of memory"]
    return "# Long data up to the first batches\n\n" + table(names, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the committed data; measure nothing")
    parser.add_argument("--rows", type=float, default=1.0, help="share of the rows")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--reading", default=READINGS[0], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read, cache=args.reading != READINGS[0])))
        return
    file = RESULTS / "long_data.json"
    if args.draw:
        (RESULTS / "long_data.md").write_text(document(json.loads(file.read_text())))
        return
    rows = measure(args.rows)
    print(document(rows))
    if args.rows == 1.0:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        (RESULTS / "long_data.md").write_text(document(rows))


if __name__ == "__main__":
    main()
