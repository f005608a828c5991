"""`jaxpeft plan`: what a fine-tuning step needs on a device that need not be here, and what fits a budget."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

from jaxpeft.cli.arguments import StepArguments, check_step, describe_only, methods, parse_bytes, settled
from jaxpeft.errors import InputError
from jaxpeft.files import check_creatable


@dataclasses.dataclass(frozen=True)
class Plan(StepArguments):
    """Say before the run what a step needs: who owns the bytes, what it computes, whether it fits.

    --method, --save and --target take several with commas (--save with semicolons); every combination is a row.
    """

    budget: str | None = None
    """Bytes of one device, such as 24GiB: find the plan with the least recomputation that fits, for `train --save`."""
    by: Literal["flops", "time"] = "flops"
    """What --budget finds the least of: products computed again, or the step's least time on the target."""
    actions: str | None = None
    """What --budget may do besides recomputing, with commas: save, compress, offload. Default: save."""
    traffic: bool = False
    """Say what each step moves and its least time on the target, too; see `profile --traffic`."""
    largest: bool = False
    """Find the largest batch and the longest sequence that fit, too; compiles several times for each row."""
    check: bool = False
    """Run the step on the attached device, which must be the target, and compare with the peak measured there."""
    picture: Path | None = None
    """File for the rows as stacked bars (PNG, SVG or PDF)."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Plan) -> dict[str, Any]:
    """Returns {"model", "rows": [...]}; see `jaxpeft.memory.planner.row` for a row, `moving` for one with --traffic.

    Raises:
        InputError: for arguments that cannot be used.
    """
    args = settled(args)
    check_step(args)
    if args.budget is not None and args.save is not None:
        raise InputError(f"--save {args.save}: --budget searches the plan; leave one of them out")
    if args.budget is not None and args.remat != "loops":
        raise InputError(f"--remat {args.remat}: --budget searches plans of the loops; leave it out, or name a --save")
    if args.budget is None and args.actions is not None:
        raise InputError(f"--actions {args.actions}: says what --budget may do; add --budget")
    if args.budget is None and args.by != "flops":
        raise InputError(f"--by {args.by}: says what --budget finds the least of; add --budget")
    budget = None if args.budget is None else parse_bytes("--budget", args.budget)
    allowed = [action.strip() for action in (args.actions or "save").split(",")]
    if unknown := [action for action in allowed if action not in ("save", "compress", "offload")]:
        raise InputError(f"--actions {args.actions!r}: unknown action {unknown[0]!r}; known: save, compress, offload")
    if args.picture is not None:
        if args.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise InputError(f"--picture {args.picture}: must end with .png, .svg or .pdf")
        if not os.path.isdir(args.picture.parent):
            raise InputError(f"--picture {args.picture}: there is no folder {args.picture.parent}")
        if not os.path.lexists(args.picture):
            check_creatable(args.picture)
    if not args.check:
        describe_only()

    from jaxpeft import assets, models
    from jaxpeft.backward.plan import parse
    from jaxpeft.memory import planner, search, targets
    from jaxpeft.models import geometries

    devices = targets.targets(args.target)
    plans = [None] if args.save is None else [parse(text) for text in args.save.split(";")]
    raw = geometries.load(str(assets.MODEL) if args.model is None else args.model)
    config = models.for_longer(raw, args.rope_scaling)
    chosen = methods(args)
    for device in devices:
        if args.by == "time":
            search.rates(device, allowed)  # a device without them is said here, too
        targets.devices(device)  # a missing compiler is said before the first compilation

    def dtype_on(device):
        return models.compute_dtype(config, args.dtype, device.platform)

    def make(method, device, plan, batch_size=args.batch_size, seq_len=args.seq_len):
        layout = (True, args.accumulate, device.chips, args.task, args.num_labels, args.remat)
        return planner.make_step(config, method, batch_size, seq_len, plan, dtype_on(device), *layout)

    rows = []
    for name, method in chosen:
        for device in devices:
            for plan in plans if budget is None else [parse("blocks")]:
                if budget is None:
                    step = make(method, device, plan)
                    _say(f"compiling {name} for {device.name}, {step.plan}")
                    made = planner.moving(step, device) if args.traffic else planner.row(step, device)
                else:
                    by_plan = lambda plan, method=method, device=device: make(method, device, plan)
                    step, made = search.fit(by_plan, device, budget, allowed, _say, by=args.by)
                    if args.traffic and "traffic" not in made:
                        made = planner.moving(step, device)
                    made["budget_bytes"] = budget
                if args.largest:
                    made |= _largest(args, make, method, device, step.plan, config, budget or device.usable_bytes)
                if args.check:
                    made["measured_bytes"] = _measured(step, device)
                rows.append({"method": name, **made, "dtype": dtype_on(device)})
    document = {"model": args.model or "embedded", "task": args.task, "rows": rows}
    if args.picture is not None:
        from jaxpeft.memory.bars import write_bars

        write_bars(document, args.picture)
    return document


def _largest(args: Plan, make: Any, method: Any, device: Any, plan: Any, config: Any, room: int) -> dict[str, int]:
    from jaxpeft import models
    from jaxpeft.memory import planner, search

    def total(**sizes):
        made = planner.row(make(method, device, plan, **sizes), device)
        _say(f"{', '.join(f'{k} {v}' for k, v in sizes.items())}: {made['bytes']['total'] / 2**30:.2f} GiB")
        return made["bytes"]["total"]

    quantum = args.accumulate * device.chips
    batch = search.largest(lambda n: total(batch_size=n), room, args.batch_size, quantum)
    if "image_size" in config:  # its tokens follow from that
        return {"largest_batch": batch}
    assert args.seq_len is not None
    step = 128 if args.seq_len >= 128 else 1
    limit = models.family(config).from_hf(config).config.max_position_embeddings
    start = max(args.seq_len // step * step, step)
    return {
        "largest_batch": batch,
        "longest_sequence": search.largest(lambda n: total(seq_len=n), room, start, step, limit),
    }


def _measured(step: Any, device: Any) -> int:
    import jax
    import jax.numpy as jnp

    from jaxpeft.memory import targets
    from jaxpeft.train.step import in_place

    if not targets.attached(device):
        here = jax.devices()[0].device_kind
        raise InputError(f"--check: the target is {device.name}, attached is {here}; run it on a {device.name}")

    def filled(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.ones(x.shape, x.dtype)

    state = jax.tree.map(filled, step.state)
    batch = jax.tree.map(filled, step.batch)
    return targets.measured_peak(jax.jit(in_place(step.function), donate_argnums=0), *state.parted, batch)


def _moved(found: dict[str, Any], unit: int) -> tuple[str, str, str]:
    """What is moved, the share of copies and fills, and the least time, if it is known."""
    least = f"{1e3 * found['bound_s']:.1f}" if "bound_s" in found else "-"
    return f"{found['bytes'] / unit:.2f}", f"{found['avoidable_bytes'] / max(found['bytes'], 1):.1%}", least


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(document: dict[str, Any]) -> None:
    """Prints the rows as a table, largest owners in the columns."""
    import rich.console
    import rich.table

    from jaxpeft.memory.bars import unit_of
    from jaxpeft.train.memory import CATEGORIES

    rows = document["rows"]
    unit, size = unit_of(rows)
    table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    moving = ("moved", "copies", "ms at least") if any("traffic" in row for row in rows) else ()
    columns = ("method", "target", *CATEGORIES, "total", "left", "fits", "TFLOP", "recomputed", *moving)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 else "left", overflow="fold")

    def digits(value):
        return f"{value / size:.2f}"

    for row in rows:
        share = row["recompute_flops"] / row["flops"] if row["flops"] else 0.0
        table.add_row(
            row["method"],
            row["target"],
            *(digits(row["bytes"][name]) for name in CATEGORIES),
            digits(row["bytes"]["total"]),
            digits(row["device_bytes"] - row["bytes"]["total"]),
            "yes" if row["fits"] else "no",
            f"{row['flops'] / 1e12:.3g}",
            f"{share:.1%}",
            *(_moved(row["traffic"], size) if moving else ()),
        )
    console = rich.console.Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    first, dtypes = rows[0], "/".join(dict.fromkeys(row["dtype"] for row in rows))
    console.print(
        f"{document['model']}, batch {first['batch_size']} x {first['seq_len']} tokens, {dtypes}, {unit}; "
        f"compiled by JAX {first['jax']}\n"
    )
    console.print(table)
    for row in rows:
        notes = [f"--save {row['save']}" + (" --remat policy" if row["remat"] == "policy" else "")]
        if row["host_bytes"]:
            notes.append(f"{digits(row['host_bytes'])} {unit} in the host's memory")
        if "largest_batch" in row:
            longest = f", longest sequence {row['longest_sequence']}" if "longest_sequence" in row else ""
            notes.append(f"largest batch {row['largest_batch']}{longest}")
        if "measured_bytes" in row:
            notes.append(f"measured {digits(row['measured_bytes'])} {unit}")
        console.print(f"{row['method']} on {row['target']}: {'; '.join(notes)}", soft_wrap=True)
