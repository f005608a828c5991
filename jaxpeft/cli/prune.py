"""`jaxpeft prune`: a checkpoint without the attention heads and MLP neurons that matter least."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Prune:
    """Cut whole heads and neurons out of a decoder, of each layer equally many; adapters trained on the result become
    the whole base's by `jaxpeft recover`.
    """

    out: Path
    """Folder to make; it may exist if it is empty."""
    model: str | None = None
    """Directory, GGUF file or hub id of the base. Default: the embedded model."""
    keep: float = 0.5
    """Share of the key/value heads (with the query heads that read them) and neurons that stays."""
    keep_heads: float | None = None
    """Share of the heads. Default: --keep."""
    keep_neurons: float | None = None
    """Share of the neurons. Default: --keep."""
    by: Literal["magnitude", "taylor", "random", "masks"] | None = None
    """What tells how much they matter: their weights' norm, how the loss of --data changes, or masks that --adapter has
    trained. Default: masks with --adapter, taylor with --data, else magnitude."""
    data: str | None = None
    """File of examples, as `train` takes them, for --by taylor and masks."""
    adapter: Path | None = None
    """Folder of an adapter of light_peft+lora, for --by masks. What stays of its LoRA is in OUT/adapter."""
    keep_modules: float = 0.25
    """Share of that LoRA's modules (one linear map of one layer) that stays."""
    keep_ranks: float = 0.5
    """Share of each module's ranks that stays."""
    batches: int = 10
    """Batches of --data."""
    batch_size: int = 4
    """Rows of a batch."""
    seq_len: int = 256
    """Tokens of a row, into which examples are packed."""
    seed: int = 0
    """Of the batches' order, and of --by random."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Prune) -> dict[str, Any]:
    """Returns {"out", "model", "by", "heads", "neurons": [kept, of], "parameters": [kept, of]}.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    by = args.by or ("masks" if args.adapter is not None else "magnitude" if args.data is None else "taylor")
    reads = by in ("taylor", "masks")
    if reads and args.data is None:
        raise InputError(f"--by {by}: needs --data, whose loss it asks")
    if not reads and args.data is not None:
        raise InputError(f"--by {by}: reads no --data; leave it out, or take --by taylor")
    if (by == "masks") != (args.adapter is not None):
        what = "reads no --adapter; leave it out" if args.adapter is not None else "needs --adapter, of light_peft+lora"
        raise InputError(f"--by {by}: {what}")
    for name in ("batches", "batch_size", "seq_len"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: should be at least 1")
    from jaxpeft import early, hf, peft, pruning, tree
    from jaxpeft.cli.models import load, model_or_default
    from jaxpeft.files import check_target
    from jaxpeft.method import make
    from jaxpeft.template import beside
    from jaxpeft.train.checks import check_seed

    check_seed(args.seed)
    for flag in ("keep", "keep_heads", "keep_neurons", "keep_modules", "keep_ranks"):
        if (share := getattr(args, flag)) is not None:
            pruning.check_share(f"--{flag.replace('_', '-')}", share)
    check_target(args.out)
    shares = [args.keep if own is None else own for own in (args.keep_heads, args.keep_neurons)]
    name = model_or_default(args.model)
    model, params, _ = load(name, dtype=hf.STORED)
    spec, leaves = None, {}
    if args.adapter is not None:
        spec, leaves, parts = _estimated(args, name, model, params)
        scores = early.masks(leaves)
    else:
        scores = pruning.importance(model, params, by, _batches(args, name) if reads else (), args.seed)
    try:
        kept = pruning.choose(scores, *shares)
    except InputError as error:
        own = {"heads": args.keep_heads, "neurons": args.keep_neurons}
        what, _, rest = str(error).partition(" ")
        raise InputError(f"--keep{'' if own[what] is None else f'-{what}'} {rest}") from None
    small = pruning.pruned(params, model.config, kept)
    document = pruning.document(name, by, kept, model.config, params)
    counts = [at.shape[1] for at in kept]
    hf.save_pretrained(
        args.out,
        name,
        small,
        beside={pruning.FILE: json.dumps(document) + "\n"},
        changes=pruning.smaller(model.config, *counts),
    )
    if spec is not None:
        own, arguments = early.chosen(leaves, spec, parts, args.keep_modules, args.keep_ranks)
        own = tree.flatten(pruning.pruned(tree.unflatten(own), model.config, kept))
        config = hf.load_pretrained(args.out, hf.STORED)[0].config
        every = tree.unflatten({**tree.flatten(small), **own})
        method = make("lora", arguments)
        peft.export_adapter(args.out / "adapter", every, method, config, args.out, beside=beside(args.adapter))
    return {
        "out": args.out,
        "model": name,
        "by": by,
        "heads": [counts[0], scores.heads.shape[1]],
        "neurons": [counts[1], scores.neurons.shape[1]],
        "parameters": [tree.size(small), tree.size(params)],
        **({} if spec is None else {"adapter": [_numbers(own), _size_of_lora(leaves)]}),
    }


def _numbers(own: Any) -> int:
    """Numbers of a LoRA's modules that are not zeros alone."""
    import numpy as np

    both = [(own[path], own[path.removesuffix("a") + "b"]) for path in own if path.endswith("/a")]
    return sum(x[0].size * int((np.abs(a).sum((1, 2)) > 0).sum()) for a, b in both for x in (a, b))


def _size_of_lora(leaves: Any) -> int:
    return sum(leaf.size for path, leaf in leaves.items() if "/lora/" in path)


def _estimated(args: Prune, name: str, model: Any, params: Any) -> Any:
    """(spec of LoRA, leaves of light_peft+lora, how much the parts of LoRA matter).

    Raises:
      InputError: for an adapter of another base or method, or a LoRA that cannot be cut.
    """
    from jaxpeft import early, peft, tree
    from jaxpeft.peft.export import changes_kernels

    assert args.adapter is not None
    method, leaves = peft.import_adapter(args.adapter, model.config, params)
    if method.name != "light_peft+lora":
        raise InputError(f"--adapter {args.adapter}: is of {method.name}; --by masks reads one of light_peft+lora")
    spec = method.specs[-1]
    if changes_kernels(spec):
        raise InputError(f"--adapter {args.adapter}: its start, {spec.config['init']}, changes the base's kernels")
    nested = tree.unflatten({**tree.flatten(params), **leaves})
    return spec, leaves, early.importance(model, method, nested, _batches(args, name))


def show(document: dict[str, Any]) -> None:
    """Prints what is left."""
    left, whole = document["parameters"]
    heads, neurons = ("{} of {}".format(*document[name]) for name in ("heads", "neurons"))
    print(
        f"{document['out']}: {document['model']} with {heads} key/value heads and {neurons} neurons a layer (by "
        f"{document['by']}), {left:,} of {whole:,} parameters, {left / whole:.1%}"
    )
    if "adapter" in document:
        left, whole = document["adapter"]
        print(f"{document['out']}/adapter: {left:,} of {whole:,} numbers of its LoRA, {left / whole:.1%}")


def _batches(args: Prune, name: str) -> Any:
    """Batches of --data, packed."""
    from jaxpeft.cli.models import some_batches

    return some_batches(str(args.data), name, args.batches, args.batch_size, args.seq_len, args.seed)
