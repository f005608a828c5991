"""Adapters in: a PEFT adapter, or one in our own form, as a method and its leaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import files, models, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, chain, from_specs, setup
from jaxpeft.method import module as method_file
from jaxpeft.methods.full import full
from jaxpeft.methods.lora import lora, scale_of
from jaxpeft.model import Model
from jaxpeft.models.labels import SCOPE
from jaxpeft.peft.base import (
    CONFIG,
    FORMAT,
    NATIVE,
    OWN,
    WEIGHTS,
    Module,
    adapter_labels,
    check_base,
    classifier_names,
    modules,
)

# Fields of adapter_config.json that say nothing about what the adapter computes, or that are read here.
_READ = "peft_type r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora init_lora_weights bias".split()
_HARMLESS = (
    "auto_mapping base_model_name_or_path revision inference_mode task_type peft_version target_modules "
    "exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config "
    "ensure_weight_tying modules_to_save"
).split()
# Initialisations that leave the base's kernels as they are.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# What is read of jaxpeft.json: of any adapter, and of one in PEFT's form.
_FIELDS, _PEFT_FIELDS = ("method", "base"), ("method", "ranks", "extra", "base")
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


def import_adapter(
    directory: str | os.PathLike[str], base_config: Any, base_params: Mapping[str, Any] | None = None
) -> tuple[Method, tree.Flat]:
    """Reads an adapter.

    An adapter that `export_adapter` wrote comes back as its method and its leaves, bit for bit. One of PEFT's own comes
    back as `jaxpeft.lora`. Layers are stacked here, so where PEFT's layers differ they are padded: a layer without an
    adapter gets A = B = 0, a layer of smaller rank zero columns in A and zero rows in B, and a layer of another scale
    has the difference folded into B. That computes the same, and as a pair of zeros gets no gradient it also trains as
    the unpadded adapter does. One that classifies rows brings its classifier; the base must have one of the same labels
    (see `adapter_labels`).

    Args:
      directory: a folder with adapter_config.json and adapter_model.safetensors.
      base_config: the configuration of the base (`Model.config`).
      base_params: the base's nested parameters, to recognise an adapter for another base of the same sizes.

    Returns:
      (method, leaves): leaves `{path: array}` to put among the base's parameters before `jaxpeft.setup` (see
        `attach`).

    Raises:
      InputError: for no such adapter, pickled or damaged weights, an adapter for another base, or a feature that is not
        supported.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory")
    config = files.read_json(folder / CONFIG, f"{folder}: has no {CONFIG}; is it a PEFT adapter?")
    native = config.get("peft_type") == NATIVE
    file = _weights(folder)
    own = _own(folder, _FIELDS if native else _PEFT_FIELDS)
    if (count := len(adapter_labels(folder))) != base_config.num_labels and count:
        raise InputError(
            f"{folder}: classifies rows as {count} labels, and the base as {base_config.num_labels or 'none'}"
        )
    if own:
        check_base(os.fspath(folder), own["base"], base_config, base_params)
    if native:
        return _as_it_is(folder, own)
    _check_config(folder / CONFIG, config, base_config)
    known = modules(base_config)
    tensors, classifier = _without_classifier(file, _tensors(file), base_config)
    pairs = _pairs(file, _without_copies(file, tensors, base_config, base_params), known)
    method, leaves = (
        _restore(folder / OWN, own, pairs, known) if own else _as_lora(folder / CONFIG, config, pairs, known)
    )
    if classifier and not own:
        method = chain(method, full(f"^{SCOPE}"))
    return method, {**leaves, **classifier}


def attach(directory: str | os.PathLike[str], base: Model, params: tree.Params) -> tuple[Model, tree.Params, Method]:
    """A model with the adapter in a folder.

    Returns:
      (adapted model, its nested parameters, the method).

    Raises:
      InputError: as `import_adapter` does.
    """
    method, leaves = import_adapter(directory, base.config, params)
    flat = {**tree.flatten(params), **leaves}
    model, trainable, frozen = setup(method, base, tree.unflatten(flat), jax.random.key(0))
    return model, tree.combine(trainable, frozen), method


class _Pair(NamedTuple):
    """One module's factors, float32: a (n, r), b (r, m)."""

    a: np.ndarray
    b: np.ndarray


# Files.


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if pickled := sorted(file.name for pattern in ("*.bin", "*.pt") for file in folder.glob(pattern)):
        raise InputError(
            f"{folder}: the adapter is pickled ({pickled[0]}), which can run code and is refused; convert it in a "
            "trusted environment with PEFT's model.save_pretrained(directory, safe_serialization=True)"
        )
    raise InputError(f"{folder}: has no {WEIGHTS}")


