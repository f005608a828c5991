"""`jaxpeft scheme`: what `pockengine` is to train within a limit of memory, found on some of the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Find the tensors and channels that lower the loss most for their bytes, as a file for `train --config`."""

    out: Path
    """YAML file to make, with the method and its scheme: `jaxpeft train --config OUT ...`."""
    data: str
    """File of examples, as `train` takes them; their first batches say what lowers the loss."""
    limit: str
    """Bytes of what trains, with its gradients and moments, and of the activations that a step keeps: 2GiB."""
    model: str | None = None
    """Directory, GGUF file or hub id of the base. Default: the embedded model."""
    targets: str = "all-linear"
    """Kernels that may train: all-linear, attention, qv, mlp, a regular expression, or names with commas."""
    shares: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Of a kernel's input channels, the shares that may train; ascending."""
    rate: float = 1e-3
    """Of the one step of each tensor by which it is measured."""
    batches: int = 2
    """Batches of --data."""
    batch_size: int = 8
    """Rows of a batch, as of the step that is to fit."""
    seq_len: int = 256
    """Tokens of a row, into which examples are packed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights and the computation, as of the step that is to fit."""
    seed: int = 0
    """Of the batches' order."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Scheme) -> dict[str, Any]:
    """Returns {"out", "model", "limit", "bytes", "scheme": {pattern: share}}.

    Raises:
      InputError: for arguments or input that cannot be used, or a limit into which nothing fits.
    """
    from jaxpeft.cli.arguments import parse_bytes
    from jaxpeft.cli.models import load, model_or_default, some_batches
    from jaxpeft.files import check_creatable, to_yaml, write
    from jaxpeft.methods import pockengine
    from jaxpeft.train.checks import check_seed

    limit = parse_bytes("--limit", args.limit)
    for name in ("batches", "batch_size", "seq_len"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: should be at least 1")
    if not args.shares or list(args.shares) != sorted({*args.shares}) or not 0 < args.shares[0] <= args.shares[-1] <= 1:
        words = " ".join(map(str, args.shares))
        raise InputError(f"--shares {words}: should ascend, each above 0 and at most 1")
    if not 0 < args.rate < float("inf"):
        raise InputError(f"--rate {args.rate}: should be a finite number above 0")
    check_seed(args.seed)
    if args.out.exists():
        raise InputError(f"--out {args.out}: exists already; name a file that does not")
    check_creatable(args.out)
    name = model_or_default(args.model)
    model, params, _ = load(name, dtype=args.dtype)
    batches = list(some_batches(args.data, name, args.batches, args.batch_size, args.seq_len, args.seed))
    scheme = pockengine.search(model, params, batches, limit, args.targets, args.shares, args.rate)
    takes = pockengine.needs(model, params, batches[0], scheme)
    content = {"method": "pockengine", "method-options": {"scheme": scheme}}
    write(args.out, f"{to_yaml(f'--out {args.out}', content).strip()}\n".encode())
    return {"out": args.out, "model": name, "limit": limit, "bytes": takes, "scheme": scheme}


def show(document: dict[str, Any]) -> None:
    """Prints what trains, the deepest layer first, and what it takes."""
    scheme = document["scheme"]
    for pattern, share in scheme.items():
        print(f"{pattern.removesuffix('$'):40}{share:8.0%}")
    print(
        f"{document['out']}: {len(scheme)} tensors of {document['model']}, {document['bytes']:,} of "
        f"{document['limit']:,} bytes; jaxpeft train --config {document['out']}"
    )
