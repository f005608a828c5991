"""Adapters out: the factors of a method's sites as a PEFT adapter, or its leaves as they are."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jaxpeft import files, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec
from jaxpeft.method import module as method_file
from jaxpeft.models.labels import SCOPE
from jaxpeft.peft.base import CONFIG, FORMAT, NATIVE, OWN, WEIGHTS, classifier_names, fingerprint, is_own, modules

# A model's head -> PEFT's name of the task, which says what class of model wraps it; None: any.
_TASKS = {"causal_lm": "CAUSAL_LM", "none": "FEATURE_EXTRACTION"}


def export_adapter(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    method: Method,
    base_config: Any,
    base_name: str | os.PathLike[str] = "",
    replace: bool = False,
    labels: Sequence[str] = (),
) -> Path:
    """Writes the adapters in `params` for PEFT and for `import_adapter`. The folder appears whole or not at all.

    What PEFT has no form for is written for `import_adapter` alone (see `jaxpeft.peft`).

    LoRA-FA is written as ordinary LoRA, with A drawn from its seed; PiSSA as LoRA of twice the rank for the original
    base. Trailing pairs of a zero column of A and a zero row of B (adapters whose layers differ have them, see
    `import_adapter`) are left out.

    Args:
      directory: the folder to make; it may exist if it is empty.
      params: nested parameters of the adapted model; the adapters suffice, the base's leaves give it a fingerprint to
        be told by.
      method: the method that they are of.
      base_config: the model's configuration (`Model.config`).
      base_name: folder or hub id of the base, for PEFT's `base_model_name_or_path`.
      replace: an adapter that is already in `directory` may be replaced; nothing else ever is.
      labels: names of what a model that classifies rows tells apart, in order; they are kept with the adapter.

    Returns:
      `directory`.

    Raises:
      InputError: if parameters of the base itself train; if `directory` is in the way or cannot be written.
    """
    found = adapter_of(method, params, base_config)
    target = Path(directory).expanduser()
    files.check_target(target, CONFIG if replace else None)
    kernels = not any(changes_kernels(spec) for spec in method.specs)
    own = {
        "format": FORMAT,
        "method": [[s.name, s.config] for s in method.specs],
        "base": fingerprint(base_config, params, kernels=kernels),
        "labels": list(labels) or [f"LABEL_{i}" for i in range(base_config.num_labels)],
    }
    if found is None:
        tensors = _leaves(params, method, base_config)
        config: dict[str, Any] = {"base_model_name_or_path": os.fspath(base_name) or None, "peft_type": NATIVE}
    else:
        spec, file = found
        pairs, own["extra"] = _pairs(params, spec, file, base_config)
        if not pairs:
            raise InputError(f"{spec.name}: the parameters hold no adapter that is not zero")
        tensors = {}
        for name, pair in pairs.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(pair.a.T)
            tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(pair.b.T)
        own["ranks"] = {pair.site: pair.rank for pair in pairs.values()}
        config = _config(pairs, file.peft_config(spec.config), list(modules(base_config)), os.fspath(base_name))
        classifier = _classifier(params, method, base_config)
        tensors |= {f"base_model.model.{name}": leaf for name, leaf in classifier.items()}
        config["modules_to_save"] = _saved_modules(classifier) or None
    # With SEQ_CLS, PEFT demands a classifier among the tensors.
    classifies = any(method.trainable(path) for path in classifier_names(base_config))
    config["task_type"] = "SEQ_CLS" if classifies else _TASKS.get(base_config.head)

    from safetensors.numpy import save

    weights = save(tensors, metadata={"format": "pt"})
    own["sha256"] = hashlib.sha256(weights).hexdigest()
    try:
        with files.appearing(target) as folder:
            files.write_json(folder / CONFIG, config, sort_keys=True)
            files.write(folder / WEIGHTS, weights)
            files.write_json(folder / OWN, own, sort_keys=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


class _Pair(NamedTuple):
    """One module's factors, a (n, r), b (r, m) float32, and scale; `rank` is that of its site, at least r."""

    site: str
    rank: int
    a: np.ndarray
    b: np.ndarray
    scale: float


def adapter_of(method: Method, params: Mapping[str, Any], config: Any) -> tuple[Spec, ModuleType] | None:
    """The part of a method that PEFT knows, and its file; None if that is not all of its adapter.

    Raises:
      InputError: if parameters of the base itself train.
    """
    names = ", ".join(spec.name for spec in method.specs) or "the method"
    added = [path for path in tree.flatten(params) if _is_added(path, method, config)]
    changed = [path for path in tree.flatten(params) if method.trainable(path) and is_own(path, config)]
    if changed or not added:
        what = f"{changed[0]} trains too and has no place in an adapter" if changed and added else "is no adapter"
        raise InputError(f"{names}: {what}; merge it and save the whole model instead")
    known = [(spec, file) for spec in method.specs if hasattr(file := method_file(spec.name), "PEFT_SCOPE")]
    sites = [path for path in added if not path.startswith(SCOPE)]
    if len(known) == 1 and sites and all(f"/{known[0][1].PEFT_SCOPE}/" in path for path in sites):
        return known[0]
    return None


def _is_added(path: str, method: Method, config: Any) -> bool:
    """Whether a parameter belongs to the adapter, among which is a classifier that trains."""
    return method.trainable(path) if path.startswith(SCOPE) else not is_own(path, config)


