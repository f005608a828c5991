"""`jaxpeft train`: fine-tune a model on a file of examples and leave an adapter.

Every field of `Train` is a flag; `--config run.yaml` gives the same names in a file, and a flag on
the command line wins over the file.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxpeft.cli.arguments import method_settings, settled
from jaxpeft.cli.config import flag
from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Train:
    """Fine-tune a model on a file of examples; without arguments, the embedded ones."""

    task: Literal["lm", "classify"] = "lm"
    """lm: continue texts. classify: rows with text, text2 (optional) and label or label_name; trains a classifier in
    place of the model's head, besides the method's own parameters. A label with a decimal point is a regression."""
    model: str | None = None
    """Directory or hub id of a Hugging Face checkpoint. Default: the embedded model."""
    data: str | None = None
    """Training examples, JSON lines. Default: the embedded examples."""
    eval_data: str | None = None
    """Validation examples, JSON lines. Default: none, or the embedded ones with embedded data."""
    out: Path | None = None
    """Folder for adapter/, checkpoints/, metrics.jsonl and plots. Default: out/run-1, -2, ..."""
    resume: bool = False
    """Continue the run in --out bit-identically from its newest checkpoint."""

    method: str = "lora"
    """Fine-tuning method; `jaxpeft methods` lists them."""
    rank: int | None = None
    """Rank of the adapter. Default: the method's own."""
    alpha: float | None = None
    """Scale of the adapter: its output is multiplied by alpha / rank. Default: the method's own."""
    targets: str | None = None
    """Sites: all-linear, attention, mlp, names (q_proj,v_proj) or a regular expression. Default: the method's own."""
    method_options: tuple[str, ...] = ()
    """Further arguments of the method's factory, as NAME=VALUE with a YAML value."""
    adapter: Path | None = None
    """PEFT adapter to train on; it brings its method, rank and targets with it."""

    steps: int = 120
    """Optimizer steps to take."""
    batch_size: int = 8
    """Sequences in one step, over all of its accumulated parts."""
    seq_len: int | None = None
    """Tokens in one sequence. Default: 512, or 256 with the embedded model."""
    accumulate: int = 1
    """Parts that a step's batch is cut into, their gradients added up; divides --batch-size."""
    lr: float | None = None
    """Peak learning rate. Default: 2e-4, or 2e-3 with the embedded model."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to zero linearly or as a cosine."""
    warmup: int = 10
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float | None = 1.0
    """Largest global norm of the gradients; None leaves them as they are."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the frozen weights and of the computation; what trains is float32. Default: bfloat16, with the embedded
    model float32, which processors without bfloat16 units compute faster."""
    save: str | None = None
    """What is kept for the backward pass: everything, matmuls, blocks, offload, compressed, and NAME=ACTION, as
    `jaxpeft plan` prints it. Default: matmuls, or everything where the method runs the layers in its own way."""
    seed: int = 0
    """Seed of initialisation, shuffling and dropout."""

    pack: bool = True
    """Put several short examples in one sequence; they do not see each other. Rows to classify are never packed."""
    buckets: tuple[int, ...] = ()
    """Sequence lengths to pad up to without packing, each at most --seq-len. Default: --seq-len."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to an example longer than --seq-len."""
    skip_bad_lines: bool = False
    """Count lines that cannot be read instead of stopping at the first."""

    eval_every: int = 50
    """Steps between two evaluations; 0 evaluates before and after the run only."""
    checkpoint_every: int = 50
    """Steps between two checkpoints; 0 writes one at the end only."""
    keep: int = 2
    """Newest checkpoints to keep, besides the one with the lowest validation loss."""
    samples: int = 32
    """Validation examples to answer before and after the run, for the overlap score."""

    config: Path | None = None
    """YAML file whose keys are these flags' names."""
    json: bool = False
    """Print the report as one JSON document on stdout and nothing else there."""


def run(args: Train) -> dict[str, Any]:
    """Checks the arguments, trains, and returns the report as a JSON-able dict.

    Raises:
        InputError: for arguments or input that cannot be used.
    """
    args = settled(args)
    check(args)
    if args.out is None:
        args = dataclasses.replace(args, out=fresh_directory(Path("out")))

    from jaxpeft.train.loop import train

    return train(args)


def show(report: dict[str, Any]) -> None:
    """Prints the report for a reader."""
    from jaxpeft.train.report import print_report

    print_report(report)


def check(args: Train) -> None:
    """Raises InputError for the first argument whose value makes no sense by itself; `args` are settled."""
    minima = {
        "steps": 1,
        "batch_size": 1,
        "seq_len": 2,
        "accumulate": 1,
        "warmup": 0,
        "weight_decay": 0,
        "eval_every": 0,
        "checkpoint_every": 0,
        "keep": 1,
        "samples": 0,
        "seed": 0,
    }
    for name, least in minima.items():
        value = getattr(args, name)
        if not value >= least:
            raise InputError(f"{flag(name)} {value}: must be at least {least}")
    for name in ("lr", "clip", "alpha"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{flag(name)} {value}: must be a finite number above 0")
    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank {args.rank}: must be at least 1")
    if args.batch_size % args.accumulate:
        raise InputError(f"--accumulate {args.accumulate}: must divide --batch-size {args.batch_size}")
    if args.task == "classify" and args.data is None:
        raise InputError(
            "--task classify: needs --data, a file of rows with text and label (see `jaxpeft train --help`)"
        )
    if args.buckets and args.pack and args.task == "lm":
        raise InputError("--buckets: packed sequences all have --seq-len; add --no-pack")
    assert args.seq_len is not None
    for length in args.buckets:
        if not 2 <= length <= args.seq_len:
            raise InputError(f"--buckets {length}: must be from 2 to --seq-len {args.seq_len}")
    if args.resume and args.out is None:
        raise InputError("--resume: needs --out, the folder of the run to continue")
    settings = method_settings(args)
    if args.adapter is not None and settings:
        raise InputError(f"--adapter {args.adapter}: brings its own {', '.join(settings)}; leave these out")
    if args.adapter is not None and not args.adapter.is_dir():
        raise InputError(f"--adapter {args.adapter}: no such directory")


def fresh_directory(parent: Path) -> Path:
    """The first of parent/run-1, parent/run-2, ... that does not exist; creates nothing."""
    number = 1
    while (parent / f"run-{number}").exists():
        number += 1
    return parent / f"run-{number}"
