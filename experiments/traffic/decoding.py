"""What does a token of decoding move, and what does it hold beside the weights and the cache?

    python -m experiments.traffic.decoding           # compiles every row; some minutes
    python -m experiments.traffic.decoding --draw    # table from the data

8B, 16 rows x 4096 slots: 23.7 GiB on a v5p and 24.3 on an H200, 1.05 and 1.11 times the floor, where it was 102 and
153 (4.6 and 7.0 times); beside weights and cache the step holds 16 MiB, where it held 9 GiB and more, more than a
second cache. Weights are read once, on the H200 by a kernel that reads a layer in its stack. What an H200 moves beyond
the floor are partial sums and attention's scores. An RTX 4090 has no such kernel: each layer is cut out once per token
(2.7).

A step of `jaxpeft.generate` as a target's compiler has it: all rows read a token and choose the next, greedily, beside
a cache that is full of slots; and the pass over the prompts that comes first, half as long as the cache. bfloat16;
LoRA of rank 16 on every linear map where it says so. Bytes are of the compiled program
(`jaxpeft.profile(traffic=True)`), the layers counted by their number and the loop over tokens as one; what stands
before that loop counts in full. The floor is the weights once (of the embedding's table nothing, where the head has a
matrix of its own), the cache once, and one slot. Data in results/traffic/decoding.json, table in decoding.md; `before`
is the same step at the library's state before the cache was carried.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from experiments.memory.common import table
from jaxpeft import generate, tree
from jaxpeft.memory import aot, foreign, hlo, targets, traffic
from jaxpeft.models import decoder, geometries

RESULTS = Path(__file__).resolve().parents[1] / "results/traffic"
DATA, TABLE = RESULTS / "decoding.json", RESULTS / "decoding.md"
MIB, GREEDY = 1 << 20, (True, False)
# target, geometry, rows, slots, method
CASES = [
    ("h200", "llama3.1-8b", 16, 4096, ""),
    ("h200", "llama3.1-8b", 16, 4096, "lora"),
    ("h200", "llama3.1-8b", 1, 4096, ""),
    ("v5p", "llama3.1-8b", 16, 4096, ""),
    ("v5p", "llama3.1-8b", 16, 4096, "lora"),
    ("rtx4090", "llama3.1-8b", 4, 4096, ""),
    ("v5e", "llama3.2-1b", 16, 4096, ""),
]


def size(leaves: Any) -> int:
    """Bytes of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


def programs(geometry: str, rows: int, slots: int, method: str) -> tuple[dict[str, Any], Any, Any]:
    """({name: (function, arguments, the donated ones)} of the step and the prompts' pass, parameters, cache)."""
    config = decoder.DecoderConfig.from_hf(geometries.load(geometry), jnp.bfloat16)
    model, params = decoder.decoder(config), tree.unflatten(decoder.shapes(config))
    if method:
        adapted = []

        def leaves(params):
            found, *flat = jp.setup(jp.lora(rank=16), model, params, jax.random.key(0))
            adapted.append(found)
            return flat

        params = tree.combine(*jax.eval_shape(leaves, params))
        model = adapted[0]
    shape = lambda *extents, dtype=jnp.int32: jax.ShapeDtypeStruct(extents, dtype)
    settings = {"temperature": shape(dtype=jnp.float32), "top_k": shape(), "top_p": shape(dtype=jnp.float32)}
    settings["ends"] = shape(1)
    batch = {name: shape(rows, slots // 2) for name in ("tokens", "positions", "segment_ids")} | {"limit": shape(rows)}
    key = jax.eval_shape(lambda: jax.random.key(0))

    def read(params, batch, settings, key, numbers):
        return generate._read.__wrapped__(model, slots, GREEDY, params, batch, settings, key, numbers)

    def step(params, settings, state, until):
        return generate._steps.__wrapped__(model, GREEDY, params, settings, state, until)

    of_read = (params, batch, settings, key, shape(rows))
    state = jax.eval_shape(read, *of_read)
    made = {"step": (step, (params, settings, state, shape()), (2,)), "prompts": (read, of_read, ())}
    return made, params, state["cache"]


def owner(path: str) -> str | None:
    """Of an argument of the step."""
    first, *rest = path.split("/")
    return "adapters" if first == "params" and "lora" in rest else None


def measure(target: str, geometry: str, rows: int, slots: int, method: str) -> dict[str, Any]:
    """Bytes of a case."""
    device = targets.target(target)
    made, params, cache = programs(geometry, rows, slots, method)
    kept = sum(size(leaf) for name, leaf in cache.items() if name in "kv")
    read = size(params) - (size(params["embed_tokens"]) if "lm_head" in params else 0)
    slot = kept // slots
    found: dict[str, Any] = {"weights": size(params), "read": read, "cache": kept, "floor": read + kept + slot}
    for name, (function, arguments, donated) in made.items():
        with tempfile.TemporaryDirectory() as dump:
            compiled = aot.compile(device, function, *arguments, donate_argnums=donated, dump=dump)
            memory = compiled.memory
            found[name] = {
                "total": memory.total,
                "temporaries": memory.temporaries,
                "beside": memory.total - size(params),
            }
            if name == "prompts":
                continue
            program = hlo.read(Path(dump))
            moved = traffic.traffic(program, foreign.owners_of(program, owner), foreign.ForeignAttribution, device)
            of = moved.to_json()
        found[name] |= {field: of[field] for field in ("bytes", "read", "written", "avoidable_bytes", "bandwidth_s")}
        found[name]["categories"] = {name: row["read"] + row["written"] for name, row in of["categories"].items()}
    return found


def draw(rows: list[dict[str, Any]]) -> str:
    """The table."""
    body = []
    for row in sorted(rows, key=lambda row: (CASES.index(tuple(row["case"])), row["when"] != "before")):
        target, geometry, count, slots, method = row["case"]
        step, of = row["step"], row["step"]["categories"]
        weights = of.get("weights", 0) + of.get("adapters", 0)
        figures = [row["floor"], weights, of.get("cache", 0), step["avoidable_bytes"], step["bytes"]]
        name = f"{target}, {geometry}, {count} x {slots}" + (f", {method}" if method else "")
        beside = [step["temporaries"], row["prompts"]["beside"] - row["cache"]]
        ratio = f"{step['bytes'] / row['floor']:.2f}"
        body.append([name, row["when"], *(x / MIB for x in figures), ratio, *(x / MIB for x in beside)])
    names = ["target, model, rows x slots", "", "floor", "weights", "cache", "copies and fills", "moved per token"]
    names += ["of the floor", "step: beside weights and cache", "prompts: beside them"]
    return table(names, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only the table")
    parser.add_argument("--when", default="after", choices=("before", "after"), help="what the rows are called")
    args = parser.parse_args()
    rows = json.loads(DATA.read_text()) if DATA.exists() else []
    if not args.draw:
        rows = [row for row in rows if row["when"] != args.when]
        for case in CASES:
            rows.append({"case": case, "when": args.when, **measure(*case)})
            print(json.dumps(rows[-1]), flush=True)
        DATA.parent.mkdir(parents=True, exist_ok=True)
        DATA.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    TABLE.write_text(f"# A token of decoding\n\nMiB.\n\n{draw(json.loads(DATA.read_text()))}")
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
