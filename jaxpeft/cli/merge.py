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
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Merge) -> dict[str, Any]:
    """Returns {"out", "model", "adapter", "dtype"}; the checkpoint keeps the type of its base.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    from jaxpeft import hf
    from jaxpeft.cli.models import labels_of, load, model_or_default
    from jaxpeft.files import check_target
    from jaxpeft.template import beside

    check_target(args.out)
    name = model_or_default(args.model)
    model, params, method = load(name, args.adapter)
    labels, further = labels_of(args.adapter), beside(args.adapter)
    hf.save_pretrained(args.out, name, method.merge(params), labels=labels, beside=further)
    return {"out": args.out, "model": name, "adapter": args.adapter, "dtype": str(model.config.dtype)}


def show(document: dict[str, Any]) -> None:
    """Prints what was written."""
    print(f"{document['out']}: {document['model']} with {document['adapter']} folded in, {document['dtype']}")
