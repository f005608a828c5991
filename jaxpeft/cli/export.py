"""`jaxpeft export`: a checkpoint of a training run as an adapter, or as a whole model where the base trained."""

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jaxpeft.cli.arguments import ProcessArguments, mesh_of
from jaxpeft.errors import InputError, Notice


@dataclasses.dataclass(frozen=True)
class Export(ProcessArguments):
    """Write a training run's checkpoint as an adapter, in PEFT's format where PEFT has the method and else in jaxpeft's
    own, or as a whole model where the base trained; the run may still be going on.
    """

    run: Path
    """Folder of the run, the --out of `jaxpeft train`."""
    out: Path
    """Folder to make (it may exist if it is empty), or NAME.gguf. Of several adapters, it has a folder of each."""
    format: Literal["peft", "gguf"] | None = None
    """A folder as PEFT has it, or a file for llama.cpp (LoRA alone). Default: gguf where --out ends so."""
    step: int | None = None
    """Step of the checkpoint. Default: the newest."""
    best: bool = False
    """Take the checkpoint with the lowest validation loss."""
    replay: bool = False
    """Take the steps again, without a checkpoint, from the base and what metrics.jsonl says of each, without a forward
    pass: of methods that move weights along random directions alone (mezo, sparse_mezo, qzo, zo2)."""
    model: str | None = None
    """Directory, GGUF file or hub id of the base, if it has moved since. Default: the run's."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Export) -> dict[str, Any]:
    """Returns {"out", "run", "step", "model", "method": [[name, arguments], ...], "form": "peft", "own" (jaxpeft's own
    form of an adapter, which PEFT does not read), "model" (a whole one) or "gguf"}.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    with mesh_of(args) as mesh:
        return _run(args, mesh)


def _run(args: Export, mesh: Any) -> dict[str, Any]:
    from jaxpeft.checkpoint import foreign
    from jaxpeft.cli.models import check_gguf
    from jaxpeft.files import check_target
    from jaxpeft.gguf import write
    from jaxpeft.train import config

    gguf = args.format == "gguf" or (args.format is None and args.out.suffix == write.SUFFIX)
    write.check_file(args.out) if gguf else check_target(args.out)
    check_gguf(gguf, args.out)
    document = config.read(args.run)
    folder = args.run / "checkpoints"
    rows = told_steps(args.run, args.step, args.best) if args.replay else []
    step = len(rows) if args.replay else chosen_step(folder, args.step, args.best)
    if not args.replay and (why := foreign(folder, step, config.identity(document))):
        raise InputError(f"{folder / str(step)}: {why}")

    import jax

    from jaxpeft import distributed, hf, sharding, shares, tree
    from jaxpeft.cli.models import model_or_default
    from jaxpeft.method import from_specs, setup
    from jaxpeft.models.labels import SCOPE
    from jaxpeft.template import from_document
    from jaxpeft.train import result, several
    from jaxpeft.train.base import load
    from jaxpeft.unused_rows import TABLE, filled
    from jaxpeft.unused_rows import read as read_rows

    arguments = document["arguments"]
    name = model_or_default(args.model or arguments.get("model"))
    adapters = several.from_document(document["adapters"]) if document.get("adapters") else None
    if adapters is not None and gguf:
        raise InputError(f"--out {args.out}: {args.run} trains several adapters, and a file for llama.cpp holds one")
    method = from_specs(document["method"]) if adapters is None else adapters.method
    labels = document.get("labels", [])
    scaling = arguments.get("rope_scaling")
    placement = shares.placement(mesh, lambda path: method.role(path).host)
    how: dict[str, Any] = {"rope_scaling": scaling, "placement": placement}
    base, params, digest = load(name, arguments.get("dtype"), method, labels, **how)
    if digest != document["content"]["model"]:
        raise InputError(f"{name}: is not the base of the run {args.run}; name that one with --model")
    leaves = tree.flatten(params)
    own = {path: leaf for path, leaf in leaves.items() if not path.startswith(SCOPE)}
    place = None if mesh is None else lambda new: sharding.of_leaves(mesh, {**leaves, **new}, own)
    saved = {} if args.replay else saved_leaves(folder, step, place)
    if args.replay:
        leaves = _replayed(method, base, params, arguments, rows)
    elif any(tree.canonical(path) in own and method.changes(path) for path in saved):
        # A stack may have been cut; no start is calculated.
        _, trainable, rest = setup(method, base, params, jax.random.key(0), batches=lambda: ())
        leaves = {**rest, **trainable}
    if (ids := document.get("rows")) is not None and TABLE in saved:
        saved[TABLE] = filled(leaves[TABLE], read_rows(ids), saved[TABLE])
    changed = tree.unflatten({**leaves, **saved})
    beside = (
        from_document(document["text"], f"{args.run / config.FILE}: text:").beside() if document.get("text") else {}
    )
    what = method, changed, own, base.config, name, labels, scaling, beside
    if adapters is not None:
        several.write(args.out, adapters, changed, base.config, name, rope_scaling=scaling, beside=beside)
    elif gguf:
        with tempfile.TemporaryDirectory() as scratch:
            written = result.write((Path(scratch) / "adapter", Path(scratch) / "model"), *what)
            if written.name == "adapter":
                write.save_adapter(args.out, written, base.config)
            else:
                write.save_model(args.out, written, hf.load_pretrained(written, hf.STORED)[1])
    else:
        result.write((args.out, args.out), *what)
    form = "gguf" if gguf else "peft" if adapters is not None else distributed.from_first(lambda: _form(args.out))
    return {"out": args.out, "run": args.run, "step": step, "model": name, "method": document["method"], "form": form}


