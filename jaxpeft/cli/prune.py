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
    by: Literal["magnitude", "taylor", "random"] | None = None
    """What tells how much they matter: their weights' norm, or how the loss of --data changes. Default: taylor with
    --data, else magnitude."""
    data: str | None = None
    """File of examples, as `train` takes them, for --by taylor."""
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
    by = args.by or ("magnitude" if args.data is None else "taylor")
    if by == "taylor" and args.data is None:
        raise InputError("--by taylor: needs --data, whose loss it asks")
    if by != "taylor" and args.data is not None:
        raise InputError(f"--by {by}: reads no --data; leave it out, or take --by taylor")
    for name in ("batches", "batch_size", "seq_len"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: should be at least 1")
    from jaxpeft import hf, pruning, tree
    from jaxpeft.cli.models import load, model_or_default
    from jaxpeft.files import check_target
    from jaxpeft.train.run import check_seed

    check_seed(args.seed)
    check_target(args.out)
    shares = [args.keep if own is None else own for own in (args.keep_heads, args.keep_neurons)]
    name = model_or_default(args.model)
    model, params, _ = load(name, dtype=hf.STORED)
    scores = pruning.importance(model, params, by, _batches(args, name) if by == "taylor" else (), args.seed)
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
    return {
        "out": args.out,
        "model": name,
        "by": by,
        "heads": [counts[0], scores.heads.shape[1]],
        "neurons": [counts[1], scores.neurons.shape[1]],
        "parameters": [tree.size(small), tree.size(params)],
    }


def show(document: dict[str, Any]) -> None:
    """Prints what is left."""
    left, whole = document["parameters"]
    heads, neurons = ("{} of {}".format(*document[name]) for name in ("heads", "neurons"))
    print(
        f"{document['out']}: {document['model']} with {heads} key/value heads and {neurons} neurons a layer (by "
        f"{document['by']}), {left:,} of {whole:,} parameters, {left / whole:.1%}"
    )


def _batches(args: Prune, name: str) -> Any:
    """Batches of --data, packed."""
    import itertools

    from jaxpeft import data, hf

    examples, _ = data.load_examples(str(args.data), hf.load_tokenizer(name), args.seq_len)
    made = data.make_batches(examples, args.batch_size, args.seq_len, args.seed, pack=True)
    return (batch for batch, _ in itertools.islice(made, args.batches))
