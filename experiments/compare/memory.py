"""What a step of each method needs, and how large its adapter's file is: compiled and written, not estimated."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.compare import contestants
from experiments.memory import common
from jaxpeft import recipe, tree
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, targets
from jaxpeft.method import Method
from jaxpeft.models import geometries
from jaxpeft.peft.base import is_written
from jaxpeft.peft.export import adapter_of, export_adapter
from jaxpeft.peft.schema import WEIGHTS

MODELS = ("llama3.2-3b", "llama2-7b")
PLANS = ("everything", "matmuls", "blocks")
BATCH, LENGTH, TARGET = 4, 768, "h200"
# Hugging Face PEFT's method_comparison/MetaMathQA: Llama-3.2-3B in bfloat16, batch 4, rows of at most 768 tokens, no
# checkpointing. What is compared, our words for it, our options (those that its number of trained parameters tells,
# on queries and values), `accelerator_memory_max` in GiB, accuracy on GSM8K.
PEFT = (
    ("full", "full", (), 36.20, 0.472),
    ("LoRA r32", "lora", ("rank=32", "targets=qv"), 20.76, 0.478),
    ("LoRA-FA r32", "lora_fa", ("rank=32", "targets=qv"), 20.71, 0.404),
    ("DoRA r32", "dora", ("rank=32", "targets=qv"), 22.85, 0.469),
    ("rsLoRA r64", "lora", ("rank=64", "targets=qv", "rslora=true"), 21.01, 0.513),
    ("RandLoRA r32", "randlora", ("rank=32", "targets=qv"), 21.22, 0.478),
    ("(IA)3", "ia3", (), 21.64, 0.311),
    ("VeRA r256", "vera", ("rank=256", "targets=qv"), 20.14, 0.354),
    ("prefix, 50 tokens", "prefix", ("length=50",), 19.17, 0.416),
    ("prompt, 200 tokens", "prompt", ("length=200",), 22.72, 0.343),
    ("SHiRA r32", "shira", ("rank=32", "targets=qv"), 20.19, 0.510),
)


def measure(key: common.Row) -> common.Row:
    """A step's bytes by owner, its FLOPs, and of the adapter the trained numbers and the file's bytes.

    A plan that the method refuses gives {"refused": why}; a method that trains the base has no file (None).
    """
    config = geometries.load(key["geometry"])
    method = recipe.parse(key["method"], key.get("options", ()))
    try:
        step = planner.make_step(
            config, method, key["batch_size"], key["seq_len"], key["save"], key["dtype"], packed=False
        )
        made = planner.row(step, targets.target(key["target"]))
    except InputError as error:
        return {"refused": str(error)}
    found = {name: made[name] for name in ("bytes", "device_bytes", "fits", "flops", "recompute_flops")}
    trained = sum(math.prod(leaf.shape) for leaf in step.state.trainable.values())
    moving = sum(leaf.size for leaf in jax.tree.leaves(step.state.moved))
    return {**found, "trained": trained, "moved": moving, "backward": step.backward, "file": file_bytes(step, method)}


def file_bytes(step: planner.Step, method: Method) -> int | None:
    """Bytes of the adapter's file; None where what trains is the base's own.

    In PEFT's form it is written, with ones; in ours it holds every leaf that does not follow from the base, as it is.
    """
    leaves, config = step.state.leaves, step.model.config
    try:
        if adapter_of(method, leaves, config) is None:
            added = (leaf for path, leaf in leaves.items() if is_written(path, method, config))
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(list(added)))
        ones = jax.tree.map(lambda leaf: np.broadcast_to(np.ones((), leaf.dtype), leaf.shape), tree.unflatten(leaves))
        with tempfile.TemporaryDirectory() as folder:
            return (export_adapter(Path(folder) / "adapter", ones, method, config) / WEIGHTS).stat().st_size
    except InputError:
        return None


def key_of(geometry: str, words: str, save: str, options: Sequence[str] = ()) -> common.Row:
    """The key of a figure: the method with options, by default those that it needs on the model."""
    options = options or contestants.options(words, geometry)
    fixed = {"geometry": geometry, "batch_size": BATCH, "seq_len": LENGTH, "dtype": "bfloat16", "target": TARGET}
    return {**fixed, "method": words, "options": list(options), "save": save}


def collect(figures: common.Figures, words: Iterable[str], models: Iterable[str]) -> None:
    """Compiles what is missing, the first model first, plan by plan."""
    words = [name for name in words if name in contestants.names() and contestants.is_for(name, classifies=False)]
    for geometry in models:
        for save in PLANS:
            for name in words:
                figures(**key_of(geometry, name, save))
        if geometry == MODELS[0]:
            for _, name, options, *_ in PEFT:
                figures(**key_of(geometry, name, "everything", options))
