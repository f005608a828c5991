"""What the commands that take --model and --adapter share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxpeft.errors import InputError


def model_or_default(model: str | None) -> str:
    """The checkpoint that was named, else the embedded one."""
    from jaxpeft import assets

    return os.fspath(assets.MODEL) if model is None else model


def load(
    model: str,
    adapter: Path | None = None,
    dtype: str | None = None,
    rope_scaling: str | None = None,
    mesh: Any = None,
) -> tuple[Any, Any, Any]:
    """A checkpoint, with an adapter where one is given.

    Args:
      model: folder or hub id.
      adapter: folder of a PEFT adapter.
      dtype: as `hf.load_pretrained` takes it.
      rope_scaling: from `scaling_of`.
      mesh: on which all of it lies; None: on one device.

    Returns:
      (Model, nested parameters, method); the method is None without an adapter.

    Raises:
      InputError: for what cannot be loaded.

    With an adapter that classifies rows, the model has a classifier in place of its head.
    """
    from jaxpeft import hf, peft, sharding, shares, tree

    if adapter is not None and not adapter.is_dir():
        raise InputError(f"--adapter {adapter}: no such directory")
    how: dict[str, Any] = {"rope_scaling": rope_scaling, "placement": shares.placement(mesh)}
    base, params = hf.load_pretrained(model, dtype, labels_of(adapter), **how)
    if adapter is None:
        return base, params, None
    own = tree.flatten(params)
    base, params, method = peft.attach(adapter, base, params)
    if mesh is not None:
        flat = tree.flatten(params)
        params = tree.unflatten(shares.placed(flat, sharding.of_leaves(mesh, flat, own)))
    return base, params, method


def scaling_of(adapter: Path | None, given: str | None = None) -> str | None:
    """The scaling of rotary positions that was given, or that an adapter was trained with.

    Raises:
      InputError: if it makes no sense, or is not the adapter's.
    """
    from jaxpeft import peft
    from jaxpeft.models import rotary

    if given is not None:
        rotary.parse(given)
    return given if adapter is None else peft.adapter_rope_scaling(adapter, given)


def check_gguf(wanted: bool, out: Path) -> None:
    """Raises InputError if a GGUF file is to be written by several processes."""
    from jaxpeft import distributed

    if wanted and distributed.group() is not None:
        raise InputError(f"--out {out}: a GGUF file is written by one process; leave --processes out")


def labels_of(adapter: Path | None) -> tuple[str, ...]:
    """What an adapter classifies rows as; () without one, or where it classifies none."""
    from jaxpeft import peft

    return () if adapter is None else peft.adapter_labels(adapter)


def some_batches(data: str, model: str, count: int, batch_size: int, seq_len: int, seed: int) -> Iterator[Any]:
    """The first batches of a file of examples, packed into rows."""
    import itertools

    from jaxpeft import hf
    from jaxpeft.data import load_examples, make_batches

    examples, _ = load_examples(data, hf.load_tokenizer(model), seq_len)
    made = make_batches(examples, batch_size, seq_len, seed, pack=True)
    return (batch for batch, _ in itertools.islice(made, count))
