"""Decoding on a CPU beside torch's: how many tokens a second?

    python -m experiments.traffic.decode_speed           # an hour on one CPU core; needs the extra `test`
    python -m experiments.traffic.decode_speed --draw    # table from the data

On one core of a processor of AMD's (AVX2), which other work shared: of SmolLM2-135M we take 1.14 and 1.18 of the CPU
time of torch for 64 tokens of one row and of eight, 1.11 for 512 tokens of one row; 0.32 to 0.67 for the embedded
model. The tokens are the same. What is slower is the compiled program: each token copies each layer's kernels out of
their stack, which XLA's products on a CPU need whole. Eight rows of 512 tokens are not measured.

Each side is a process that keeps its model; they take turns at every figure, ROUNDS times. Greedy, in float32, prompts
of 32 random tokens, exactly as many new ones as said; a call of each shape comes first and is not counted. torch's side
is transformers' `generate` with its cache and `sdpa` attention, on the same weights. Seconds are of the clock and of
CPU, of all threads; others may have used the machine, so the pairs say more than the figures. Weights of
SmolLM2-135M-Instruct are its 4-bit release, dequantized, which does not bear on speed. Data in
results/traffic/decode_speed.json, table in decode_speed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from experiments.memory.common import table

RESULTS = Path(__file__).resolve().parents[1] / "results/traffic"
DATA, TABLE = RESULTS / "decode_speed.json", RESULTS / "decode_speed.md"
ROUNDS, LONG_ROUNDS, ROWS = 3, 2, (1, 8)
MODELS = {
    "embedded, 4M": (64, 224),
    "SmolLM2-135M-Instruct": (64, 512),
}  # name -> new tokens; the first has no more room
SIDES, PROMPT = ("jaxpeft", "torch"), 32


def prompts(rows: int, vocabulary: int) -> list[list[int]]:
    """Random ids, the same for both sides."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (rows, PROMPT)).tolist()


def ours(folder: str) -> Callable[[int, int, bool], Any]:
    """rows, new tokens, whether only to compile -> their ids."""
    import jaxpeft as jp
    from jaxpeft.generate import generate

    model, params = jp.load_pretrained(folder, "float32")

    def call(rows: int, new: int, first: bool) -> Any:
        given = prompts(rows, model.config.vocab_size)
        ends = [generate(model, params, given[:1], 1, eos=())[0][0]] if first else [-1]
        return generate(model, params, given, new, eos=ends)

    return call


def theirs(folder: str) -> Callable[[int, int, bool], Any]:
    """Likewise."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def call(rows: int, new: int, first: bool) -> Any:
        ids = torch.tensor(prompts(rows, model.config.vocab_size))
        options = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
        count = 2 if first else new
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **options
        )
        return found[:, PROMPT:].tolist()

    return call


def serve(folder: str, side: str) -> None:
    """A figure for every line "rows new" of the input."""
    call = (ours if side == "jaxpeft" else theirs)(folder)
    seen = set()
    for line in sys.stdin:
        rows, new = map(int, line.split())
        if (rows, new) not in seen:
            call(rows, new, True)
            seen.add((rows, new))
        clock, cpu = time.perf_counter(), time.process_time()
        ids = call(rows, new, False)
        row = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu, "ids": ids}
        assert all(len(own) == new for own in ids)
        print(json.dumps(row), flush=True)


def agreeing(a: list[list[int]], b: list[list[int]]) -> int:
    """The fewest tokens of a row until the two differ."""
    rows = [[x == y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]
    return min(row.index(False) if False in row else len(row) for row in rows)


def measure() -> list[dict[str, Any]]:
    """A row for each model and case, with the seconds of every round."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    os.environ.update(environment)
    import jaxpeft as jp
    from jaxpeft import assets, hf

    found = []
    with contextlib.ExitStack() as stack:
        workers: dict[tuple[str, str], tuple[IO[str], IO[str]]] = {}
        for name in MODELS:
            folder = str(assets.MODEL)
            if name != "embedded, 4M":
                folder = f"{stack.enter_context(tempfile.TemporaryDirectory())}/model"
                params = jp.load_pretrained(assets.smollm2(), "float32")[1]
                jp.save_pretrained(folder, hf.load_config(assets.smollm2()), params)
            command = [sys.executable, "-m", "experiments.traffic.decode_speed", "--serve", folder]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            for side in SIDES:
                worker = subprocess.Popen([*command, side], env=environment, **pipes)
                stack.callback(worker.wait)
                assert worker.stdin is not None and worker.stdout is not None
                stack.callback(worker.stdin.close)
                workers[name, side] = worker.stdin, worker.stdout
        for rounds, length in ((ROUNDS, 0), (LONG_ROUNDS, 1)):
            for name, rows in itertools.product(MODELS, ROWS):
                new = MODELS[name][length]
                seen: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
                for _, side in itertools.product(range(rounds), SIDES):
                    into, out = workers[name, side]
                    into.write(f"{rows} {new}\n")
                    into.flush()
                    seen[side].append(json.loads(out.readline()))
                same = agreeing(*(seen[side][0]["ids"] for side in SIDES))
                row: dict[str, Any] = {"model": name, "rows": rows, "new": new, "same_tokens": same}
                row["cores"] = len(os.sched_getaffinity(0))
                for side, field in itertools.product(SIDES, ("seconds", "cpu_seconds")):
                    row[f"{side}_{field}"] = [round(one[field], 3) for one in seen[side]]
                print(row, file=sys.stderr, flush=True)
                found.append(row)
                DATA.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    return found


def draw(rows: list[dict[str, Any]]) -> str:
    """The table: medians of tokens per second, and of the pairs' ratios of time."""
    lines = []
    for row in rows:
        cells = [row["model"], str(row["rows"]), str(row["new"])]
        for side in SIDES:
            cells.append(f"{row['rows'] * row['new'] / statistics.median(row[f'{side}_seconds']):.1f}")
        for field in ("seconds", "cpu_seconds"):
            pairs = zip(row[f"jaxpeft_{field}"], row[f"torch_{field}"], strict=True)
            cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
        lines.append([*cells, str(row["same_tokens"])])
    names = ["model", "rows", "new tokens", "jaxpeft, tokens/s", "torch, tokens/s"]
    return table([*names, "time beside torch", "CPU time beside torch", "tokens until they differ"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only the table")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    rows = json.loads(DATA.read_text()) if args.draw else measure()
    cores = max(row["cores"] for row in rows)
    TABLE.write_text(f"Greedy decoding on {cores} CPU core{'s' * (cores > 1)}, float32; medians.\n\n{draw(rows)}\n")
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