def _own(folder: Path, fields: Iterable[str]) -> dict[str, Any] | None:
    """jaxpeft.json, if it speaks of these tensors.

    Raises:
      InputError: if it has another format, or lacks one of the fields.
    """
    if not (folder / OWN).is_file():
        return None
    own = files.read_json(folder / OWN, "")
    with (folder / WEIGHTS).open("rb") as file:
        if own.get("sha256") != hashlib.file_digest(file, "sha256").hexdigest():
            return None
    if own.get("format") != FORMAT:
        raise InputError(f"{folder / OWN}: has format {own.get('format')}; this version of jaxpeft reads {FORMAT}")
    if lacking := [name for name in fields if name not in own]:
        raise InputError(f"{folder / OWN}: lacks {', '.join(lacking)}; remove it to read plain LoRA")
    return own


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor as it is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file (truncated or damaged): {error}") from None


# PEFT's form.


def _check_config(file: Path, config: Mapping[str, Any], base: Any) -> None:
    """Refuses what would make the adapter compute something else than x A B."""
    if (kind := config.get("peft_type")) != "LORA":
        raise InputError(f"{file}: peft_type {kind!r} is not supported; supported: 'LORA'")
    if (bias := config.get("bias", "none")) != "none":
        raise InputError(f"{file}: bias {bias!r} is not supported; supported: 'none'")
    init = config.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _INITS):
        raise InputError(
            f"{file}: init_lora_weights {init!r} changes the base's kernels; save the adapter for the original base "
            "with PEFT's save_pretrained(directory, path_initial_model_for_weight_conversion=...)"
        )
    whole = config.get("modules_to_save") or []
    if not base.num_labels and whole:
        raise InputError(f"{file}: modules_to_save = {json.dumps(whole)} is not supported where no rows are classified")
    for name, value in config.items():
        if name not in (*_READ, *_HARMLESS) and value not in (None, False, [], {}, ""):
            raise InputError(f"{file}: {name} = {json.dumps(value)} is not supported")


def _without_classifier(
    file: Path, tensors: Mapping[str, np.ndarray], config: Any
) -> tuple[dict[str, np.ndarray], tree.Flat]:
    """(The other tensors, the leaves of the classifier of rows, float32)."""
    rest, leaves = dict(tensors), {}
    shapes = models.FAMILIES[config.model_type].shapes(config)
    for path, (name, transposed) in classifier_names(config).items():
        if (tensor := rest.pop(f"base_model.model.{name}", None)) is None:
            continue
        leaf = tensor.T if transposed else tensor
        if leaf.shape != shapes[path].shape:
            raise InputError(f"{file}: an adapter for another base: {name} has shape {tensor.shape}")
        leaves[path] = jnp.asarray(leaf, jnp.float32)
    return rest, leaves


