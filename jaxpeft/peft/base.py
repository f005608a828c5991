"""The base that an adapter belongs to: its linear modules by name, and how to tell it from another; its labels."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import files, models, shares, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, about
from jaxpeft.model import Model
from jaxpeft.models import rotary
from jaxpeft.models.labels import SCOPE
from jaxpeft.peft.schema import OWN, WEIGHTS, adapter_config, own_document
from jaxpeft.quant import Folded, is_packed, unfolded_all

NATIVE = "JAXPEFT"  # the peft_type of what PEFT has no form for

SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
_SAMPLES = 64  # elements per leaf
_KERNELS = ("kernel", "embedding")  # what adapters of a model without a configuration may change before they train
_LAST = re.compile(r"\b(score|classifier|classifier\.out_proj)\.weight$")  # the tensor whose rows are the labels'


class Foreign(NamedTuple):
    """In place of a configuration: a model that has none.

    shapes: of its parameters, by path.
    names: {site: the module's name for PEFT}, with {i} for the layer where the site has layers.
    """

    model: Model
    shapes: tree.Flat
    names: Mapping[str, str] = MappingProxyType({})
    num_labels: int = 0
    head: str = ""


def config_of(base: Any, names: Mapping[str, str] = MappingProxyType({})) -> Any:
    """A configuration, of itself or of a model; of a model without one, a `Foreign` with these names.

    Raises:
      InputError: for a model that says nothing of its parameters, or what is neither; for names of one that has some.
    """
    if names and (not isinstance(base, Model) or (base.base or base).config is not None):
        raise InputError("names: a model of a known family has names of its own; leave them out")
    if not isinstance(base, Model):
        if base is None:
            raise InputError("an adapter's base is None; for a model without a configuration give the model itself")
        return base
    own = base.base or base
    if own.config is None and own.shapes is None:
        raise InputError("an adapter's base: the model has no configuration, and is not one of from_linen or from_nnx")
    return own.config if own.shapes is None else Foreign(own, own.shapes(), names)


def shapes_of(config: Any) -> tree.Flat:
    """{path: shape and dtype} of a base's own parameters."""
    return config.shapes if isinstance(config, Foreign) else models.FAMILIES[config.model_type].shapes(config)


def _sizes(config: Any) -> dict[str, Any]:
    """What a base's arrays can be told by: sizes of its configuration, or the shapes of a model without one."""
    if isinstance(config, Foreign):
        return {path: list(leaf.shape) for path, leaf in config.shapes.items()}
    return {name: getattr(config, name) for name in SIZES if hasattr(config, name)}


class Module(NamedTuple):
    """A linear module of the base: one layer of a site (`layer` None: the site has no layers), a kernel of n x m."""

    site: str
    layer: int | None
    n: int
    m: int


def modules(config: Any) -> dict[str, Module]:
    """Hugging Face module name -> module, in the order of the layers, for every kernel of the configuration."""
    if isinstance(config, Foreign):
        return _named(config)
    found = {}
    family = models.FAMILIES[config.model_type]
    for path, leaf in family.shapes(config).items():
        if not path.endswith("/kernel"):
            continue
        name, site = models.hf_name(config, path)[0].removesuffix(".weight"), path.removesuffix("/kernel")
        layers = range(leaf.shape[0]) if tree.stacked(path) else (None,)
        found.update({name.format(i=layer): Module(site, layer, *leaf.shape[-2:]) for layer in layers})
    return dict(sorted(found.items(), key=lambda item: (item[1].layer is None, item[1].layer or 0)))


def _named(config: Foreign) -> dict[str, Module]:
    """The same of a model of one's own, by the names that were given."""
    kept = tree.flatten(jax.eval_shape(config.model.adopt, tree.unflatten(config.shapes)))
    kernels = {path.removesuffix("/kernel"): leaf for path, leaf in kept.items() if path.endswith("/kernel")}
    found: dict[str, Module] = {}
    for site, name in config.names.items():
        if site not in kernels:
            raise InputError(f"names: {site!r} is no site of this model; nearest: {tree.nearest(site, kernels)}")
        kernel = kernels[site]
        if isinstance(kernel, Folded) and (kernel.kind or not kernel.inputs):
            raise InputError(f"names: {site!r} is {kernel.kind or 'no linear map'}; PEFT's form is of linear maps")
        *layers, n, m = kernel.shape
        if len(layers) > 1 or len(layers) != name.count("{i}"):
            wanted = "{i} once, for the layer" if layers else "no {i}, as it has no layers"
            raise InputError(
                f"names: {site!r} is called {name!r}, of a kernel {(*layers, n, m)}; it should have {wanted}"
            )
        for layer in range(layers[0]) if layers else (None,):
            own = name.replace("{i}", str(layer))
            if own in found:
                raise InputError(f"names: {site!r} is called {own!r}, as {found[own].site!r} is")
            found[own] = Module(site, layer, n, m)
    return dict(sorted(found.items(), key=lambda item: (item[1].layer is None, item[1].layer or 0)))


def fingerprint(config: Any, params: Mapping[str, Any], kernels: bool = True) -> dict[str, Any]:
    """What tells a base from another: its sizes, and for each leaf a hash of some of its elements.

    Elements are rounded to bfloat16 first, so that a base has one fingerprint whichever type it is loaded in. Leaves
    that are not among the configuration's parameters as it shapes them (adapters) are left out, and so are packed
    kernels, which are no longer the base's, and a classifier of rows, which comes with the adapter. The parts of a cut
    stack have the fingerprint of the whole one.

    Args:
      config: the model's configuration.
      params: nested parameters, adapters and all.
      kernels: False leaves the kernels out (they are not the base's own).
    """
    shapes = shapes_of(config)
    parts: dict[str, dict[int, Any]] = {}  # path -> {first row: leaf}
    for path, leaf in unfolded_all(tree.flatten(params)).items():
        whole = path if path in shapes else tree.canonical(path)
        known = whole in shapes and not is_packed(leaf) and is_own(path, config)
        if known and (kernels or path.rpartition("/")[2] not in _KERNELS[: 1 + isinstance(config, Foreign)]):
            first = 0 if whole == path else tree.segments({path.split("/")[0]: leaf})[0][1]
            parts.setdefault(whole, {})[first] = leaf
    samples = {}
    for path, of_path in parts.items():
        if (elements := _sampled(of_path, shapes[path].shape)) is not None:
            samples[path] = hashlib.sha256(elements.tobytes()).hexdigest()[:16]
    return {"sizes": _sizes(config), "samples": samples}


def _sampled(parts: Mapping[int, Any], shape: tuple[int, ...]) -> np.ndarray | None:
    """Elements at even places of a leaf, in bfloat16; None for an empty one, and if these are not its parts.

    parts: {first row: rows of the leaf}; the whole of it is {0: leaf}.
    """
    shape = shape or (1,)
    leaves = {first: jnp.atleast_1d(leaf) for first, leaf in parts.items() if hasattr(leaf, "shape")}
    rows = sum(leaf.shape[0] for leaf in leaves.values())
    if rows != shape[0] or any(leaf.shape[1:] != shape[1:] for leaf in leaves.values()) or 0 in shape:
        return None
    at = np.unravel_index(np.linspace(0, math.prod(shape) - 1, _SAMPLES).astype(np.int64), shape)
    found = np.zeros(_SAMPLES, jnp.bfloat16)
    for first, leaf in leaves.items():
        here = (at[0] >= first) & (at[0] < first + leaf.shape[0])
        index = (at[0][here] - first, *(axis[here] for axis in at[1:]))
        found[here] = shares.on_host(leaf[index]).astype(jnp.bfloat16)
    return found


def check_base(
    where: str,
    stored: Mapping[str, Any],
    config: Any,
    params: Mapping[str, Any] | None,
    what: str = "",
    needed: bool = False,
) -> None:
    """Compares a stored fingerprint with a base.

    Args:
      where: the adapter, for the message.
      stored: from `fingerprint`.
      config: the base's configuration.
      params: its parameters, or None to compare sizes only.
      what: in place of an adapter for another base, in words.
      needed: whether the adapter cannot be read without the document that holds the fingerprint.

    Raises:
      InputError: if the adapter is for another base, with the first difference.
    """
    here, words = _sizes(config), what or "an adapter for another base"
    for name, value in stored["sizes"].items():
        if (name in SIZES or isinstance(config, Foreign)) and here.get(name) != value:
            raise InputError(f"{where}: {words}: {name} is {here.get(name)} here, {value} there")
    found = fingerprint(config, params)["samples"] if params is not None else {}
    for path, digest in stored["samples"].items():
        if found.get(path, digest) != digest:
            if what:
                raise InputError(f"{where}: {words}: the values of {path} differ")
            advice = "" if needed else f" (remove its {OWN} to use it nevertheless)"
            raise InputError(f"{where}: {words}: the values of {path} differ from those it was trained beside{advice}")


def adapter_rope_scaling(directory: str | os.PathLike[str], given: str | None = None) -> str | None:
    """The scaling of rotary positions, KIND=FACTOR, that an adapter was trained with; None where it names none.

    Args:
      directory: of the adapter.
      given: by the user; it is right where the adapter names none.

    Raises:
      InputError: if that is another.
    """
    folder = files.expanded(directory)
    own = (own_document(folder) or {}).get("rope_scaling")
    if own is not None and given is not None and rotary.parse(own) != rotary.parse(given):
        raise InputError(f"--rope-scaling {given}: the adapter {directory} was trained with {own}")
    return given if own is None else own


def is_own(path: str, config: Any) -> bool:
    """Whether a path is one of the base's parameters; a classifier of rows is no part of it."""
    if isinstance(config, Foreign):
        return path in config.shapes
    return tree.canonical(path) in shapes_of(config) and not path.startswith(SCOPE)


def is_added(path: str, method: Method, config: Any) -> bool:
    """Whether a parameter belongs to the adapter, among which is a classifier that trains."""
    classifies = path.startswith(SCOPE) and not isinstance(config, Foreign)
    return method.changes(path) if classifies else not is_own(path, config)


def is_written(path: str, method: Method, config: Any) -> bool:
    """Whether an adapter's file holds a parameter: one of the adapter's that `setup` does not make again."""
    return is_added(path, method, config) and not any(about(spec.name).remade(path) for spec in method.specs)


def classifier_names(config: Any) -> dict[str, tuple[str, bool]]:
    """Our path -> (Hugging Face's tensor name, transposed there) of the classifier of rows; {} where there is none."""
    shapes = {} if isinstance(config, Foreign) else shapes_of(config)
    return {path: models.hf_name(config, path) for path in shapes if path.startswith(SCOPE)}


def adapter_labels(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names that an adapter's classifier gives to rows, in order; () for one that classifies none.

    An adapter of PEFT's does not say them: they are LABEL_0, LABEL_1, ... then, as transformers calls them.

    Raises:
      InputError: for a folder without an adapter, or files that cannot be read.
    """
    folder = files.expanded(directory)
    if adapter_config(folder).get("task_type") != "SEQ_CLS":
        return ()
    if named := (own_document(folder) or {}).get("labels"):
        return tuple(named)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as opened:
            found = [name for name in opened.keys() if _LAST.search(name)]  # noqa: SIM118
            count = opened.get_slice(found[0]).get_shape()[0] if found else 0
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read: {error}") from None
    return tuple(f"LABEL_{i}" for i in range(count))
