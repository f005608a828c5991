"""`jaxpeft recover`: an adapter of a pruned base as one of the whole base."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Recover:
    """Make a LoRA that was trained on what `jaxpeft prune` left one of the whole base, in PEFT's format."""

    adapter: Path
    """Folder of the adapter that was trained on the pruned base."""
    pruned: Path
    """Folder of the pruned base, with its pruning.json."""
    out: Path
    """Folder to make; it may exist if it is empty."""
    model: str | None = None
    """Directory, GGUF file or hub id of the whole base. Default: the one that was pruned."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Recover) -> dict[str, Any]:
    """Returns {"out", "adapter", "pruned", "model", "parameters": [of the adapter there, here]}.

    Raises:
      InputError: for arguments or input that cannot be used: an adapter of the whole base, or of another one; a method
        other than LoRA; a start that changes the base's kernels.
    """
    from jaxpeft import peft, pruning, tree
    from jaxpeft.cli.models import load, scaling_of
    from jaxpeft.files import check_target
    from jaxpeft.method import from_specs
    from jaxpeft.peft.base import check_base
    from jaxpeft.peft.export import adapter_of, changes_kernels
    from jaxpeft.template import beside

    check_target(args.out)
    document, kept = pruning.read(args.pruned)
    scaling = scaling_of(args.adapter)
    small, small_params, _ = load(str(args.pruned), rope_scaling=scaling)
    method, leaves = peft.import_adapter(args.adapter, small, small_params)
    found = adapter_of(method, {**tree.flatten(small_params), **leaves}, small.config)
    spec = method.specs[found[0]] if found else None  # of whoever adds all leaves
    if spec is None or spec.name != "lora":
        raise InputError(f"--adapter {args.adapter}: is of {method.name}; only one of lora can be recovered")
    if changes_kernels(spec):
        raise InputError(
            f"--adapter {args.adapter}: its start, {spec.config['init']}, changes the base's kernels, which the "
            "whole base's cannot follow; train with another init (--method-options init=...)"
        )
    name = args.model or document["base"]
    model, params, _ = load(name, rope_scaling=scaling)
    where, other = str(args.pruned / pruning.FILE), f"pruned from another base than {name}"
    check_base(where, document["fingerprint"], model.config, params, other)
    pruning.check_fits(where, kept, model.config)
    whole = pruning.recovered(leaves, model.config, kept)
    peft.export_adapter(
        args.out,
        tree.unflatten({**tree.flatten(params), **whole}),
        from_specs([spec]),
        model.config,
        name,
        rope_scaling=scaling,
        beside=beside(args.adapter),
    )
    sizes = [tree.size(leaves), tree.size(whole)]
    return {"out": args.out, "adapter": args.adapter, "pruned": args.pruned, "model": name, "parameters": sizes}


def show(document: dict[str, Any]) -> None:
    """Prints what was written."""
    before, after = document["parameters"]
    print(
        f"{document['out']}: {document['adapter']} for {document['model']}, {after:,} parameters, of which "
        f"{before:,} were trained and the others are zeros"
    )
