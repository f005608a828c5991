"""How long may a row be, under which plan?

    python -m experiments.memory.long_rows           # compiles what the data lacks: an hour of one core
    python -m experiments.memory.long_rows --draw    # tables from the data

The train step of LoRA on all linear maps, Llama-3.1-8B, one row, compiled for three cards over a base in NF4 (QLoRA)
and in bfloat16, rank 16: the longest row that fits, to 4 % or 2,048 tokens. Each of them has been compiled; a step's
bytes are nearly linear in the row's length, so the next length that is tried lies on the line through the last two.
Then rank 32, as in the figures that Unsloth publishes for this model. Nothing was run: a row of half a million tokens
takes a step of many minutes. The model has 131,072 positions; for longer rows its configuration is given more. Data in
results/memory/long_rows.json, tables in long_rows.md.

- rtx4090, NF4: tokens 2,048 under everything, 4,096 matmuls, 34,816 blocks, 47,104 with the MLP by tiles, 215,040 and
  the layers' inputs in the host's memory.
- h100, NF4: tokens 14,336 under everything, 22,528 matmuls, 159,744 blocks, 223,232 with the MLP by tiles, at least
  880,640 and the layers' inputs in the host's memory.
- h200, NF4: tokens 26,624 under everything, 43,008 matmuls, 299,008 blocks, 421,888 with the MLP by tiles, at least
  1,228,800 and the layers' inputs in the host's memory. (2,068,480 do not fit.)
- Beside Unsloth's published rows, at rank 32 with inputs in the host's memory: 2.6 (24 GB), 2.6 (48 GB), 3.2 (80 GB)
  times. With the inputs on the device, the MLP by tiles, 0.57, 0.59 and 0.64 times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.memory import common
from experiments.memory.common import GIB
from jaxpeft import recipe
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries

NAME = "long_rows"
TITLE = "llama3.1-8b, train step of LoRA on all linear maps, one row, bfloat16"
SIZES = {"geometry": "llama3.1-8b", "batch_size": 1, "dtype": "bfloat16"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("quantize+lora", {"format": "nf4"}),
    "bfloat16": ("lora", {}),
}
TARGETS = ("rtx4090", "h100", "h200")
TILE, AWAY = "blocks,tile=4096", "blocks,block_input=offload,tile=4096"
CODES = "blocks,block_input=compress,tile=4096"
# In this order they are compiled, those beside Unsloth's after the first.
PLANS = (
    ("nf4", ("everything", "matmuls", "blocks", TILE, AWAY)),
    ("bfloat16", (TILE, AWAY, "blocks", "matmuls")),
    ("nf4", (CODES,)),
)
STEP = 2048  # tokens
FIRST = 16384  # of the first row that is compiled; a plan's like where another card has been compiled for
NEAR = 0.04  # of a row's length: a longer one is not looked for
MOST = 5  # compiles for one figure

# Tokens with Unsloth, and with Hugging Face and FlashAttention 2, by the GB of a card: https://unsloth.ai/blog/llama3-3
# (December 2024) and the README of github.com/unslothai/unsloth (000252c9), "Llama 3.1 (8B) max. context length": QLoRA
# on all linear layers, rank 32, batch size 1, rows padded to the full length.
UNSLOTH = {24: (78_475, 5_789), 48: (191_728, 15_502), 80: (342_733, 28_454)}
# What such a card's step is compiled for, and how many of its memories that of the card is.
CARDS = {24: ("rtx4090", 1), 48: ("rtx4090", 2), 80: ("h100", 1)}

Line = tuple[float, float]  # bytes of no row, bytes of a token


def measure(key: common.Row) -> common.Row:
    """A step's bytes by owner."""
    _, options = METHODS[key["base"]]
    method = recipe.parse(key["method"], options, rank=key["rank"])
    sizes = (key["batch_size"], key["seq_len"], key["save"], key["dtype"])
    config = dict(geometries.load(key["geometry"]))
    config["max_position_embeddings"] = max(config["max_position_embeddings"], key["seq_len"])
    made = planner.row(planner.make_step(config, method, *sizes, packed=False), targets.target(key["target"]))
    return {name: made[name] for name in ("bytes", "host_bytes", "flops", "recompute_flops")}


def longest(
    rows: list[common.Row], figure: Callable[[int], common.Row] | None, room: int, like: Line | None = None
) -> tuple[common.Row | None, Line | None]:
    """(the longest row that fits into `room` bytes, or None; the line through the two nearest to it).

    Args:
      rows: figures of some lengths.
      figure: a row's length -> its figure; None: there are no more.
      room: bytes.
      like: a line that is near.
    """
    rows, compiles = list(rows), 0
    while True:
        line = _through(sorted(rows, key=lambda row: abs(row["bytes"]["total"] - room)), like)
        best = max((row for row in rows if row["bytes"]["total"] <= room), key=lambda row: row["seq_len"], default=None)
        length = FIRST if line is None else _next(rows, line, room)
        if is_near(best, length) or length < STEP or figure is None or compiles == MOST:
            return best, line
        rows.append(figure(length))
        compiles += 1


def _next(rows: list[common.Row], line: Line, room: int) -> int:
    """The next length to try; what does not fit makes way for the next smaller one at least."""
    length = _on(line, room if rows else int(0.98 * room))
    return min([length, *(row["seq_len"] - STEP for row in rows if row["bytes"]["total"] > room)])


def is_near(best: common.Row | None, length: int) -> bool:
    """Whether a length is not enough beyond the longest that fits to be tried."""
    return best is not None and length <= max(best["seq_len"] + STEP - 1, (1 + NEAR) * best["seq_len"])


def _on(line: Line, room: int) -> int:
    return int((room - line[0]) / line[1]) // STEP * STEP


