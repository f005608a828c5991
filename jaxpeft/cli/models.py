"""What the commands that take --model and --adapter share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jaxpeft.errors import InputError


def model_or_default(model: str | None) -> str:
    """The checkpoint that was named, else the embedded one."""
    from jaxpeft import assets

    return os.fspath(assets.MODEL) if model is None else model


def load(
    model: str, adapter: Path | None = None, dtype: str | None = None, rope_scaling: str | None = None
) -> tuple[Any, Any, Any]:
    """A checkpoint, with an adapter where one is given.

    Args:
      model: folder or hub id.
      adapter: folder of a PEFT adapter.
      dtype: as `hf.load_pretrained` takes it.
      rope_scaling: from `scaling_of`.

    Returns:
      (Model, nested parameters, method); the method is None without an adapter.

    Raises:
      InputError: for what cannot be loaded.

    With an adapter that classifies rows, the model has a classifier in place of its head.
    """
    from jaxpeft import hf, peft

    if adapter is not None and not adapter.is_dir():
        raise InputError(f"--adapter {adapter}: no such directory")
    base, params = hf.load_pretrained(model, dtype, labels_of(adapter), rope_scaling=rope_scaling)
    if adapter is None:
        return base, params, None
    return peft.attach(adapter, base, params)


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


def labels_of(adapter: Path | None) -> tuple[str, ...]:
    """What an adapter classifies rows as; () without one, or where it classifies none."""
    from jaxpeft import peft

    return () if adapter is None else peft.adapter_labels(adapter)
