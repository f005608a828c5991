"""`jaxpeft plan`: what a fine-tuning step needs on a device that need not be here, and what fits a budget."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any, Literal

from jaxpeft.backward.plan import ACTIONS, is_action
from jaxpeft.cli.arguments import StepArguments, check_step, describe_only, mesh_text, methods, parse_bytes, settled
from jaxpeft.errors import InputError
from jaxpeft.files import check_creatable


@dataclasses.dataclass(frozen=True)
class Plan(StepArguments):
    """Say before the run what a step needs: who owns the bytes, what it computes, whether it fits.

    --method, --save and --target take several with commas (--save with semicolons); every combination is a row. For
    several devices (--target v5p:4x4x4, h200x8) bytes are those of each, with what they send each other and the least
    time; --mesh auto finds the mesh that is fastest of those that fit.
    """

    budget: str | None = None
    """Bytes of one device, such as 24GiB: find the plan with the least recomputation that fits, for `train --save`."""
    by: Literal["flops", "time"] = "flops"
    """What --budget finds the least of: products computed again, or the step's least time on the target."""
    actions: str | None = None
    """What --budget may do besides recomputing, with commas: save, compress, compress12, compress4, prune, offload.
    Default: save."""
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

    A row of several devices is that of `jaxpeft.memory.pods.row`.

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
    known = [action for action in ACTIONS if action != "recompute"]
    if unknown := [action for action in allowed if action == "recompute" or not is_action(action)]:
        raise InputError(f"--actions {args.actions!r}: unknown action {unknown[0]!r}; known: {', '.join(known)}")
    if args.mesh == "auto" and (args.budget is not None or args.largest):
        flag = "--budget" if args.budget is not None else "--largest"
        raise InputError(f"--mesh auto: not together with {flag}, which compiles several times itself; name a mesh")
    if args.picture is not None:
        if args.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise InputError(f"--picture {args.picture}: must end with .png, .svg or .pdf")
        if not os.path.isdir(args.picture.parent):
            raise InputError(f"--picture {args.picture}: there is no folder {args.picture.parent}")
        if not os.path.lexists(args.picture):
            check_creatable(args.picture)
    if not args.check:
        describe_only()

    from jaxpeft import assets, models, sharding
    from jaxpeft.backward.plan import parse
    from jaxpeft.memory import meshes, planner, pods, search, targets
    from jaxpeft.models import geometries

    devices = targets.targets(args.target)
    texts = {device: mesh_text(args, device) for device in devices}
    if args.check and (several := next((device for device in devices if texts[device]), None)):
        raise InputError(f"--check: runs the step on one device, and --target {several.name} has {several.chips}")
    least = parse("blocks")  # with which a search begins
    plans = [None] if args.save is None else [parse(text) for text in args.save.split(";")]
    plans = plans if budget is None else [least]
    raw = geometries.load(str(assets.MODEL) if args.model is None else args.model)
    config = models.for_longer(raw, args.rope_scaling)
    chosen = methods(args)
    for device in devices:
        if args.by == "time":
            search.rates(device, allowed)  # a device without them is said here, too
        targets.devices(device)  # a missing compiler is said before the first compilation

    def dtype_on(device):
        return models.compute_dtype(config, args.dtype, device.platform)

    def make(method, device, plan, mesh=None, batch_size=args.batch_size, seq_len=args.seq_len):
        layout = (True, args.accumulate, mesh, args.task, args.num_labels, args.remat)
        kept = (args.prune_embeddings, args.optimizer_memory)
        of_step = (args.optimizer, args.update_in_backward, *kept, bool(args.adapters))
        return planner.make_step(config, method, batch_size, seq_len, plan, dtype_on(device), *layout, *of_step)

    named = {device: text for device, text in texts.items() if text and text != "auto"}
    meshes_of = {device: sharding.make_mesh(text, targets.devices(device)) for device, text in named.items()}
    # Of all methods and plans, but on meshes that are yet to be found: what one of them refuses is said before anything
    # is compiled.
    steps = {
        (name, device, number): make(method, device, plan, meshes_of.get(device))
        for name, method in chosen
        for device in devices
        for number, plan in enumerate(plans)
        if texts[device] != "auto"
    }
    rows = []
    for name, method in chosen:
        for device in devices:
            mesh = meshes_of.get(device)
            where = f"{device.name} ({named[device]})" if device in named else device.name
            for number, plan in enumerate(plans):
                if texts[device] == "auto":
                    on = lambda mesh, method=method, device=device, plan=plan: make(method, device, plan, mesh)
                    _say(f"compiling {name} for the meshes of {device.name} that promise most")
                    step, made = meshes.best(on, device, args.batch_size, args.accumulate, _say)
                elif budget is None:
                    step = steps[name, device, number]
                    _say(f"compiling {name} for {where}, {step.plan}")
                    measure = pods.row if mesh is not None else planner.moving if args.traffic else planner.row
                    made = measure(step, device)
                else:
                    begun = steps[name, device, number]
                    on_plan = functools.partial(make, method, device, mesh=mesh)
                    by_plan = lambda plan, begun=begun, on_plan=on_plan: begun if plan == least else on_plan(plan)
                    step, made = search.fit(by_plan, device, budget, allowed, _say, by=args.by)
                    if args.traffic and "traffic" not in made:
                        made = planner.moving(step, device)
                    made["budget_bytes"] = budget
                if args.largest:
                    sized = functools.partial(make, method, device, step.plan, mesh)
                    made |= _largest(args, sized, device, mesh, config, budget or device.usable_bytes)
                if args.check:
                    made["measured_bytes"] = _measured(step, device)
                if not args.traffic:  # what several devices do is told by it
                    made.pop("traffic", None)
                rows.append({"method": name, **made, "dtype": dtype_on(device)})
    document = {"model": args.model or "embedded", "task": args.task, "rows": rows}
    if args.picture is not None:
        from jaxpeft.memory.bars import write_bars

        write_bars(document, args.picture)
    return document


