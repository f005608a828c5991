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


def load(model: str, adapter: Path | None = None, dtype: str | None = None) -> tuple[Any, Any, Any]:
    """A checkpoint, with an adapter where one is given.

    Args:
      model: folder or hub id.
      adapter: folder of a PEFT adapter.
      dtype: as `hf.load_pretrained` takes it.

    Returns:
      (Model, nested parameters, method); the method is None without an adapter.

    Raises:
      InputError: for what cannot be loaded.

    With an adapter that classifies rows, the model has a classifier in place of its head.
    """
    from jaxpeft import hf, peft

    if adapter is not None and not adapter.is_dir():
        raise InputError(f"--adapter {adapter}: no such directory")
    base, params = hf.load_pretrained(model, dtype, labels_of(adapter))
    if adapter is None:
        return base, params, None
    return peft.attach(adapter, base, params)


def labels_of(adapter: Path | None) -> tuple[str, ...]:
    """What an adapter classifies rows as; () without one, or where it classifies none."""
    from jaxpeft import peft

    return () if adapter is None else peft.adapter_labels(adapter)