def _form(out: Path) -> str:
    """What a folder that was written holds, as `run` calls it."""
    from jaxpeft.peft.base import NATIVE
    from jaxpeft.peft.schema import CONFIG, adapter_config

    if not (out / CONFIG).is_file():
        return "model"
    return "own" if adapter_config(out).get("peft_type") == NATIVE else "peft"


def _replayed(method: Any, base: Any, params: Any, arguments: Any, rows: list[dict[str, Any]]) -> Any:
    """All leaves after the steps of a run, taken again from its beginning."""
    import jax

    from jaxpeft.method import setup
    from jaxpeft.replay import replay
    from jaxpeft.train.optimizer import make_direction
    from jaxpeft.train.state import init_state

    init_key, run_key = jax.random.split(jax.random.key(arguments["seed"]))
    model, trainable, rest = setup(method, base, params, init_key, batches=lambda: ())
    state = init_state(method, make_direction("sgd"), trainable, rest, run_key, model)
    return replay(method, state, rows, arguments.get("weight_decay") or 0.0).leaves


def told_steps(run: Path, step: int | None, best: bool) -> list[dict[str, Any]]:
    """The rows of a run's first steps in metrics.jsonl, in order: up to the one named, or all.

    Raises:
      InputError: for `best`, a file that is not there, rows that are missing, or fewer steps than the one named or, of
        all, than the run's.
    """
    from jaxpeft.checkpoint import on_disk
    from jaxpeft.train import config
    from jaxpeft.train.metrics import read

    path = run / "metrics.jsonl"
    if best:
        raise InputError("--best: chooses a checkpoint; with --replay name a step with --step")
    if not path.is_file():
        raise InputError(f"--replay: {path} is missing, which says what each step was")
    rows = {row["step"]: row for row in read(path) if row["split"] == "train"}
    last = max(rows, default=0) if step is None else step
    finished = config.read_report(run)["steps"] if (run / config.REPORT).exists() else 0
    done = max([*on_disk(run / "checkpoints"), finished])
    if step is None and last < done:
        raise InputError(f"--replay: {path} tells of {last} of the run's {done} steps; name one of them with --step")
    if missing := [number for number in range(1, last + 1) if number not in rows]:
        raise InputError(f"--replay: {path} has no row of step {missing[0]}; it has {len(rows)} steps")
    if last < 1:
        raise InputError(f"--replay: {path} tells of no step" if step is None else f"--step {step}: must be at least 1")
    return [rows[number] for number in range(1, last + 1)]


