"""What the commands that name a model, a method and a step share."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from jaxpeft.errors import InputError

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclasses.dataclass(frozen=True)
class StepArguments:
    """A fine-tuning step that is planned, not run: nothing is downloaded or allocated."""

    model: str | None = None
    """Built-in geometry (llama2-7b, ...), folder with a config.json, or the file. Default: the embedded model."""
    task: Literal["lm", "classify"] = "lm"
    """lm: continue texts. classify: a classifier of rows (or images) in place of the model's head."""
    num_labels: int | None = None
    """Labels of --task classify; 1 is a regression. Default: the model's own, or 2."""
    method: str = "lora"
    """Fine-tuning method, or several with commas; `jaxpeft methods` lists them."""
    rank: int | None = None
    """Rank of the adapter. Default: the method's own."""
    alpha: float | None = None
    """Scale of the adapter. Default: the method's own."""
    targets: str | None = None
    """Sites: all-linear, attention, mlp, names (q_proj,v_proj) or a regular expression. Default: the method's own."""
    method_options: tuple[str, ...] = ()
    """Further arguments of the method's factory, as NAME=VALUE with a YAML value."""
    batch_size: int = 8
    """Sequences in one step."""
    seq_len: int | None = None
    """Tokens in one sequence. Default: 512, or 256 with the embedded model."""
    accumulate: int = 1
    """Parts that a step's batch is cut into; divides --batch-size."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the frozen weights and of the computation; what trains is float32. Default: bfloat16, or float32 with the
    embedded model."""
    save: str | None = None
    """What is kept for the backward pass: everything, matmuls, blocks, offload, compressed, and NAME=ACTION. Default:
    matmuls, or everything where the method runs the layers in its own way."""
    target: str = "cpu"
    """Device: h200, h100, a100, rtx4090, v4, v5e, v5p, v6e, tpu7x, cpu, or a slice of TPUs such as v5p:4x4x4."""


def settled(args: Any) -> Any:
    """The arguments with the defaults that depend on whether the model is the embedded one."""
    embedded: dict[str, Any] = {"seq_len": 256, "lr": 2e-3, "dtype": "float32"}  # bfloat16 is slow on a CPU
    other: dict[str, Any] = {"seq_len": 512, "lr": 2e-4, "dtype": "bfloat16"}
    defaults = embedded if args.model is None else other
    return dataclasses.replace(args, **{name: x for name, x in defaults.items() if getattr(args, name, x) is None})


def check_step(args: StepArguments) -> None:
    """Raises InputError for the first argument whose value makes no sense by itself; `args` are settled."""
    for name, least in {"batch_size": 1, "seq_len": 2, "accumulate": 1}.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.num_labels is not None and (args.num_labels < 1 or args.task != "classify"):
        why = "must be at least 1" if args.num_labels < 1 else "belongs to --task classify"
        raise InputError(f"--num-labels {args.num_labels}: {why}")
    if args.batch_size % args.accumulate:
        raise InputError(f"--accumulate {args.accumulate}: must divide --batch-size {args.batch_size}")


def methods(args: StepArguments) -> list[tuple[str, Any]]:
    """(name, Method) of every method; of several, each gets the settings that it takes.

    Raises:
        InputError: for an unknown method, a setting that none takes, or that the method refuses.
    """
    import inspect

    from jaxpeft import method
    from jaxpeft.train.prepare import make_method

    settings = method_settings(args)
    names = [name.strip() for name in args.method.split(",") if name.strip()]
    if not names:
        raise InputError(f"--method {args.method!r}: name at least one; `jaxpeft methods` lists them")
    takes = {name: set(inspect.signature(getattr(method.module(name), name)).parameters) for name in names}
    for setting in settings:
        if not any(setting in known for known in takes.values()):
            raise InputError(f"method {args.method} takes no {setting}")
    return [(name, make_method(name, {s: x for s, x in settings.items() if s in takes[name]})) for name in names]


def describe_only() -> None:
    """Keeps JAX off the attached devices, which are not needed, and its compilers' remarks off stderr."""
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def parse_bytes(flag: str, text: str) -> int:
    """24GiB, 24GB, 25769803776 -> bytes.

    Raises:
        InputError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise InputError(f"{flag} {text!r}: should be a size such as 24GiB; units: {', '.join(u for u in UNITS if u)}")
    return int(float(found[1]) * UNITS[found[2]])


def method_settings(args: Any) -> dict[str, Any]:
    """The keyword arguments for the method's factory: those that were given, and no others.

    Raises:
        InputError: for a method option that is not NAME=VALUE or is given twice.
    """
    import yaml

    named = {"rank": args.rank, "alpha": args.alpha, "targets": args.targets}
    settings: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for option in args.method_options:
        name, equals, text = option.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise InputError(f"--method-options {option!r}: must be NAME=VALUE")
        if name in settings:
            raise InputError(f"--method-options {option!r}: {name} is given twice")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--method-options {option!r}: the value is not YAML") from None
        settings[name] = _number(value) if isinstance(value, str) else value
    return settings


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as text because it has no dot; everybody means the number."""
    try:
        return float(text)
    except ValueError:
        return text
