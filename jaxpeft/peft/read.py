"""Adapters in: a PEFT adapter, or one in our own form, as a method and its leaves."""

from __future__ import annotations

import hashlib
import json
import os
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import files, models, tree
from jaxpeft.errors import InputError, Notice, first_line
from jaxpeft.method import Method, Spec, chain, from_specs, setup
from jaxpeft.methods.full import full
from jaxpeft.model import Model
from jaxpeft.models.labels import SCOPE
from jaxpeft.peft.base import (
    NATIVE,
    Foreign,
    adapter_labels,
    check_base,
    classifier_names,
    config_of,
    shapes_of,
)
from jaxpeft.peft.chosen import is_target
from jaxpeft.peft.form import Base, Form, base_of, form_of, method_for
from jaxpeft.peft.leaves import check_leaves, check_values
from jaxpeft.peft.schema import CONFIG, FORMAT, OWN, WEIGHTS, Own, adapter_config, own_document

# Fields of every adapter_config.json that say nothing about what the adapter computes, or that are read here.
_ANY = (
    "peft_type auto_mapping base_model_name_or_path revision inference_mode task_type peft_version modules_to_save"
).split()

# safetensors' names of the types that tensors come in.
_KINDS = ("F32", "BF16", "F16", "F64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def import_adapter(
    directory: str | os.PathLike[str],
    base_config: Any,
    base_params: Mapping[str, Any] | None = None,
    names: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[Method, tree.Flat]:
    """Reads an adapter.

    An adapter that `export_adapter` wrote comes back as its method and its leaves, bit for bit. One of PEFT's own comes
    back as the method whose form (see `jaxpeft.peft.form`) is for its peft_type. Layers are stacked here, so where
    PEFT's layers differ they are padded. With LoRA a layer without an adapter gets A = B = 0, a layer of smaller rank
    zero columns in A and zero rows in B, and a layer of another scale has the difference folded into B. That
    computes the same, and as a pair of zeros gets no gradient it also trains as the unpadded adapter does. One that
    classifies rows brings its classifier; the base must have one of the same labels (see `adapter_labels`).

    Args:
      directory: a folder with adapter_config.json and adapter_model.safetensors.
      base_config: the configuration of the base (`Model.config`), or the base itself; of a model of `from_linen` or
        `from_nnx` the latter, to read what `export_adapter` wrote of such a one.
      base_params: the base's nested parameters, to recognise an adapter for another base of the same sizes.
      names: of a model of one's own, to read one in PEFT's form: as `export_adapter` takes them.

    Returns:
      (method, leaves): leaves `{path: array}` to put among the base's parameters before `jaxpeft.setup`, which
        `jaxpeft.attach` does.

    Raises:
      InputError: for no such adapter, pickled or damaged weights, also without a module that target_modules names, an
        adapter for another base, or a feature that is not supported.
    """
    folder = files.expanded(directory)
    base_config = config_of(base_config, names)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory")
    config = adapter_config(folder)
    file = _weights(folder)
    own = _own(folder)
    if (count := len(adapter_labels(folder))) != base_config.num_labels and count:
        raise InputError(
            f"{folder}: classifies rows as {count} labels, and the base as {base_config.num_labels or 'none'}"
        )
    if config.get("peft_type") == NATIVE:
        return _as_it_is(folder, own, base_config, base_params)
    if isinstance(base_config, Foreign) and not base_config.names:
        raise InputError(
            f"{folder}: an adapter in PEFT's form, by names of modules; say how this model's are called: names="
        )
    specs, at, form = _method(folder, config, own)
    if own:
        _require(folder, own, ("method", *form.facts, "base"))
        check_base(os.fspath(folder), own["base"], base_config, base_params)
    _check_config(folder / CONFIG, config, form, base_config)
    base = base_of(base_config, base_params)
    found = _tensors(file)
    for name, tensor in found.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating) and not name.endswith(form.integers):
            raise InputError(f"{file}: {name} is {tensor.dtype}, expected floating-point numbers")
    tensors, classifier = _without_classifier(file, found, base_config, form.root)
    tensors = _without_copies(file, tensors, base_config, base_params)
    with _of(file):
        parts = form.parse(tensors, base)
    _check_targets(folder, config, form, parts, base)
    with _of(folder / CONFIG if own is None else folder / OWN):
        if own is None:
            arguments, parts = form.read(config, parts, base)
            specs = (Spec(specs[0].name, arguments),)
        method = from_specs(specs)
        try:
            leaves = form.restore(method.specs[at].config, parts, own or {}, base)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            if own is None or isinstance(error, InputError):
                raise
            raise InputError(f"does not say what {method.name} needs besides the tensors: {error}") from None
    if classifier and own is None:
        method = chain(method, full(f"^{SCOPE}"))
    leaves = {**leaves, **classifier}
    check_leaves(os.fspath(file), leaves, method, base_config, lacking=lambda path: True, further=True)
    check_values(os.fspath(file), leaves, method, base_config)
    if own is None and (folder / OWN).is_file():
        text = f"speaks of other tensors than {WEIGHTS} holds, and is passed over: the adapter is what {CONFIG} says"
        warnings.warn(f"{folder / OWN}: {text}; whether it is for this base is not known", Notice, stacklevel=2)
    return method, leaves


