"""The end of a run: what it leaves, and what its report counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.method import MOVED, about
from jaxpeft.models.labels import SCOPE
from jaxpeft.peft.base import is_written
from jaxpeft.train import result, several
from jaxpeft.train.prepare import Job
from jaxpeft.train.state import TrainState


def write_result(out: Path, job: Job, params: tree.Params, rope_scaling: str | None) -> Path:
    """Writes OUT/adapter/, OUT/adapters/ or OUT/model/, and returns it; see `result.write`, `several.write`."""
    if job.adapters is not None:
        how = {"labels": job.data.labels, "rope_scaling": rope_scaling}
        beside = job.data.template.beside() if job.data.template else {}
        return several.write(
            out / "adapters", job.adapters, params, job.model.config, job.source.model, beside=beside, **how
        )
    where = (out / "adapter", out / "model")
    of_base = (job.base, job.model.config, job.source.model, job.data.labels, rope_scaling)
    beside = job.data.template.beside() if job.data.template else {}
    return result.write(where, job.method, params, *of_base, beside)


def counts(job: Job, state: TrainState) -> dict[str, int]:
    """Numbers of the model and its adapters that training changes, and all others of theirs.

    What a method keeps beside them is none: masters of what stands in the model, projections, a sampler's book.
    """
    names = {spec.name for spec in job.method.specs}
    added = job.adapters is not None or any(about(spec.name).stored != "base" for spec in job.method.specs)

    def is_theirs(path: str) -> bool:
        own_path = tree.canonical(path)
        if own_path in job.base or own_path.startswith(SCOPE) or (added and path in state.frozen):
            return True
        if job.method.role(path) is MOVED or (path in state.moved and path.partition("/")[0] in names):
            return False
        if path in state.trainable and f"{path.rsplit('/', 2)[0]}/kernel" in state.frozen:  # in a part of its place
            return True
        return added and (job.adapters is not None or is_written(path, job.method, job.model.config))

    own = {path: leaf for path, leaf in state.leaves.items() if is_theirs(path)}
    changes = lambda path, leaf: path not in state.frozen and jnp.issubdtype(leaf.dtype, jnp.inexact)
    numbers = tree.size({path: leaf for path, leaf in own.items() if changes(path, leaf)})
    return {"trainable_parameters": numbers, "frozen_parameters": tree.size(own) - numbers}


def of_adapters(job: Job, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """{"adapters": {name: its validation loss before and after}} of several; {} of a run with one."""
    if job.adapters is None:
        return {}
    of = lambda name: {"eval_loss_before": before.get(f"loss/{name}"), "eval_loss_after": after.get(f"loss/{name}")}
    return {"adapters": {name: of(name) for name in job.adapters.methods}}


def sample(job: Job, before: list[str], after: list[str]) -> dict[str, str] | None:
    """A question with its answers, the first; None where none was asked."""
    asked = job.data.asked
    if not asked or not before or not after:
        return None
    prompt = job.tokenizer.decode(asked[0].prompt, skip_special_tokens=True)
    return {"prompt": prompt, "reference": asked[0].reference, "before": before[0], "after": after[0]}