def _through(rows: list[common.Row], like: Line | None) -> Line | None:
    if not rows:
        return like
    first = rows[0]
    length, size = first["seq_len"], first["bytes"]["total"]
    if len(rows) > 1:
        slope = (size - rows[1]["bytes"]["total"]) / (length - rows[1]["seq_len"])
    else:
        slope = (size - sum(first["bytes"][name] for name in ("weights", "adapters", "optimizer"))) / length
    return size - slope * length, slope


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """One row of the tables for each target, base and plan, and for each card of Unsloth's.

    Where nothing is compiled, what the data lacks is left out.
    """
    lines: dict[tuple[str, str], Line] = {}

    rows: list[common.Row] = []

    def find(target: str, base: str, save: str, rank: int, room: int, **more: Any) -> None:
        key = {**SIZES, "method": METHODS[base][0], "base": base, "rank": rank, "save": save, "target": target}
        known = [row for row in figures.rows if all(row[name] == value for name, value in key.items())]
        figure = None if figures.measure is None else lambda length: figures(**key, seq_len=length)
        best, line = longest(known, figure, room, lines.get((base, save)))
        open_ = best is None and line is not None and _on(line, room) >= STEP
        if line is None or (figure is None and (open_ or not known)):
            return
        lines[base, save] = line
        found = known if figure is None else [row for row in figures.rows if row.items() >= key.items()]
        closed = is_near(best, _next(found, line, room))
        rows.append({**key, "best": best, "closed": closed, **more})

    for base, plans in PLANS:
        for save in plans:
            for name in names:
                find(name, base, save, 16, targets.target(name).usable_bytes)
        for save in (AWAY, TILE) if (base, plans) == PLANS[0] else ():
            for card, (name, times) in CARDS.items():
                if name in names:
                    find(name, "nf4", save, 32, times * targets.target(name).usable_bytes, card=card)
    return rows


def _tokens(row: common.Row) -> str:
    """The longest row; one whose search has not come to its end is said to be no more than a row that fits."""
    if not row["best"]:
        return "none"
    return f"{'' if row['closed'] else 'at least '}{row['best']['seq_len']:,}"


def table(rows: list[common.Row]) -> str:
    """Tokens, and what they take."""
    body = []
    for row in rows:
        best = row["best"]
        line: list[str | None] = [f"{row['target']}, {row['base']}, `{row['save']}`", _tokens(row)]
        if best:
            size = best["bytes"]
            host = f"{best['host_bytes'] / GIB:.1f}" if best["host_bytes"] else None
            again = f"{best['recompute_flops'] / best['flops']:.1%}"
            line += [*(f"{size[name] / GIB:.2f}" for name in ("weights", "activations", "workspace", "total")), host]
            line.append(again)
        else:
            line += [None] * 6
        body.append(line)
    header = ["target, base, plan", "tokens", "weights", "activations", "workspace", "total", "in the host's memory"]
    return common.table([*header, "recomputed"], body)


def beside(rows: list[common.Row]) -> str:
    """Tokens beside those that Unsloth publishes."""
    body = []
    for card, (name, _) in CARDS.items():
        own = {row["save"]: _tokens(row) for row in rows if row.get("card") == card}
        if own:
            cells = [own.get(save) for save in (TILE, AWAY)]
            body.append([f"{card} GB, compiled for {name}", *cells, *(f"{n:,}" for n in UNSLOTH[card])])
    plans = [f"`{save}`" for save in (TILE, AWAY)]
    return common.table(["card", *plans, "Unsloth", "Hugging Face + FA2"], body)


def verdicts(rows: list[common.Row]) -> list[str]:
    """What tiles are worth, and where that leaves this library beside Unsloth."""
    own = [row for row in rows if "card" not in row and row["best"]]
    tokens = {(row["target"], row["base"], row["save"]): _tokens(row) for row in own}
    words = {
        "everything": "under everything",
        "matmuls": "matmuls",
        "blocks": "blocks",
        TILE: "with the MLP by tiles",
        AWAY: "and the layers' inputs in the host's memory",
    }
    said = []
    for name in dict.fromkeys(row["target"] for row in own):
        found = [f"{tokens[name, 'nf4', save]} {word}" for save, word in words.items() if (name, "nf4", save) in tokens]
        said.append(f"{name}, NF4: tokens {', '.join(found)}.")
    cards = {row["card"]: row for row in rows if "card" in row and row["save"] == AWAY and row["best"]}
    if cards:
        ratio = ", ".join(f"{row['best']['seq_len'] / UNSLOTH[card][0]:.1f} ({card} GB)" for card, row in cards.items())
        said.append(f"Beside Unsloth's published rows, at rank 32 with inputs in the host's memory: {ratio} times.")
    return said


def document(rows: list[common.Row]) -> str:
    """The verdicts and the tables."""
    jax = ", ".join(sorted({row["best"]["jax"] for row in rows if row["best"]}))
    rate = (UNSLOTH[80][0] - UNSLOTH[24][0]) / (80 - 24)
    lines = [
        f"# The longest row\n\n{TITLE}; GiB; JAX {jax}. Compiled, not run.\n",
        common.bullets(verdicts(rows)),
        table([row for row in rows if "card" not in row]),
    ]
    if any("card" in row for row in rows):
        lines += [
            "## Beside published figures\n",
            "NF4, rank 32. Ours are of 95 % of the card's memory. Unsloth's are those of "
            f"https://unsloth.ai/blog/llama3-3, of\nDecember 2024; they lie on one line, {rate:,.0f} tokens for each "
            "GB. 48 GB are two memories of the 24 GB card, with the\nsame compiler.\n",
            beside(rows),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document, targets=",".join(TARGETS))
