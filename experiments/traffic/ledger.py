"""How much more does a step move than it must?

    python -m experiments.traffic.ledger                  # compiles what the data lacks, then draws; some 8 minutes
    python -m experiments.traffic.ledger --state NAME     # the same for another state of the code, beside the others
    python -m experiments.traffic.ledger --draw           # tables from the data

Every byte that the compiled steps read and write (`jaxpeft profile --traffic`) beside the floor (floor.py): the
reference step of Llama-2-7B (value and gradient, 16 x 1024 tokens, LoRA of rank 64 on all seven maps, adapters in
bfloat16, `matmuls`), and the train step of Llama-3.1-8B (2 x 2048, rank 8, Adam) with block inputs kept and with block
inputs offloaded. A state is the code that was measured; a new one is added without touching the others, and may have
the devices alone whose programs have changed ("in place": the stream lies in what is kept of it, on Hopper). Figures in
results/traffic/ledger.json, by kind and by array in ledger.md; the first table is in docs/profile.md, too.

- before, 7B: of a floor of 615 GB h200 1,167 GB (1.90, copies and fills 15.1%, 59.72 GiB), v5p 1,569 GB (2.55, copies
  and fills 23.8%, 59.84 GiB); it does not fit rtx4090, v5e.
- before, 8B: of a floor of 218 GB h200 334 GB (1.54, copies and fills 2.8%, 16.67 GiB), rtx4090 510 GB (2.34, copies
  and fills 23.8%, 17.07 GiB), v5p 363 GB (1.67, copies and fills 11.7%, 16.82 GiB); it does not fit v5e.
- before, 8B, offloaded: of a floor of 220 GB h200 333 GB (1.52, copies and fills 1.9%, 15.71 GiB), rtx4090 508 GB
  (2.31, copies and fills 23.7%, 16.05 GiB), v5p 359 GB (1.63, copies and fills 11.5%, 15.82 GiB); it does not fit
  v5e.
- after, 7B: of a floor of 615 GB h200 1,011 GB (1.64, copies and fills 4.3%, 59.60 GiB), v5p 1,498 GB (2.44, copies
  and fills 21.6%, 59.71 GiB); it does not fit rtx4090, v5e.
- after, 8B: of a floor of 218 GB h200 330 GB (1.52, copies and fills 1.6%, 16.64 GiB), rtx4090 457 GB (2.10, copies
  and fills 15.0%, 17.03 GiB), v5p 366 GB (1.68, copies and fills 11.3%, 16.79 GiB); it does not fit v5e.
- after, 8B, offloaded: of a floor of 220 GB h200 330 GB (1.50, copies and fills 1.6%, 15.59 GiB), rtx4090 457 GB
  (2.08, copies and fills 15.0%, 16.05 GiB), v5p 366 GB (1.66, copies and fills 11.3%, 15.79 GiB), v5e 247 GB (1.13,
  copies and fills 0.1%, 15.68 GiB).
- in place, 7B: of a floor of 615 GB h200 999 GB (1.62, copies and fills 2.6%, 59.60 GiB).
- in place, 8B: of a floor of 218 GB h200 328 GB (1.51, copies and fills 0.3%, 16.64 GiB).
- in place, 8B, offloaded: of a floor of 220 GB h200 330 GB (1.50, copies and fills 0.9%, 15.59 GiB).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxpeft as jp
from experiments.memory import common, residuals_7b
from experiments.memory.common import GIB
from experiments.traffic.floor import Work, floor
from jaxpeft import tree
from jaxpeft.backward.flops import flops_by_name
from jaxpeft.backward.segments import Segment, recorded
from jaxpeft.memory import aot, hlo, planner, targets
from jaxpeft.memory.owners import Owners, step_owners
from jaxpeft.memory.traffic import traffic
from jaxpeft.models import geometries

NAME = "ledger"
RESULTS = common.RESULTS.parent / "traffic"
PAGE = Path(__file__).resolve().parents[2] / "docs/profile.md"
BEGIN, END = "<!-- drawn by python -m experiments.traffic.ledger --draw -->", "<!-- end of what is drawn -->"
TARGETS = "h200,rtx4090,v5p,v5e"
_COMMON = {"dtype": "bfloat16", "method": "lora"}
CASES: dict[str, dict[str, Any]] = {
    "7B": {"geometry": "llama2-7b", "batch_size": 16, "seq_len": 1024, "rank": 64, "save": "matmuls", "optimizer": 0},
    "8B": {"geometry": "llama3.1-8b", "batch_size": 2, "seq_len": 2048, "rank": 8, "save": "blocks", "optimizer": 1},
}
CASES["8B, offloaded"] = {**CASES["8B"], "save": "blocks,block_input=offload"}
CASES = {name: {**case, **_COMMON} for name, case in CASES.items()}
# Bytes, counted by hand, of a compiled 7B step for an H200 in which every kernel is copied out of its stack.
BY_HAND = {"all": 1609e9, "kernels copied": 425e9, "put into place": 161e9, "zero fills": 50e9}
TITLES = {
    "7B": "llama2-7b, 16 x 1024, rank 64, `matmuls`, value and gradient",
    "8B": "llama3.1-8b, 2 x 2048, rank 8, `blocks`, train step",
    "8B, offloaded": "the same, block inputs in the host's memory",
}


class Program(NamedTuple):
    """A step to be compiled. function, args; donated: whether the first of them is; owners: of arguments, results."""

    function: Any
    args: tuple[Any, ...]
    donated: bool
    owners: Owners


def program(key: common.Row) -> Program:
    """The step of a key: value and gradient, or a train step with Adam."""
    if not key["optimizer"]:
        config = geometries.load(key["geometry"])
        step, args, owners = residuals_7b.reference({**key, "layers": config["num_hidden_layers"]})
        return Program(step, args, False, owners)
    config, sizes = geometries.load(key["geometry"]), (key["batch_size"], key["seq_len"])
    step = planner.make_step(config, jp.lora(rank=key["rank"]), *sizes, key["save"], key["dtype"], packed=False)
    metrics = jax.eval_shape(step.function, step.state, step.batch)[1]
    return Program(
        step.function, (step.state, step.batch), True, step_owners(step.state, step.batch, step.base, metrics)
    )


def least(key: common.Row, segment: Segment) -> dict[str, float]:
    """The floor of a key, whose layers were traced as `segment`."""
    config = geometries.load(key["geometry"])
    work = Work(
        tokens=key["batch_size"] * key["seq_len"],
        group=key["batch_size"] * key["seq_len"] * config["num_hidden_layers"] // segment.steps,
        rank=key["rank"],
        kept={name for name, _ in segment.actions},
        offloaded=sum(segment.kept_bytes()["host"].values()),
        dtype=jnp.dtype(key["dtype"]).itemsize,
        adapters=4 if key["optimizer"] else jnp.dtype(key["dtype"]).itemsize,
        optimizer=bool(key["optimizer"]),
    )
    return floor(config, work)


def measure(key: common.Row) -> common.Row:
    """What the compiled step moves, its floor and its peak; of one that cannot fit, only that."""
    made, device = program(key), targets.target(key["target"])
    with recorded() as segments:
        # A function of its own, which JAX has not traced before.
        jaxpr = jax.make_jaxpr(lambda *args: made.function(*args))(*made.args)
    found = {"floor": least(key, segments["layers"])}
    given = [x for x in jax.tree.leaves(made.args) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    needs = tree.num_bytes(given) + sum(segments["layers"].kept_bytes()["device"].values())
    if needs > device.usable_bytes:
        return {**found, "fits": False, "peak": needs, "refused": "arguments and kept activations"}
    with tempfile.TemporaryDirectory() as dump:
        donated = (0,) if made.donated else ()
        compiled = aot.compile(device, made.function, *made.args, donate_argnums=donated, dump=dump)
        moved = traffic(hlo.read(Path(dump)), made.owners, target=device, flops=flops_by_name(jaxpr)).to_json(12)
    names = ("bytes", "read", "written", "avoidable_bytes", "host_bytes", "flops", "bandwidth_s", "rate_s", "bound_s")
    both = {
        field: {name: row["read"] + row["written"] for name, row in moved[field].items()}
        for field in ("kinds", "categories")
    }
    owners = {row["owner"]: row["read"] + row["written"] for row in moved["owners"]}
    found |= {name: moved[name] for name in names if name in moved} | both | {"owners": owners}
    return {**found, "fits": compiled.fits, "peak": compiled.memory.total}


def collect(figures: common.Figures, states: Sequence[str], names: Sequence[str]) -> list[common.Row]:
    """Every case on every target, in every state; where nothing is measured, those that there are."""
    keys = [
        (case, {"state": state, "target": name, **key})
        for state in states
        for case, key in CASES.items()
        for name in names
    ]
    known = lambda key: any(all(row.get(name) == value for name, value in key.items()) for row in figures.rows)
    return [{"case": case, **figures(**key)} for case, key in keys if figures.measure is not None or known(key)]


def states(rows: Sequence[common.Row]) -> list[str]:
    """Those that have been measured, in order."""
    return list(dict.fromkeys(row["state"] for row in rows))


def ratio(row: common.Row) -> float:
    """What is moved over what must be."""
    return row["bytes"] / row["floor"]["total"]


def totals(rows: Sequence[common.Row], named: bool = True) -> str:
    """Moved, floor, ratio, avoidable, bound and peak, a line per case, target and state.

    named: whether to say the state, and what was counted by hand.
    """
    header = ["step, device", "moved, GB", "floor, GB", "ratio", "copies, fills", "bound, ms", "peak, GiB"]
    body: list[list[Any]] = []
    for case in CASES:
        for name in dict.fromkeys(row["target"] for row in rows):
            own = [row for row in rows if (row["case"], row["target"]) == (case, name)]
            if named and (case, name) == ("7B", "h200"):
                least, (total, *parts) = own[0]["floor"]["total"], BY_HAND.values()
                count = [f"{total / 1e9:,.0f}", f"{least / 1e9:,.0f}", f"{total / least:.2f}"]
                body.append([f"{case}, {name}, by hand", *count, f"{sum(parts) / total:.1%}", None, None])
            body += [_line(row, named) for row in own]
    return common.table(header, body)


def _line(row: common.Row, named: bool) -> list[Any]:
    head = f"{row['case']}, {row['target']}" + (f", {row['state']}" if named else "")
    least, peak = f"{row['floor']['total'] / 1e9:,.0f}", f"{row['peak'] / GIB:.2f}"
    if "refused" in row:
        return [head, None, least, None, None, None, f"does not fit: {peak} of {row['refused']}"]
    share = f"{row['avoidable_bytes'] / row['bytes']:.1%}"
    moved, bound = f"{row['bytes'] / 1e9:,.0f}", f"{1e3 * row['bound_s']:,.0f}"
    return [head, moved, least, f"{ratio(row):.2f}", share, bound, peak if row["fits"] else f"does not fit: {peak}"]


def by(field: str, rows: Sequence[common.Row]) -> str:
    """GB by kind or by array."""
    rows = [row for row in rows if "bytes" in row]
    size: dict[str, float] = {}
    for row in rows:
        for name, own in row[field].items():
            size[name] = max(size.get(name, 0.0), own)
    names = sorted((name for name in size if size[name] >= 5e8), key=lambda name: -size[name])

    def cells(row: common.Row) -> list[Any]:
        return [f"{row[field][name] / 1e9:,.1f}" if name in row[field] else None for name in names]

    body = [[f"{row['case']}, {row['target']}, {row['state']}", *cells(row)] for row in rows]
    return common.table(["GB", *names], body)


def modules(rows: Sequence[common.Row], count: int = 6) -> str:
    """The modules that move most."""
    body = []
    for row in rows:
        if "bytes" in row:
            order = sorted(row["owners"].items(), key=lambda item: -item[1])
            own = [f"{name or 'no module'} {size / 1e9:,.1f}" for name, size in order if "further" not in name]
            body.append([f"{row['case']}, {row['target']}, {row['state']}", ", ".join(own[:count])])
    return common.table(["", "GB of the modules that move most"], body)


def floors(rows: Sequence[common.Row]) -> str:
    """The floors by part."""
    own = {row["case"]: row["floor"] for row in rows}
    parts = list(next(iter(own.values())))
    body = [[f"{case}: {TITLES[case]}", *(f"{own[case][part] / 1e9:,.1f}" for part in parts)] for case in own]
    return common.table(["GB", *parts], body)


def verdicts(rows: Sequence[common.Row]) -> list[str]:
    """Per state and case, what the devices move over the floor."""
    said = []
    for state in states(rows):
        for case in CASES:
            own = [row for row in rows if (row["case"], row["state"]) == (case, state)]
            if not own:
                continue
            fit = [
                f"{row['target']} {row['bytes'] / 1e9:,.0f} GB ({ratio(row):.2f}, copies and fills "
                f"{row['avoidable_bytes'] / row['bytes']:.1%}, {row['peak'] / GIB:.2f} GiB)"
                for row in own
                if row["fits"]
            ]
            not_fit = [row["target"] for row in own if not row["fits"]]
            least = own[0]["floor"]["total"] / 1e9
            said.append(
                f"{state}, {case}: of a floor of {least:,.0f} GB {', '.join(fit)}"
                + (f"; it does not fit {', '.join(not_fit)}." if not_fit else ".")
            )
    return said


def document(rows: Sequence[common.Row]) -> str:
    """The verdicts and the tables."""
    jax = ", ".join(sorted({row["jax"] for row in rows}))
    titles = "; ".join(f"{name}: {title}" for name, title in TITLES.items())
    hand = ", ".join(f"{part} {size / 1e9:,.0f} GB" for part, size in BY_HAND.items())
    head = f"# What a step moves\n\n{titles}; bfloat16; JAX {jax}. GB are 10^9 bytes.\n"
    said = f"By hand: of a 7B step on an h200 in which every kernel is copied out of its stack: {hand}.\n"
    parts = [head, common.bullets(verdicts(rows)), totals(rows), said, "The floors:\n", floors(rows)]
    return "\n".join([*parts, by("kinds", rows), by("categories", rows), modules(rows)])


def page(text: str, rows: Sequence[common.Row]) -> str:
    """A page with the totals between its marks, each device's of the last state in which it was measured."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    own = list({(row["case"], row["target"]): row for row in rows}.values())
    return f"{before}{BEGIN}\n\n{totals(own, named=False)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the committed data; compile nothing")
    parser.add_argument("--state", help="name of the code that is measured; default: the last one in the data")
    parser.add_argument("--targets", default=TARGETS, help="devices to compile for, with commas")
    args = parser.parse_args()
    figures = common.Figures(NAME, None if args.draw else measure, RESULTS)
    known = states(figures.rows)
    if args.state not in known and not args.draw:
        known = [*known, args.state] if args.state else known or ["before"]
    if not args.draw:
        collect(figures, known[-1:] if args.state is None else [args.state], args.targets.split(","))
    rows = collect(common.Figures(NAME, None, RESULTS), known, TARGETS.split(","))
    common.write(f"{NAME}.md", document(rows), RESULTS)
    PAGE.write_text(page(PAGE.read_text(), rows))
    print(common.bullets(verdicts(rows)))  # for the docstring


if __name__ == "__main__":
    main()