def show(document: dict[str, Any]) -> None:
    """Prints what was written."""
    form = " in jaxpeft's own form, which PEFT does not read" if document["form"] == "own" else ""
    print(f"{document['out']}: {document['run']} at step {document['step']}{form}")


def chosen_step(folder: Path, step: int | None, best: bool) -> int:
    """The step of a run's checkpoint: the one named, the one with the lowest validation loss, or the newest.

    Those that are damaged are passed over, which a `Notice` says of newer ones.

    Raises:
      InputError: if there is none such, or what is named is damaged.
    """
    from jaxpeft.checkpoint import FROZEN, faults, on_disk, read_meta
    from jaxpeft.checksums import fault

    def check(at: Path) -> None:
        if reason := fault(at):
            others = ", ".join(str(other) for other in whole if str(other) != at.name) or "none"
            raise InputError(f"{at}: damaged ({reason}); whole checkpoints: {others}")

    steps, damaged = on_disk(folder), faults(folder)
    whole = [found for found in steps if found not in damaged]
    if not steps:
        raise InputError(f"{folder}: holds no checkpoint yet")
    if step is not None and best:
        raise InputError(f"--step {step}: and --best choose two checkpoints; give one of them")
    if step is not None and step not in steps:
        raise InputError(f"--step {step}: {folder} has no such checkpoint; it has {', '.join(map(str, steps))}")
    if (folder / FROZEN).is_dir():
        check(folder / FROZEN)
    if step is not None or not whole:
        check(folder / str(steps[-1] if step is None else step))
    for newer in (found for found in sorted(damaged) if whole and step is None and found > whole[-1]):
        warnings.warn(f"{folder / str(newer)}: damaged ({damaged[newer]}); passed over", Notice, stacklevel=2)
    if not best:
        return whole[-1] if step is None else step
    metas = {s: read_meta(folder, s) for s in whole}
    losses = {s: meta["eval_loss"] for s, meta in metas.items() if meta.get("eval_loss") is not None}
    if not losses:
        raise InputError(f"--best: no checkpoint in {folder} was evaluated; name one with --step")
    chosen = min(losses, key=lambda s: (losses[s], s))
    check(folder / str(chosen))
    return chosen


def saved_leaves(folder: Path, step: int, place: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """`{path: leaf}` of what a checkpoint holds beside the base: trained and moved leaves, the run's own frozen ones.

    Packed kernels, which are no part of an adapter, are left out. `place` gives the shardings of leaves; without
    it they come to the first device.

    It only reads, so that a run which is writing there is not disturbed.
    """
    import logging

    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of an optional file that runs don't write
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shapes(leaves: dict[str, Any]) -> dict[str, Any]:
        struct = jax.ShapeDtypeStruct
        whole = {path: struct(x.shape, x.dtype) for path, x in leaves.items() if not isinstance(x, dict)}
        where = {} if place is None else place(whole)
        return {path: struct(x.shape, x.dtype, sharding=where.get(path, device)) for path, x in whole.items()}

    def restore(path: Path, part: str | None = None) -> dict[str, Any]:
        checkpointer = ocp.PyTreeCheckpointer()
        found = checkpointer.metadata(path).item_metadata.tree
        if part is not None and part not in found:
            return {}
        wanted = shapes(found if part is None else found[part])
        if not wanted:  # of nothing orbax makes no template
            return {}
        like = wanted if part is None else {part: wanted}
        args = ocp.args.PyTreeRestore(
            item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
        )
        restored = checkpointer.restore(path, args=args)
        return restored if part is None else restored[part]

    folder = folder.absolute()
    frozen = restore(folder / "frozen") if (folder / "frozen").is_dir() else {}
    changed: dict[str, Any] = {}
    for part in ("moved", "trainable"):
        changed |= restore(folder / str(step) / "state", part)
    return {**frozen, **changed}
