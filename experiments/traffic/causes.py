"""What does the 7B step on an H200 move above the floor, and why?

    python -m experiments.traffic.causes                 # compiles the step: two minutes
    python -m experiments.traffic.causes --dump DIR      # of XLA's files of it
    python -m experiments.traffic.causes --draw          # table from the data

Every instruction of the compiled step belongs to one cause, and so does every array of the floor (floor.py): a frozen
product has what itself reads and writes, and what the floor lets ride along on products (SwiGLU, norms, rotations, sums
of the stream) has the rest of it. A second floor lets nothing ride along but z and e: every module is a program of its
own that reads its inputs and writes its results once, a sum together with the norm after it, and a gradient's program
makes again what the gradients of A read.

Of 999 GB the floor has 615, the second floor 773 (ratios 1.62 and 1.29).

Data in results/traffic/causes.json, table in causes.md and docs/profile.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from experiments.memory import common
from experiments.traffic import ledger
from experiments.traffic.floor import BACKWARD, FACTORS, FORWARD, Work, floor, maps, widths
from jaxpeft.memory import aot, hlo, targets
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.movement import Move, moves
from jaxpeft.models import geometries

NAME, CASE, TARGET = "causes", "7B", "h200"
BEGIN, END = "<!-- drawn by python -m experiments.traffic.causes --draw -->", "<!-- end of the causes -->"
# Cause: what would take out what is above the floor.
CAUSES = {
    "frozen products": "",
    "z = x A and e = dy B^T, in kernels of their own": "a product's blocks that share z among them",
    "dA, dB": "",
    "partial sums of dA, dB, added up": "sums that stay on the chip (a cluster of blocks)",
    "attention": "",
    "SwiGLU": "a fused backward: d_gate and d_up written by the product of d_y, gate and up read by the products",
    "norms, sums of the stream": "products that norm what they read, and add what they write",
    "rotations of q and k": "attention that rotates what it reads",
    "copies to and from what is kept": "attention and products that read and write layers of stacks",
    "head, loss, embedding": "",
    "gradients' sums, tables, the rest": "",
}
_SLICES = ("dynamic-slice", "slice")
_SEEN = ("bitcast", "reshape", "transpose", "copy")


def cause(op: str, kind: str) -> str:
    """The cause of an instruction, by its name stack and kind."""
    names = list(CAUSES)
    if "lora_low_product" in op:
        return names[1]
    if "lora_row_product" in op:
        return names[2]
    if kind == "kernel":
        return names[0]
    if "grad:" in op:
        return names[3]
    if kind == "attention":
        return names[4]
    if "mlp.activated" in op:
        return names[5]
    if re.search(r"Head|lm_head|Embed", op) or "/while/body/closed_call/while/" not in op:
        return names[9]
    if kind.startswith("copy"):
        return names[10] if "lora_low" in op else names[8]
    if op.endswith("concatenate"):
        return names[7]
    return names[6]


def copied(program: hlo.Program, move: Move) -> float:
    """Bytes that a fusion reads and writes to have a slice of an array as an array."""
    made = move.instruction
    if made.opcode != "fusion":
        return 0.0
    _, root = program.computations[made.called[0]]
    outputs = program.instructions[root].operands if program.instructions[root].opcode == "tuple" else ()
    total = 0.0
    for access, number in zip(move.writes, outputs, strict=False):
        found = program.instructions[number]
        while found.opcode in _SEEN:
            found = program.instructions[found.operands[0]]
        total += 2 * access.bytes if found.opcode in _SLICES else 0.0
    return total


def moved(dump: Path) -> dict[str, float]:
    """Bytes by cause, of XLA's files of a step."""
    program = hlo.read(dump)
    found: dict[str, float] = defaultdict(float)
    for move in moves(Dataflow(program))[0]:
        size = move.times * sum(a.bytes for a in (*move.reads, *move.writes) if a.space == "device")
        own = cause(move.instruction.op_name, move.kind)
        if own == "norms, sums of the stream":
            part = move.times * copied(program, move)
            found["copies to and from what is kept"] += part
            size -= part
        if own == "dA, dB":  # partial sums in float32 are written here
            part = move.times * sum(a.bytes for a in move.writes)
            found["partial sums of dA, dB, added up"] += part
            size -= part
        found[own] += size
    return dict(found)


