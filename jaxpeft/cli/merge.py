"""`jaxpeft merge`: fold an adapter into the weights of its base and write a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Merge:
    """Fold an adapter into its base; the result is a Hugging Face checkpoint that needs no adapter."""

    adapter: Path
    """Folder of a PEFT adapter."""
    out: Path
    """Folder to make; it may exist if it is empty."""
    model: str | None = None
    """Directory or hub id of the base. Default: the embedded model."""
    rope_scaling: str | None = None
    """Scales rotary positions for longer texts: linear|dynamic|yarn=FACTOR. Default: as the adapter has them."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Merge) -> dict[str, Any]:
    """Returns {"out", "model", "adapter", "dtype"}; each tensor keeps the type that it has in the base.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    from jaxpeft import hf, tree
    from jaxpeft.cli.models import labels_of, load, model_or_default, scaling_of
    from jaxpeft.files import check_target
    from jaxpeft.template import beside

    check_target(args.out)
    name = model_or_default(args.model)
    scaling = scaling_of(args.adapter, args.rope_scaling)
    _, params, method = load(name, args.adapter, hf.STORED, scaling)
    before, merged = tree.flatten(params), method.merge(params)
    unchanged = {path for path, leaf in tree.flatten(merged).items() if before.get(path) is leaf}
    how: dict[str, Any] = {"as_stored": True, "unchanged": unchanged, "rope_scaling": scaling}
    hf.save_pretrained(args.out, name, merged, labels=labels_of(args.adapter), beside=beside(args.adapter), **how)
    return {"out": args.out, "model": name, "adapter": args.adapter, "dtype": ", ".join(hf.types_of(args.out))}


def show(document: dict[str, Any]) -> None:
    """Prints what was written."""
    print(f"{document['out']}: {document['model']} with {document['adapter']} folded in, {document['dtype']}")
