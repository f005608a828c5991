"""`jaxpeft combine`: several adapters of one base, weighted, as one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Combine:
    """Make one LoRA adapter of several by weights; the result is a folder in PEFT's format."""

    adapter: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
    """Folder of a PEFT adapter; once for each."""
    out: Path
    """Folder to make; it may exist if it is empty."""
    weights: str | None = None
    """W,W,... for the adapters in order, as in --weights=0.7,-0.3. Default: 1 for each."""
    combination: Literal[
        "svd",
        "linear",
        "cat",
        "ties",
        "ties_svd",
        "dare_ties",
        "dare_linear",
        "dare_ties_svd",
        "dare_linear_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
    ] = "svd"
    """How, as peft's add_weighted_adapter names it. cat is exact; svd the nearest of --svd-rank."""
    svd_rank: int | None = None
    """Rank of the types with an SVD. Default: the largest of the adapters'."""
    svd_clamp: float | None = None
    """Quantile of the factors' numbers at which they are clamped."""
    density: float | None = None
    """Share of the numbers that pruning keeps: ties, dare and magnitude_prune."""
    majority_sign: Literal["total", "frequency"] = "total"
    """Whether a sign's majority is of numbers' sums or of their signs: ties."""
    seed: int = 0
    """Seed of the numbers that dare drops."""
    model: str | None = None
    """Directory, GGUF file or hub id of the base. Default: the embedded model."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Combine) -> dict[str, Any]:
    """Returns {"out", "model", "adapters", "weights", "combination", "rank": the largest, "parameters"}.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    weights = _weights(args)
    from jaxpeft import peft, tree
    from jaxpeft.cli.models import load, model_or_default
    from jaxpeft.files import check_target
    from jaxpeft.template import beside
    from jaxpeft.train.checks import check_seed

    check_seed(args.seed)
    check_target(args.out)
    for folder in args.adapter:
        if not folder.is_dir():
            raise InputError(f"--adapter {folder}: no such directory")
    name = model_or_default(args.model)
    scaling = _same_scaling(args.adapter)
    _note_templates(args.adapter)
    _note_quantized(args.adapter)
    model, params, _ = load(name, rope_scaling=scaling)
    method, leaves = peft.weighted_adapter(
        args.adapter,
        weights,
        model,
        params,
        combination_type=args.combination,
        svd_rank=args.svd_rank,
        svd_clamp=args.svd_clamp,
        density=args.density,
        majority_sign_method=args.majority_sign,
        seed=args.seed,
    )
    whole = tree.unflatten({**tree.flatten(params), **leaves})
    peft.export_adapter(
        args.out, whole, method, model.config, name, rope_scaling=scaling, beside=beside(args.adapter[0])
    )
    return {
        "out": args.out,
        "model": name,
        "adapters": list(args.adapter),
        "weights": weights,
        "combination": args.combination,
        "rank": max(leaf.shape[-1] for path, leaf in leaves.items() if path.endswith("/a")),
        "parameters": tree.size(leaves),
    }


def show(document: dict[str, Any]) -> None:
    """Prints what was written."""
    summed = ", ".join(f"{weight:g} {folder}" for weight, folder in zip(document["weights"], document["adapters"]))  # noqa: B905
    print(f"{document['out']}: {summed} by {document['combination']}, rank {document['rank']}")


def _weights(args: Combine) -> list[float]:
    if not args.adapter:
        raise InputError("combine: give --adapter FOLDER for each adapter")
    if args.weights is None:
        return [1.0] * len(args.adapter)
    found = []
    for word in args.weights.split(","):
        try:
            found.append(float(word))
        except ValueError:
            raise InputError(f"--weights {args.weights}: {word!r} should be a number") from None
    return found


def _same_scaling(folders: tuple[Path, ...]) -> str | None:
    """How rotary positions are scaled, which all adapters have to say alike."""
    from jaxpeft.cli.models import scaling_of

    first, *others = [scaling_of(folder) for folder in folders]
    for folder, own in zip(folders[1:], others, strict=True):
        if own != first:
            raise InputError(
                f"--adapter {folder}: was trained with rope scaling {own or 'none'}, and {folders[0]} with "
                f"{first or 'none'}"
            )
    return first


def _note_templates(folders: tuple[Path, ...]) -> None:
    """Says what template the result has where an adapter names another one than the first; PEFT's own name none."""
    from jaxpeft.cli.decoding import note
    from jaxpeft.template import find

    digests = [None if (found := find(folder)) is None else found.digest() for folder in folders]
    for folder, own in zip(folders, digests, strict=True):
        if own in (None, digests[0]):
            continue
        if digests[0] is None:
            note(f"{folder} was trained through a template; {folders[0]} names none, and so the result has none")
        else:
            note(f"{folder} was trained through another template than {folders[0]}, whose is kept")
        return


def _note_quantized(folders: tuple[Path, ...]) -> None:
    """Says that adapters name different codes of the base beside which they were trained; PEFT's own name none."""
    from jaxpeft.cli.decoding import note
    from jaxpeft.peft.read import specs_of

    codes = [[spec.config for spec in specs_of(folder) if spec.name == "quantize"] for folder in folders]
    for folder, own in zip(folders, codes, strict=True):
        if own != codes[0]:
            told = [f"a base in codes of {found[0]['format']}" if found else "no codes" for found in (own, codes[0])]
            told[0] += " of another kind" if told[0] == told[1] else ""
            note(f"{folder} names {told[0]}, and {folders[0]} {told[1]}, as what it was trained beside")
            return
