"""What a run leaves: an adapter, or a whole checkpoint where the base itself has changed."""

from __future__ import annotations

import shutil
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft import distributed, tree
from jaxpeft.hf import save_pretrained
from jaxpeft.method import Method
from jaxpeft.peft import export_adapter


def write(
    where: tuple[Path, Path],
    method: Method,
    params: tree.Params,
    base: Mapping[str, Any],
    config: Any,
    source: str,
    labels: Sequence[str] = (),
    rope_scaling: str | None = None,
    beside: Mapping[str, str] = types.MappingProxyType({}),
) -> Path:
    """Writes the result of a run, or of one of its checkpoints. A whole model's tensors keep the base's types.

    Args:
      where: the folders for an adapter and for a whole checkpoint; what is there is replaced.
      method: of the run.
      params: nested parameters of the adapted model.
      base: the base's leaves or their shapes, by path.
      config: the model's configuration.  source: the base's folder or hub id.  labels: names that a classifier gives.
      rope_scaling: with which the base was loaded.
      beside: further files of the folder, {name: text}.

    Returns:
      The folder that was written. Of several processes the first one writes; all have to call.
    """
    adapter, model = where
    if not any(tree.canonical(path) in base and method.changes(path) for path in tree.flatten(params)):
        how: dict[str, Any] = {"labels": labels, "rope_scaling": rope_scaling, "beside": beside}
        return export_adapter(adapter, params, method, config, source, replace=True, **how)
    # It may be there already, from a process that was killed between this and the report.
    if distributed.is_first():
        shutil.rmtree(model, ignore_errors=True)
    before, merged = tree.flatten(params), method.merge(params)
    unchanged = {
        path for path, leaf in tree.flatten(merged).items() if before.get(path) is leaf and not method.changes(path)
    }
    how = {"as_stored": True, "unchanged": unchanged, "rope_scaling": rope_scaling, "beside": beside}
    save_pretrained(model, source, merged, labels=labels, **how)
    return model