def _without_copies(
    file: Path, tensors: Mapping[str, np.ndarray], config: Any, params: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    """The tensors without those of the base itself, which PEFT adds where it adapts the head.

    Raises:
      InputError: if one has another shape than the base's, or other values (compared where `params` are given).
    """
    rest = dict(tensors)
    for path, shape in models.FAMILIES[config.model_type].shapes(config).items():
        if tree.stacked(path):
            continue
        name, transposed = models.hf_name(config, path)
        for key in (f"base_model.model.{name}", f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight"):
            if (copy := rest.pop(key, None)) is None:
                continue
            copy = copy.T if transposed else copy
            if copy.shape != shape.shape:
                raise InputError(f"{file}: an adapter for another base: {key} has shape {copy.shape[::-1]}")
            if params is not None:
                own = np.asarray(tree.flatten(params)[path])
                if not np.array_equal(own.astype(jnp.bfloat16), copy.astype(jnp.bfloat16)):
                    raise InputError(f"{file}: brings its own {key}, which is not supported")
    return rest


def _pairs(file: Path, tensors: Mapping[str, np.ndarray], known: Mapping[str, Module]) -> dict[str, _Pair]:
    """Module name -> factors, each checked against the base."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    adapters = set()
    for key, tensor in tensors.items():
        if not (found := _KEY.fullmatch(key)):
            raise InputError(
                f"{file}: the tensor {key} is not supported; supported: <module>.lora_A.weight and .lora_B.weight"
            )
        name = found["module"]
        if name not in known:
            raise InputError(
                f"{file}: an adapter for another base: it adapts {name}, which is no linear module of this one; "
                f"nearest: {tree.nearest(name, known)}"
            )
        adapters.add(found["adapter"])
        n, m = known[name].n, known[name].m
        side, axis, expected = ("inputs", -1, n) if found["factor"] == "A" else ("outputs", 0, m)
        if tensor.ndim != 2 or tensor.shape[axis] != expected:
            raise InputError(
                f"{file}: an adapter for another base: {key} has shape {tensor.shape}, where {name} has {expected} "
                f"{side}"
            )
        factors.setdefault(name, {})[found["factor"]] = tensor.T.astype(np.float32)
    if len(adapters) > 1:
        raise InputError(f"{file}: holds several adapters ({', '.join(sorted(map(str, adapters)))}); save one alone")
    if not factors:
        raise InputError(f"{file}: holds no adapter")
    pairs = {}
    for name, own in factors.items():
        if len(own) != 2:
            raise InputError(f"{file}: {name} has no lora_{'A' if 'B' in own else 'B'}.weight")
        a, b = own["A"], own["B"]
        if a.shape[1] != b.shape[0]:
            raise InputError(f"{file}: {name} has lora_A of rank {a.shape[1]} and lora_B of rank {b.shape[0]}")
        pairs[name] = _Pair(a, b)
    return pairs


def _stack(
    pairs: Mapping[str, _Pair], known: Mapping[str, Module], ranks: Mapping[str, int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Site -> A (L, n, r), B (L, r, m), padded with zeros to the site's rank; no layer axis where the site has none."""
    layers = Counter(module.site for module in known.values())
    stacked: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, pair in pairs.items():
        site, layer, n, m = known[name]
        axis = () if layer is None else (layers[site],)
        if site not in stacked:
            rank = ranks[site]
            stacked[site] = np.zeros((*axis, n, rank), np.float32), np.zeros((*axis, rank, m), np.float32)
        a, b = stacked[site] if layer is None else (x[layer] for x in stacked[site])
        r = pair.a.shape[1]
        a[:, :r], b[:r] = pair.a, pair.b
    return stacked


def _as_lora(
    file: Path, config: Mapping[str, Any], pairs: Mapping[str, _Pair], known: Mapping[str, Module]
) -> tuple[Method, tree.Flat]:
    """An adapter of PEFT's as `lora`."""
    rslora = bool(config.get("use_rslora"))
    members: dict[str, list[str]] = {}
    for name in pairs:
        members.setdefault(known[name].site, []).append(name)
    ranks, alphas, scaled = {}, {}, {}
    for site, names in members.items():
        own_ranks = {name: pairs[name].a.shape[1] for name in names}
        own_alphas = {name: _alpha(file, config, name) for name in names}
        scales = {name: scale_of(own_alphas[name], own_ranks[name], rslora) for name in names}
        ranks[site], scale = max(own_ranks.values()), _commonest(scales.values())
        n, m = known[names[0]].n, known[names[0]].m
        if ranks[site] > min(n, m):
            name, r = names[0], ranks[site]
            raise InputError(f"{file}: {name} has rank {r}, above the smaller side of its {n} x {m} kernel")
        same = len({*own_ranks.values()}) == len({*own_alphas.values()}) == 1
        alphas[site] = own_alphas[names[0]] if same else scale / scale_of(1, ranks[site], rslora)
        for name in names:
            ratio = scales[name] / scale
            scaled[name] = pairs[name] if ratio == 1 else pairs[name]._replace(b=pairs[name].b * np.float32(ratio))
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    method = lora(
        rank=rank,
        alpha=alpha,
        targets=_targets(members, known),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=rslora,
        rank_pattern={f"^{re.escape(site)}$": r for site, r in ranks.items() if r != rank} or None,
        alpha_pattern={f"^{re.escape(site)}$": x for site, x in alphas.items() if x != alpha} or None,
    )
    stacked = _stack(scaled, known, ranks)
    leaves = {
        f"{site}/lora/{leaf}": jnp.asarray(x) for site, ab in stacked.items() for leaf, x in zip("ab", ab, strict=True)
    }
    return method, leaves


def _targets(sites: Mapping[str, Any], known: Mapping[str, Module]) -> list[str]:
    """Names that choose these sites and no others: their last parts if that is enough."""
    leaves = {site.rsplit("/", 1)[-1] for site in sites}
    same = {module.site for module in known.values() if module.site.rsplit("/", 1)[-1] in leaves}
    return sorted(leaves if same == set(sites) else sites)


def _alpha(file: Path, config: Mapping[str, Any], name: str) -> float:
    """lora_alpha, or that of the first pattern which PEFT finds at the end of a module's name."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return float(value)
        except re.error as error:
            raise InputError(f"{file}: alpha_pattern {pattern!r}: not a regular expression ({error})") from None
    return float(config.get("lora_alpha", 8))


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


# Our form.


def _as_it_is(folder: Path, own: Mapping[str, Any] | None) -> tuple[Method, tree.Flat]:
    """An adapter in our form: tensors by our paths, in their own types."""
    if own is None:
        raise InputError(f"{folder}: is an adapter in jaxpeft's own form without a {OWN} that speaks of its {WEIGHTS}")
    try:
        method = from_specs(tuple(Spec(name, config) for name, config in own["method"]))
    except InputError as error:
        raise InputError(f"{folder / OWN}: {error}") from None
    return method, {path: jnp.asarray(tensor) for path, tensor in _tensors(folder / WEIGHTS).items()}


def _restore(
    file: Path, own: Mapping[str, Any], pairs: Mapping[str, _Pair], known: Mapping[str, Module]
) -> tuple[Method, tree.Flat]:
    """An adapter of ours as the method that it was."""
    specs = tuple(Spec(name, config) for name, config in own["method"])
    method = from_specs(specs)
    try:
        spec, code = next((s, code) for s in specs if hasattr(code := method_file(s.name), "PEFT_SCOPE"))
        leaves = {}
        for site, (a, b) in _stack(pairs, known, own["ranks"]).items():
            made = code.peft_leaves(spec.config, jnp.asarray(a), jnp.asarray(b), own["extra"].get(site, {}))
            leaves.update({f"{site}/{code.PEFT_SCOPE}/{name}": leaf for name, leaf in made.items()})
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return method, leaves