def _largest(args: Plan, make: Any, device: Any, mesh: Any, config: Any, room: int) -> dict[str, int]:
    from jaxpeft import models, sharding
    from jaxpeft.memory import planner, search

    def total(**sizes):
        made = planner.row(make(**sizes), device)
        _say(f"{', '.join(f'{k} {v}' for k, v in sizes.items())}: {made['bytes']['total'] / 2**30:.2f} GiB")
        return made["bytes"]["total"]

    quantum = args.accumulate * sharding.num_shards(mesh)
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

    from jaxpeft.compilation import compiled
    from jaxpeft.memory import resident, targets
    from jaxpeft.train.step import in_place

    if not targets.attached(device):
        here = jax.devices()[0].device_kind
        raise InputError(f"--check: the target is {device.name}, attached is {here}; run it on a {device.name}")

    def filled(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.ones(x.shape, x.dtype)

    jitted = jax.jit(in_place(step.function), donate_argnums=0)
    function = compiled(jitted.lower(*step.state.parted, step.batch))
    state = jax.block_until_ready(jax.tree.map(filled, step.state))
    batch = jax.block_until_ready(jax.tree.map(filled, step.batch))
    return resident.measured_peak(function, *state.parted, batch)


def _on_several(rows: list[dict[str, Any]], size: int) -> Any:
    """What the devices send each other, and the least time of a step, as a table."""
    import rich.table

    from jaxpeft.memory.collectives import KINDS

    kinds = [kind for kind in KINDS if any(kind in row["collectives"] for row in rows)]
    known = ("compute", "memory", "interconnect", "host")
    parts = [name for name in known if any(f"{name}_s" in row["bound"] for row in rows)]
    table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("method", "target", "mesh"):
        table.add_column(column, no_wrap=True)
    for column in (*kinds, *parts, "bound", "utilisation", "tokens/s"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        bound, sent = row["bound"], row["collectives"]
        times = (f"{1e3 * bound[f'{name}_s']:.1f}" if f"{name}_s" in bound else "" for name in parts)
        table.add_row(
            row["method"],
            row["target"],
            row["mesh"],
            *(f"{sent[kind]['sent'] / size:.2f}" if kind in sent else "" for kind in kinds),
            *times,
            f"{1e3 * bound['step_s']:.1f}",
            f"{bound['utilisation']:.0%}",
            f"{bound['tokens_per_s']:,.0f}",
        )
    return table


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
    named = ("mesh",) if any("mesh" in row for row in rows) else ()
    columns = ("method", "target", *named, *CATEGORIES, "total", "left", "fits", "TFLOP", "recomputed", *moving)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 + len(named) else "left", overflow="fold")

    def digits(value):
        return f"{value / size:.2f}"

    for row in rows:
        share = row["recompute_flops"] / row["flops"] if row["flops"] else 0.0
        table.add_row(
            row["method"],
            row["target"],
            *(row.get("mesh", "") for _ in named),
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
    if any(row.get("bound") for row in rows):
        console.print(f"\na step, {unit} that each device sends by kind, and the least milliseconds\n")
        console.print(_on_several([row for row in rows if row.get("bound")], size), "")
    for row in rows:
        notes = [f"--save {row['save']}" + (" --remat policy" if row["remat"] == "policy" else "")]
        if row.get("update_in_backward"):
            notes[0] += " --update-in-backward"
        if row.get("prune_embeddings"):
            notes[0] += f" --prune-embeddings {row['prune_embeddings']}"
        if row.get("optimizer_memory") == "host":
            notes[0] += " --optimizer-memory host"
        if row["host_bytes"]:
            notes.append(f"{digits(row['host_bytes'])} {unit} in the host's memory")
        if "largest_batch" in row:
            longest = f", longest sequence {row['longest_sequence']}" if "longest_sequence" in row else ""
            notes.append(f"largest batch {row['largest_batch']}{longest}")
        if row.get("rematerialised", {}).get("instructions"):
            flops = row["rematerialised"]["flops"] / row["flops_per_chip"]
            notes.append(f"the compiler computes again by itself, to save memory, {flops:.1%} of the products")
        if "tried" in row:
            tried = ", ".join(one["mesh"] + ("" if one["fits"] else " (does not fit)") for one in row["tried"])
            notes.append(f"compiled of {row['meshes']} meshes: {tried}")
        if "measured_bytes" in row:
            notes.append(f"measured {digits(row['measured_bytes'])} {unit}")
        console.print(f"{row['method']} on {row['target']}: {'; '.join(notes)}", soft_wrap=True)