def least(config: dict[str, Any], work: Work) -> dict[str, float]:
    """The floor by cause; its sum is that of floor.py."""
    w, linear, layers = widths(config), maps(config), config["num_hidden_layers"]
    whole = floor(config, work)
    each = layers * work.tokens * work.dtype
    products = sum(sum(sizes) for sizes in linear.values())
    size = lambda names: sum(2 * w[n] if n == "lse" else w[n] for n in names.split())  # lse is float32
    attention = sum(size(names) for table in (FORWARD, BACKWARD) for names in table["attention"])
    gate = w["gate"]
    # Riding along: forward gate and up in place of their product; backward the same, and d_gate, d_up in place of its
    # gradient; for d A of down_proj gate and up again.
    swiglu = gate + 3 * gate + gate
    loss = whole["loss"] + 2 * work.dtype * math.ceil(4 * config["vocab_size"] * work.tokens / (256 << 20)) * (
        config["vocab_size"] * config["hidden_size"]
    )
    factors = sum(sum(sizes) for sizes in linear.values())
    assert set(FACTORS) == set(linear)
    low = 4 * work.rank * len(linear) * layers * work.tokens * work.dtype
    names = list(CAUSES)
    found = dict.fromkeys(CAUSES, 0.0) | {
        names[0]: 2 * each * products + whole["weights"] + whole["loss"] - loss + whole["adapters"] - low,
        names[1]: low / 2,
        names[2]: each * factors + low / 2,
        names[4]: each * attention,
        names[5]: each * swiglu,
        names[9]: loss,
    }
    found[names[6]] = whole["total"] - sum(found.values())
    return found


def by_modules(config: dict[str, Any], work: Work) -> dict[str, float]:
    """The second floor by cause: the first, with SwiGLU, norms and rotations as programs of their own."""
    w, names = widths(config), list(CAUSES)
    each = config["num_hidden_layers"] * work.tokens * work.dtype
    return least(config, work) | {
        # gate, up -> their product; its gradient, gate, up -> two gradients and the product again.
        names[5]: each * (3 + 6) * w["gate"],
        # x -> m; x and o -> h and n; h and down's -> y. x, o, d_y, d_n twice -> n, d_h; x, d_h, d_m thrice -> m, d_x.
        names[6]: each * (2 + 4 + 3 + 7 + 7) * w["x"],
        # Forward, again before attention's gradient, and after it.
        names[7]: each * 3 * 2 * (w["q"] + w["k"]),
    }


def figures(dump: Path) -> dict[str, Any]:
    """{"moved", "floor", "modules"} by cause."""
    key = {**ledger.CASES[CASE]}
    config = geometries.load(key["geometry"])
    tokens = key["batch_size"] * key["seq_len"]
    kept = ("q_proj", "k_proj", "v_proj", "attention", "o_proj", "gate_proj", "up_proj")
    work = Work(tokens=tokens, group=2048, rank=key["rank"], kept=kept)
    floors = {"floor": least(config, work), "modules": by_modules(config, work)}
    return {"moved": moved(dump), **floors, "jax": jax.__version__}


def table(found: dict[str, Any]) -> str:
    """GB by cause: moved, of it in each floor, and above the first."""
    cells = lambda own, *floors: [f"{size / 1e9:,.0f}" for size in (own, *floors, own - floors[0])]
    body = [
        [name, *cells(found["moved"].get(name, 0.0), found["floor"][name], found["modules"][name]), instead]
        for name, instead in CAUSES.items()
    ]
    body.append(["all", *cells(*(sum(found[part].values()) for part in ("moved", "floor", "modules"))), ""])
    header = ["what moves", "GB", "floor", "by modules", "above the floor", "what would take it out"]
    return common.table(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the committed data; compile nothing")
    parser.add_argument("--dump", type=Path, help="XLA's files of the step; none: it is compiled")
    args = parser.parse_args()
    file = ledger.RESULTS / f"{NAME}.json"
    if args.draw:
        found = json.loads(file.read_text())
    elif args.dump:
        found = figures(args.dump)
    else:
        made = ledger.program({**ledger.CASES[CASE]})
        with tempfile.TemporaryDirectory() as dump:
            aot.compile(targets.target(TARGET), made.function, *made.args, dump=dump)
            found = figures(Path(dump))
    file.write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    common.write(f"{NAME}.md", f"# What the {CASE} step on an {TARGET} moves above the floor\n\n{text}", ledger.RESULTS)
    before, _, rest = ledger.PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    if rest:
        ledger.PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    print(text, end="")


if __name__ == "__main__":
    main()
