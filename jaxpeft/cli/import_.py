"""`jaxpeft import`: check a PEFT adapter against its base and write it as jaxpeft's own."""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Import:
    """Read a PEFT adapter, check it against its base, and write it so that it trains on here."""

    adapter: Path
    """Folder of a PEFT adapter."""
    out: Path
    """Folder to make; it may exist if it is empty."""
    model: str | None = None
    """Directory, GGUF file or hub id of the base. Default: the embedded model."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Import) -> dict[str, Any]:
    """Returns {"out", "model", "adapter", "method": [[name, arguments], ...], "sites", "trainable_parameters"}.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    from jaxpeft import tree
    from jaxpeft.cli.models import labels_of, load, model_or_default, scaling_of
    from jaxpeft.files import check_target
    from jaxpeft.peft import export_adapter
    from jaxpeft.template import beside

    check_target(args.out)
    name = model_or_default(args.model)
    scaling = scaling_of(args.adapter)
    model, params, method = load(name, args.adapter, rope_scaling=scaling)
    how: dict[str, Any] = {"labels": labels_of(args.adapter), "rope_scaling": scaling, "beside": beside(args.adapter)}
    export_adapter(args.out, params, method, model.config, name, **how)
    trainable, _ = tree.split(params, method.trainable)
    return {
        "out": args.out,
        "model": name,
        "adapter": args.adapter,
        "method": [[spec.name, spec.config] for spec in method.specs],
        "sites": sorted({path.rsplit("/", 2)[0] for path in trainable}),
        "trainable_parameters": tree.size(trainable),
    }


def show(document: dict[str, Any]) -> None:
    """Prints what was found and written."""
    methods = ", ".join(name for name, _ in document["method"])
    print(f"{document['out']}: {methods} with {document['trainable_parameters']} trainable parameters, at")
    for site in document["sites"]:
        print(f"  {site}")
