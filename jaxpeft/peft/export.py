"""Adapters out: a method's leaves in PEFT's form of it, or as they are."""

from __future__ import annotations

import hashlib
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpeft import distributed, files, shares, tree
from jaxpeft import method as methods
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec
from jaxpeft.models.labels import SCOPE
from jaxpeft.peft.base import NATIVE, Foreign, classifier_names, config_of, fingerprint, is_added, is_own, is_written
from jaxpeft.peft.form import Form, Written, base_of, form_of
from jaxpeft.peft.leaves import check_leaves
from jaxpeft.peft.schema import CONFIG, FORMAT, OWN, WEIGHTS

# A model's head -> PEFT's name of the task, which says what class of model wraps it; None: any.
_TASKS = {"causal_lm": "CAUSAL_LM", "none": "FEATURE_EXTRACTION"}
# Fields of every adapter_config.json. The version is the oldest that this has been written for.
_ANY = {"auto_mapping": None, "inference_mode": True, "peft_version": "0.18.0", "revision": None}


def export_adapter(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    method: Method,
    base_config: Any,
    base_name: str | os.PathLike[str] = "",
    replace: bool = False,
    labels: Sequence[str] = (),
    rope_scaling: str | None = None,
    beside: Mapping[str, str] = types.MappingProxyType({}),
    names: Mapping[str, str] = types.MappingProxyType({}),
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
      base_config: the model's configuration (`Model.config`), or the model. One of `from_linen` or `from_nnx` has none,
        and PEFT knows no modules of it: its adapter is written in our form, unless `names` are given.
      base_name: folder or hub id of the base, for PEFT's `base_model_name_or_path`.
      replace: an adapter that is already in `directory` may be replaced; nothing else ever is.
      labels: names of what a model that classifies rows tells apart, in order; they are kept with the adapter.
      rope_scaling: KIND=FACTOR, with which the base was loaded; jaxpeft.json keeps it, as PEFT has no place for it.
      beside: further files of the folder, {name: text}.
      names: of a model of one's own: {site: what that linear module is called in the torch model that PEFT adapts},
        with {i} for the layer where the site has layers: {"layers/up": "model.layers.{i}.mlp.up_proj"}. A kernel of
        several axes is the matrix that they flatten to.

    Returns:
      `directory`.

    Raises:
      InputError: if parameters of the base itself train; if adapters are not the method's, of such a base; for one at a
        module that is saved whole with the classifier; if `directory` is in the way or cannot be written; for names of
        what is no site, or a site with an adapter and without a name.
    """
    base_config = config_of(base_config, names)
    found = adapter_of(method, params, base_config)
    leaves = {path: leaf for path, leaf in tree.flatten(params).items() if is_written(path, method, base_config)}
    missing: dict[str, Any] = {} if found is None else {"lacking": found[1].owns}
    check_leaves("the adapter that is exported", leaves, method, base_config, **missing)
    target = files.expanded(directory)
    if distributed.is_first():
        files.check_target(target, CONFIG if replace else None)
    if jax.distributed.is_initialized():  # forms are made of arrays that a process has wholly
        flat = tree.flatten(params)
        own_leaves = {
            path: shares.all_on_host(leaf) for path, leaf in flat.items() if is_added(path, method, base_config)
        }
        params = tree.unflatten({**flat, **own_leaves})
    kernels = not any(changes_kernels(spec) for spec in method.specs)
    own = {
        "format": FORMAT,
        "method": [[s.name, s.config] for s in method.specs],
        "base": fingerprint(base_config, params, kernels=kernels),
        "labels": list(labels) or [f"LABEL_{i}" for i in range(base_config.num_labels)],
    }
    own |= {} if rope_scaling is None else {"rope_scaling": rope_scaling}
    config: dict[str, Any] = {"base_model_name_or_path": os.fspath(base_name) or None}
    if found is None:
        tensors = _leaves(params, method, base_config)
        config["peft_type"] = NATIVE
    else:
        at, form = found
        written = _written(params, method, method.specs[at], form, base_config)
        own |= {"spec": at, **written.facts}
        classifier = _classifier(params, method, base_config)
        _check_apart(form.root, classifier, written.tensors)
        tensors = written.tensors | {f"{form.root}{name}": leaf for name, leaf in classifier.items()}
        config |= {"peft_type": form.type, **_ANY, **written.fields}
        config["modules_to_save"] = _saved_modules(classifier) or None
    # With SEQ_CLS, PEFT demands a classifier among the tensors.
    classifies = any(method.changes(path) for path in classifier_names(base_config))
    config["task_type"] = "SEQ_CLS" if classifies else _TASKS.get(base_config.head)

    from safetensors.numpy import save

    if not distributed.is_first():
        return target
    weights = save(tensors, metadata={"format": "pt"})
    own["sha256"] = hashlib.sha256(weights).hexdigest()
    try:
        with files.appearing(target) as folder:
            files.write_json(folder / CONFIG, config, sort_keys=True)
            files.write(folder / WEIGHTS, weights)
            files.write_json(folder / OWN, own, sort_keys=True)
            for name, text in beside.items():
                files.write(folder / name, text.encode())
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def adapter_of(method: Method, params: Mapping[str, Any], config: Any) -> tuple[int, Form] | None:
    """The part of a method that adds all of its adapter: the index of its spec, and PEFT's form of it.

    None if no part does (several methods add leaves), or PEFT has no form for the one that does.

    Raises:
      InputError: if parameters of the base itself train.
    """
    names = ", ".join(spec.name for spec in method.specs) or "the method"
    added = [path for path in tree.flatten(params) if is_added(path, method, config)]
    changed = [path for path in tree.flatten(params) if method.changes(path) and is_own(path, config)]
    if changed or not added:
        what = f"{changed[0]} trains too and has no place in an adapter" if changed and added else "is no adapter"
        raise InputError(f"{names}: {what}; merge it and save the whole model instead (method.merge, save_pretrained)")
    if isinstance(config, Foreign) and not config.names:
        return None
    leaves = [path for path in added if isinstance(config, Foreign) or not path.startswith(SCOPE)]
    leaves = [path for path in leaves if is_written(path, method, config)]
    forms = {at: form for at, spec in enumerate(method.specs) if (form := form_of(spec.name))}
    owners = [(at, form) for at, form in forms.items() if leaves and all(form.owns(path) for path in leaves)]
    return owners[0] if len(owners) == 1 else None


def _written(params: Mapping[str, Any], method: Method, spec: Spec, form: Form, config: Any) -> Written:
    """The method's leaves in PEFT's form, which is that of a part of it."""
    flat = tree.flatten(params)
    own = (path for path in flat if is_written(path, method, config) and not is_own(path, config))
    leaves = {path: flat[path] for path in own if form.owns(path)}
    try:
        return form.write(spec.config, leaves, base_of(config, params))
    except InputError as error:
        raise InputError(f"{spec.name}: {error}") from None


def changes_kernels(spec: Spec) -> bool:
    """Whether a method changes the base's kernels before it trains."""
    return methods.about(spec.name).changes_kernels(spec.config)


def _leaves(params: Mapping[str, Any], method: Method, config: Any) -> dict[str, np.ndarray]:
    """Our form: everything that is not the base's own and does not follow from it, under its path."""
    flat = tree.flatten(params)
    return {path: np.asarray(leaf, order="C") for path, leaf in flat.items() if is_written(path, method, config)}


def _classifier(params: Mapping[str, Any], method: Method, config: Any) -> dict[str, np.ndarray]:
    """Hugging Face's name -> tensor of a classifier of rows that trains."""
    flat, tensors = tree.flatten(params), {}
    for path, (name, transposed) in classifier_names(config).items():
        if path in flat and method.changes(path):
            tensors[name] = np.ascontiguousarray(flat[path].T if transposed else flat[path], np.float32)
    return tensors


def _check_apart(root: str, classifier: Iterable[str], tensors: Iterable[str]) -> None:
    """Refuses adapters at modules that are saved whole: PEFT would drop them (a pooler that imported LoRA adapts)."""
    for module in sorted({name.rpartition(".")[0] for name in classifier}):
        if any(name.startswith(f"{root}{module}.") for name in tensors):
            raise InputError(
                f"{module} is saved whole with the classifier, where PEFT runs no adapter; merge this one "
                "(`jaxpeft merge`), or train one whose targets leave it out"
            )


def _saved_modules(names: Iterable[str]) -> list[str]:
    """PEFT's modules_to_save: it adds `classifier` and `score` itself, and a module must not be within another."""
    modules = {name.rpartition(".")[0] for name in names}
    return sorted({name.split(".")[0] if name.split(".")[0] in ("classifier", "score") else name for name in modules})