def attach(
    directory: str | os.PathLike[str],
    base: Model,
    params: tree.Params,
    names: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[Model, tree.Params, Method]:
    """A model with the adapter in a folder, one of PEFT's or of ours; `names` as in `import_adapter`.

    Returns:
      (adapted model, its nested parameters, the method): `jaxpeft.split(params, method.trainable)` trains on, and
        `method.merge(params)` has it folded into the base.

    Raises:
      InputError: as `import_adapter` does.
    """
    method, leaves = import_adapter(directory, base, params, names)
    flat = {**tree.flatten(params), **leaves}
    model, trainable, frozen = setup(method, base, tree.unflatten(flat), jax.random.key(0), batches=lambda: ())
    return model, tree.combine(trainable, frozen), method


def specs_of(directory: str | os.PathLike[str]) -> tuple[Spec, ...]:
    """The members of an adapter's method, without a classifier's; of one of PEFT's own, their names alone.

    Raises:
      InputError: for no such adapter, or one of which no method is known.
    """
    folder = files.expanded(directory)
    config, _ = adapter_config(folder), _weights(folder)
    own = _own(folder)
    if own is None and config.get("peft_type") != NATIVE:
        return _method(folder, config, None)[0]
    said = _ours(folder, own)
    _require(folder, said, ("method",), needed=config.get("peft_type") == NATIVE)
    specs = tuple(Spec(name, arguments) for name, arguments in said["method"])
    return tuple(spec for spec in specs if (spec.name, spec.config) != ("full", full(f"^{SCOPE}").specs[0].config))


# Files.


def tensors_of(directory: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of an adapter by their names in its file, in their own types.

    Raises:
      InputError: for a folder without them, a damaged file, or what is no finite number.
    """
    return _tensors(_weights(files.expanded(directory)))


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if pickled := sorted(file.name for pattern in ("*.bin", "*.pt") for file in folder.glob(pattern)):
        raise InputError(
            f"{folder}: the adapter is pickled ({pickled[0]}), which can run code and is refused; convert it in a "
            "trusted environment with PEFT's model.save_pretrained(directory, safe_serialization=True)"
        )
    raise InputError(f"{folder}: has no {WEIGHTS}")


def _own(folder: Path) -> Own | None:
    """jaxpeft.json, if it speaks of these tensors.

    Raises:
      InputError: if it has another format.
    """
    if (own := own_document(folder)) is None:
        return None
    with (folder / WEIGHTS).open("rb") as file:
        if own.get("sha256") != hashlib.file_digest(file, "sha256").hexdigest():
            return None
    if own.get("format") != FORMAT:
        raise InputError(f"{folder / OWN}: has format {own.get('format')}; this version of jaxpeft reads {FORMAT}")
    return own


def _ours(folder: Path, own: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The jaxpeft.json of an adapter in our form."""
    if own is None:
        raise InputError(f"{folder}: is an adapter in jaxpeft's own form without a {OWN} that speaks of its {WEIGHTS}")
    return own


def _require(folder: Path, own: Mapping[str, Any], fields: tuple[str, ...], needed: bool = False) -> None:
    """Refuses a jaxpeft.json that lacks one of the fields; `needed`: without it the adapter cannot be read."""
    if lacking := [name for name in fields if name not in own]:
        advice = "" if needed else "; remove it to read the adapter as PEFT does"
        raise InputError(f"{folder / OWN}: lacks {', '.join(lacking)}{advice}")


@contextmanager
def _of(file: Path) -> Iterator[None]:
    """Puts the file's name in front of a mistake in it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor as it is; what is no finite number is refused."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if (kind := opened.get_slice(name).get_dtype()) not in _KINDS:
                    raise InputError(f"{file}: {name} is {kind}, expected one of {', '.join(_KINDS)}")
                tensors[name] = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file (truncated or damaged): {first_line(error)}") from None
    for name, tensor in tensors.items():
        with np.errstate(over="ignore"):
            finite = np.isfinite(tensor.astype(np.float32))  # in which adapters are kept
        if not finite.all():
            raise InputError(f"{file}: {name} holds {tensor[~finite][0]}, expected finite numbers of float32 alone")
    return tensors


# PEFT's form.


def _method(
    folder: Path, config: Mapping[str, Any], own: Mapping[str, Any] | None
) -> tuple[tuple[Spec, ...], int, Form]:
    """The specs of the method, the index of the one whose leaves the tensors are, and its form.

    Without jaxpeft.json that is what PEFT says it is, and its arguments are still to be read.
    """
    if own is not None:
        _require(folder, own, ("method",))
        specs = tuple(Spec(name, arguments) for name, arguments in own["method"])
        with _of(folder / OWN):
            forms = {at: form for at, spec in enumerate(specs) if (form := form_of(spec.name))}
            at = own.get("spec", min(forms, default=-1))
            if "spec" in own and at not in range(len(specs)):
                raise InputError(f"spec {at} is none of its {len(specs)} methods, which are numbered from 0")
            if at not in forms or forms[at].type != config.get("peft_type"):
                raise InputError(f"its method has no form for peft_type {config.get('peft_type')!r}")
        return specs, at, forms[at]
    with _of(folder / CONFIG):
        name, form = method_for(config)
    return (Spec(name, {}),), 0, form


def _check_config(file: Path, config: Mapping[str, Any], form: Form, base: Any) -> None:
    """Refuses what would make the adapter compute something else than the form says."""
    with _of(file):
        form.check(config)
        whole = config.get("modules_to_save") or []
        if not base.num_labels and whole:
            raise InputError(f"modules_to_save = {json.dumps(whole)} is not supported where no rows are classified")
        known = {*_ANY, *form.fields, *(form.when or {})}
        for name, value in config.items():
            if name not in known and value not in (None, False, [], {}, ""):
                raise InputError(f"{name} = {json.dumps(value)} is not supported")


def _check_targets(folder: Path, config: Mapping[str, Any], form: Form, parts: Mapping[str, Any], base: Base) -> None:
    """Refuses tensors that lack a module which adapter_config.json names: the file has lost some.

    PEFT saves tensors of every module that it adapts, and we name exactly those that the file has.
    """
    heads = {name.removesuffix(".weight") for name, _ in classifier_names(base.config).values()}
    with _of(folder / CONFIG):
        named = [name for name in form.modules(base) if name not in heads and is_target(config, name)]
    if lacking := [name for name in named if name not in parts]:
        others = f" and of {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(
            f"{folder / WEIGHTS}: has no tensor of {lacking[0]}{others}, which target_modules of {CONFIG} names"
        )


def _without_classifier(
    file: Path, tensors: Mapping[str, np.ndarray], config: Any, root: str
) -> tuple[dict[str, np.ndarray], tree.Flat]:
    """(The other tensors, the leaves of the classifier of rows, float32)."""
    rest, leaves = dict(tensors), {}
    shapes = shapes_of(config)
    for path, (name, transposed) in classifier_names(config).items():
        found = [rest.pop(key) for key in {f"{root}{name}", f"base_model.model.{name}"} if key in rest]
        if not found:
            continue
        tensor = found[0]
        there = shapes[path].shape[::-1] if transposed else shapes[path].shape
        if tensor.shape != there:
            raise InputError(
                f"{file}: an adapter for another base: {name} has shape {tensor.shape}, the base's has {there}"
            )
        leaves[path] = jnp.asarray(tensor.T if transposed else tensor, jnp.float32)
    return rest, leaves


def _without_copies(
    file: Path, tensors: Mapping[str, np.ndarray], config: Any, params: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    """The tensors without those of the base itself, which PEFT adds where it adapts the head.

    Raises:
      InputError: if one has another shape than the base's, or other values (compared where `params` are given).
    """
    rest = dict(tensors)
    for path, shape in () if isinstance(config, Foreign) else shapes_of(config).items():
        if tree.stacked(path):
            continue
        name, transposed = models.hf_name(config, path)
        for key in (f"base_model.model.{name}", f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight"):
            if (copy := rest.pop(key, None)) is None:
                continue
            there = shape.shape[::-1] if transposed else shape.shape
            if copy.shape != there:
                raise InputError(
                    f"{file}: an adapter for another base: {key} has shape {copy.shape}, the base's has {there}"
                )
            if params is not None:
                own = np.asarray(tree.flatten(params)[path]).astype(jnp.bfloat16)
                if not np.array_equal(own.T if transposed else own, copy.astype(jnp.bfloat16)):
                    raise InputError(f"{file}: brings its own {key}, which is not supported")
    return rest


# Our form.


def _as_it_is(
    folder: Path, own: Mapping[str, Any] | None, config: Any, params: Mapping[str, Any] | None
) -> tuple[Method, tree.Flat]:
    """An adapter in our form: tensors by our paths, in their own types."""
    own = _ours(folder, own)
    _require(folder, own, ("method", "base"), needed=True)
    check_base(os.fspath(folder), own["base"], config, params, needed=True)
    with _of(folder / OWN):
        method = from_specs(own["method"])
    tensors = _tensors(folder / WEIGHTS)
    check_leaves(os.fspath(folder / WEIGHTS), tensors, method, config)
    check_values(os.fspath(folder / WEIGHTS), tensors, method, config)
    return method, {path: jnp.asarray(tensor) for path, tensor in tensors.items()}
