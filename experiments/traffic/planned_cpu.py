"""Does a LoRA step on a CPU take the memory that its plan says?

    python -m experiments.traffic.planned_cpu           # a quarter of an hour on two CPU cores; resumes
    python -m experiments.traffic.planned_cpu --draw    # table from the data

29 of 30 steps are within 10 %, +0.3 to +10.6 %; SmolLM2-135M takes some 65 MiB more than planned whatever it keeps.

Each row is a process of its own: `jaxpeft plan --target cpu --check`, LoRA of rank 8 on every linear map. Planned are
the compiler's bytes of the step; measured is the most that the process has resident while a step runs, above what it
had before, with the step's arguments added (`jaxpeft.memory.resident.measured_peak`). Data in
results/traffic/planned_cpu.json, table in planned_cpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.memory.common import table

RESULTS = Path(__file__).resolve().parents[1] / "results/traffic"
SMALL = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
# Name -> rows and tokens of a row.
MODELS = {"embedded, 4M": (4, 256), "30M": (2, 256), "SmolLM2-135M": (2, 256)}
DTYPES = ("float32", "bfloat16")
SAVES = ("everything", "matmuls", "blocks", "offload", "compressed")
MiB = 2**20


def measure(name: str, dtype: str, save: str) -> dict[str, Any]:
    """A row: bytes planned and measured in a process of its own."""
    from jaxpeft import assets

    rows, length = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(SMALL))
        model = {"embedded, 4M": str(assets.MODEL), "30M": str(config)}.get(name) or str(assets.smollm2())
        step = ["--rank", "8", "--batch-size", str(rows), "--seq-len", str(length), "--dtype", dtype, "--save", save]
        command = [sys.executable, "-m", "jaxpeft", "plan", "--model", model, "--target", "cpu", "--check", "--json"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        said = subprocess.run([*command, *step], stdout=subprocess.PIPE, check=True, text=True, env=environment)
    (found,) = json.loads(said.stdout)["rows"]
    return {
        "model": name,
        "rows": rows,
        "length": length,
        "dtype": dtype,
        "save": save,
        "workspace": found["bytes"]["workspace"],
        "planned": found["bytes"]["total"] + found["host_bytes"],
        "measured": found["measured_bytes"],
        "jax": found["jax"],
    }


def draw(rows: list[dict[str, Any]]) -> str:
    """The table, in MiB."""
    body = [
        [
            f"{row['model']}, {row['rows']} x {row['length']}",
            row["dtype"],
            row["save"],
            *(f"{row[name] / MiB:.0f}" for name in ("workspace", "planned", "measured")),
            f"{row['measured'] / row['planned'] - 1:+.1%}",
        ]
        for row in rows
    ]
    return table(["model", "type", "--save", "workspace MiB", "planned MiB", "measured MiB", "off"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="make the table from the data alone")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "planned_cpu.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["model"], row["dtype"], row["save"]) for row in rows}
    wanted = [(name, dtype, save) for name in MODELS for dtype in DTYPES for save in SAVES]
    for key in [] if args.draw else wanted:
        if key not in done:
            rows.append(measure(*key))
            rows.sort(key=lambda row: wanted.index((row["model"], row["dtype"], row["save"])))
            file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            print(*key, f"{rows[-1]['measured'] / rows[-1]['planned']:.3f}", file=sys.stderr, flush=True)
    (RESULTS / "planned_cpu.md").write_text("# Planned and measured on a CPU\n\n" + draw(rows))
    print(draw(rows), end="")


if __name__ == "__main__":
    main()