def changes_kernels(spec: Spec) -> bool:
    """Whether a method changes the base's kernels before it trains."""
    file = method_file(spec.name)
    return hasattr(file, "changes_kernels") and file.changes_kernels(spec.config)


def _leaves(params: Mapping[str, Any], method: Method, config: Any) -> dict[str, np.ndarray]:
    """Our form: everything that is not the base's own, under its path."""
    flat = tree.flatten(params)
    return {path: np.asarray(leaf, order="C") for path, leaf in flat.items() if _is_added(path, method, config)}


def _classifier(params: Mapping[str, Any], method: Method, config: Any) -> dict[str, np.ndarray]:
    """Hugging Face's name -> tensor of a classifier of rows that trains."""
    flat, tensors = tree.flatten(params), {}
    for path, (name, transposed) in classifier_names(config).items():
        if path in flat and method.trainable(path):
            tensors[name] = np.ascontiguousarray(flat[path].T if transposed else flat[path], np.float32)
    return tensors


def _saved_modules(names: Iterable[str]) -> list[str]:
    """PEFT's modules_to_save: it adds `classifier` and `score` itself, and a module must not be within another."""
    modules = {name.rpartition(".")[0] for name in names}
    return sorted({name.split(".")[0] if name.split(".")[0] in ("classifier", "score") else name for name in modules})


def _pairs(params: Mapping[str, Any], spec: Spec, file: ModuleType, config: Any) -> tuple[dict[str, _Pair], dict]:
    """Module name -> pair, in the order of the layers; `{site: {leaf: values}}` of what the factors do not hold."""
    marker = f"/{file.PEFT_SCOPE}/"
    first = {segment: start for segment, start, _ in tree.segments(params)}
    leaves: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.flatten(params).items():
        if marker in path:
            site, _, name = path.rpartition(marker)
            leaves.setdefault(site, {})[name] = leaf
    places = {(module.site, module.layer): (name, module) for name, module in modules(config).items()}
    pairs, extra = {}, {}
    for site, own in leaves.items():
        whole, start = tree.canonical(site), first.get(site.split("/")[0])
        if (whole, None if start is None else start) not in places:
            raise InputError(f"{spec.name}: {site} is no linear site of this {config.model_type} configuration")
        inputs = places[whole, start][1].n
        a, b = (np.asarray(x, np.float32) for x in file.peft_factors(spec.config, own, inputs))
        scale = file.peft_scale(spec.config, site)
        for row in (None,) if start is None else range(len(a)):
            name, _ = places[whole, None if start is None or row is None else start + row]
            one_a, one_b = (a, b) if row is None else (a[row], b[row])
            if used := _used(one_a, one_b):
                pairs[name] = _Pair(whole, a.shape[-1], one_a[:, :used], one_b[:used], scale)
        if kept := {name: np.asarray(own[name]).tolist() for name in file.PEFT_EXTRA if name in own}:
            extra[whole] = kept
    order = {name: i for i, (name, _) in enumerate(places.values())}
    return dict(sorted(pairs.items(), key=lambda item: order[item[0]])), extra


def _used(a: np.ndarray, b: np.ndarray) -> int:
    """The rank without trailing pairs of zeros, which can neither act nor learn."""
    nonzero = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
    return int(nonzero[-1]) + 1 if len(nonzero) else 0


def _config(pairs: Mapping[str, _Pair], fields: Mapping[str, Any], linear: list[str], base_name: str) -> dict[str, Any]:
    """adapter_config.json: ranks and alphas that most modules have as the default, the rest as patterns."""
    ranks = {name: pair.b.shape[0] for name, pair in pairs.items()}
    rslora = fields["use_rslora"]
    alphas = {name: _tidy(p.scale * (math.sqrt(ranks[name]) if rslora else ranks[name])) for name, p in pairs.items()}
    leaf_names = {name.rsplit(".", 1)[-1] for name in pairs}
    short = {name for name in linear if name.rsplit(".", 1)[-1] in leaf_names} == set(pairs)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "alpha_pattern": _pattern(alphas, alpha, short),
        "auto_mapping": None,
        "base_model_name_or_path": base_name or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.18.0",  # the oldest that this has been written for
        "r": rank,
        "rank_pattern": _pattern(ranks, rank, short),
        "revision": None,
        "target_modules": sorted(leaf_names) if short else list(pairs),
        "use_dora": False,
        "use_rslora": False,
        **fields,
    }


def _pattern(values: Mapping[str, Any], default: Any, short: bool) -> dict[str, Any]:
    """PEFT's patterns (regular expressions for the end of a module's name), for modules that differ from the default.

    A leaf name whose modules all agree stands for them.
    """
    by_leaf: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rsplit(".", 1)[-1], {})[name] = value
    pattern = {}
    for leaf, own in by_leaf.items():
        if short and len(set(own.values())) == 1:
            own = {leaf: next(iter(own.values()))}
        pattern.update({name: value for name, value in own.items() if value != default})
    return pattern


def _tidy(alpha: float) -> float | int:
    """Without what s * r has lost in the last digits, and whole numbers as PEFT writes them."""
    rounded = float(f"{alpha:.12g}")
    return int(rounded) if rounded.is_integer() else rounded
