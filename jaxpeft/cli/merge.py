"""`jaxpeft merge`: fold an adapter into the weights of its base and write a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxpeft.cli.arguments import ProcessArguments, mesh_of
from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Merge(ProcessArguments):
    """Fold an adapter into its base; the result is a checkpoint that needs no adapter."""

    adapter: Path
    """Folder of a PEFT adapter."""
    out: Path
    """Folder to make (it may exist if it is empty), or NAME.gguf."""
    model: str | None = None
    """Directory, GGUF file or hub id of the base. Default: the embedded model."""
    format: Literal["safetensors", "gguf"] | None = None
    """A Hugging Face checkpoint, or one file for llama.cpp. Default: gguf where --out ends so."""
    gguf_type: Literal["float32", "float16", "bfloat16", "q8_0"] | None = None
    """Type of a GGUF file's matrices. Default: the base's."""
    rope_scaling: str | None = None
    """Scales rotary positions for longer texts: linear|dynamic|yarn=FACTOR. Default: as the adapter has them."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Merge) -> dict[str, Any]:
    """Returns {"out", "model", "adapter", "dtype"}; each tensor keeps the type that it has in the base.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    with mesh_of(args) as mesh:
        return _run(args, mesh)


def _run(args: Merge, mesh: Any) -> dict[str, Any]:
    from jaxpeft import distributed, hf, tree
    from jaxpeft.cli.models import check_gguf, labels_of, load, model_or_default, scaling_of
    from jaxpeft.files import check_target
    from jaxpeft.gguf import SUFFIX, write
    from jaxpeft.template import JINJA, beside

    form = args.format or ("gguf" if args.out.suffix == SUFFIX else "safetensors")
    if args.gguf_type is not None and form != "gguf":
        raise InputError(f"--gguf-type {args.gguf_type}: belongs to --format gguf")
    write.check_file(args.out) if form == "gguf" else check_target(args.out)
    check_gguf(form == "gguf", args.out)
    name = model_or_default(args.model)
    scaling = scaling_of(args.adapter, args.rope_scaling)
    _, params, method = load(name, args.adapter, hf.STORED, scaling, mesh)
    document = {"out": args.out, "model": name, "adapter": args.adapter}
    if form == "gguf":
        if labels_of(args.adapter):
            raise InputError(f"--out {args.out}: {args.adapter} classifies rows, and llama.cpp has no form for that")
        own_template = beside(args.adapter).get(JINJA)
        merged = method.merge(params)
        _check_finite(args.adapter, tree.flatten(params), tree.flatten(merged))
        write.save_model(args.out, name, merged, args.gguf_type, scaling, own_template)
        return document | {"dtype": args.gguf_type or str(tree.flatten(params)["embed_tokens/embedding"].dtype)}
    before, merged = tree.flatten(params), method.merge(params)
    _check_finite(args.adapter, before, tree.flatten(merged))
    unchanged = {path for path, leaf in tree.flatten(merged).items() if before.get(path) is leaf}
    how: dict[str, Any] = {"as_stored": True, "unchanged": unchanged, "rope_scaling": scaling}
    hf.save_pretrained(args.out, name, merged, labels=labels_of(args.adapter), beside=beside(args.adapter), **how)
    return document | {"dtype": distributed.from_first(lambda: ", ".join(hf.types_of(args.out)))}


def _check_finite(adapter: Any, before: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
    """Refuses what the adapter has made of the base's weights if it is no numbers any more."""
    import jax.numpy as jnp

    for path, leaf in merged.items():
        if before.get(path) is not leaf and not bool(jnp.isfinite(leaf).all()):
            raise InputError(f"{adapter}: makes {path} infinite or no number; is its alpha right?")


def show(document: dict[str, Any]) -> None:
    """Prints what was written."""
    print(f"{document['out']}: {document['model']} with {document['adapter']} folded in, {document['dtype']}")
