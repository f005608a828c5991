"""PEFT's form of a method: the constant `PEFT` in its file, by which `export` and `read` know it.

A form says which of PEFT's tensors hold the method's leaves, and turns the factory's arguments into adapter_config.json
and back. Three functions make one:

    lora_pairs   per site lora_A, lora_B and perhaps more (a magnitude): the LORA family
    vectors      per site one vector over the outputs or the inputs: IA3
    per_model    a few tensors of the whole model: PREFIX_TUNING, PROMPT_TUNING

and `per_site` is what the first two are made of. Methods may share a peft_type: `when` tells them apart.

    PEFT = form.lora_pairs(
        "dora",                                                            # the scope: <site>/dora/<leaf>
        scale=lambda config, site: config["alpha"] / config["rank"],
        tensors={"magnitude": form.Tensor("lora_magnitude_vector", "m")},  # beside a and b
        fill={"magnitude": lambda kernel: np.linalg.norm(kernel, axis=0)},
        fields=lambda config: {"use_dora": True},
        when={"use_dora": True},
    )

Users' mistakes are `InputError`s without the file's name, which the callers put in front.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpeft import method as methods
from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.peft.base import Module, modules

Fields = Mapping[str, Any]  # of adapter_config.json
Config = Mapping[str, Any]  # of a `Spec`: the factory's arguments
Tensors = Mapping[str, np.ndarray]
Leaves = dict[str, Any]
Fill = float | Callable[[np.ndarray], np.ndarray]
ALWAYS: Mapping[str, Any] = {}  # for `when`
ToTensors = Callable[[Config, Mapping[str, Any], Module], Mapping[str, Any]]
FromTensors = Callable[[Config, Leaves, Mapping[str, Any]], Leaves]


class Base(NamedTuple):
    """The model that an adapter is for: its configuration, its linear modules by name, its flat parameters if known."""

    config: Any
    modules: Mapping[str, Module]
    params: tree.Flat | None = None

    def kernel(self, name: str) -> np.ndarray:
        """A module's kernel (n, m), float32.

        Raises:
          InputError: if the base's parameters are not known.
        """
        if self.params is None:
            raise InputError(f"{name} is read with the base's kernel; give the base's parameters too")
        site, layer, _, _ = self.modules[name]
        kernel = self.params[f"{site}/kernel"]
        return np.asarray(kernel if layer is None else kernel[layer], np.float32)


def base_of(config: Any, params: Mapping[str, Any] | None = None) -> Base:
    """The base of a configuration and, if they are at hand, nested parameters."""
    return Base(config, modules(config), None if params is None else tree.flatten(params))


class Tensor(NamedTuple):
    """A tensor of PEFT's at a module.

    suffix: its name after the module's, such as "lora_A.weight".
    axes: one letter each, in PEFT's order: n the module's inputs, m its outputs, 1 an axis of one, r a rank that the
      tensors of a module share. The leaf has the axes in reverse, without those of one.
    """

    suffix: str
    axes: str


class Written(NamedTuple):
    """What a form writes: tensors by their names in the file, fields of adapter_config.json, facts of jaxpeft.json."""

    tensors: dict[str, np.ndarray]
    fields: dict[str, Any]
    facts: dict[str, Any]


class Form(NamedTuple):
    """PEFT's form of a method; made by the functions below.

    type: PEFT's peft_type.
    scope: the scope of the method's leaves; the form owns the paths with /scope/ in them.
    write: (config, leaves {path: leaf}, base) -> Written.
    parse: (tensors, base) -> parts, checked against the base: {module: {leaf: array}}, or {name: tensor} per model.
    read: (fields, parts, base) -> (arguments of the factory, parts as they mean it).
    restore: (config, parts, facts, base) -> leaves {path: leaf}; facts are {} for what PEFT wrote.
    check: refuses values of the fields that `read` knows.
    fields: the fields of adapter_config.json that are read, or that do not say what the adapter computes.
    when: the values that fields must have for this method to be the one that is read, among those of its type; the
      method with most of them is taken. ALWAYS: any values; None: it is not read without our jaxpeft.json.
    facts: the facts that `restore` needs.
    """

    type: str
    scope: str
    write: Callable[[Config, tree.Flat, Base], Written]
    parse: Callable[[Tensors, Base], dict[str, Any]]
    read: Callable[[Fields, dict[str, Any], Base], tuple[dict[str, Any], dict[str, Any]]]
    restore: Callable[[Config, dict[str, Any], Mapping[str, Any], Base], tree.Flat]
    check: Callable[[Fields], None]
    fields: frozenset[str]
    when: Mapping[str, Any] | None
    facts: tuple[str, ...] = ()

    def owns(self, path: str) -> bool:
        """Whether a leaf is of the method."""
        return f"/{self.scope}/" in f"/{path}"


def form_of(name: str) -> Form | None:
    """The form that a method's file states, if it does."""
    return methods.about(name).peft


def method_for(fields: Fields) -> tuple[str, Form]:
    """The method that PEFT's adapter_config.json describes.

    Raises:
      InputError: if there is none for its peft_type, with the types that there are.
    """
    forms = {name: form for name in methods.names() if (form := form_of(name)) and form.when is not None}
    same = {name: form for name, form in forms.items() if form.type == fields.get("peft_type")}
    if not same:
        types = ", ".join(sorted({repr(form.type) for form in forms.values()}))
        raise InputError(f"peft_type {fields.get('peft_type')!r} is not supported; supported: {types}")

    def fit(name):
        wanted = same[name].when or {}
        met = all(fields.get(field) == value for field, value in wanted.items())
        return len(wanted) if met else -len(wanted)

    name = max(same, key=fit)
    for field, value in (same[name].when or {}).items():
        if fields.get(field) != value:
            raise InputError(f"{field} {fields.get(field)!r} is not supported; supported: {value!r}")
    return name, same[name]


def _nothing(fields: Fields) -> None:
    del fields


# Per site.


class Part(NamedTuple):
    """A module's leaves as they are written, of the stacked site at `path`; rank: that of the site, 0 without one."""

    path: str
    rank: int
    leaves: dict[str, np.ndarray]


def per_site(
    type: str,
    scope: str,
    tensors: Mapping[str, Tensor],
    to_config: Callable[[Config, Mapping[str, Part], Base], dict[str, Any]],
    from_config: Callable[[Fields, dict[str, Any], Base], tuple[dict[str, Any], dict[str, Any]]],
    fields: Iterable[str],
    to_tensors: Callable[[Config, Mapping[str, Any], Module], Mapping[str, Any]] = lambda config, leaves, module: (
        leaves
    ),
    from_tensors: FromTensors = lambda config, leaves, extra: leaves,
    fill: Mapping[str, Fill] | None = None,
    extra: Sequence[str] = (),
    when: Mapping[str, Any] | None = ALWAYS,
    check: Callable[[Fields], None] = _nothing,
) -> Form:
    """The form of adapters at linear sites, whose layers are modules of PEFT's.

    A site's leaves are stacked and PEFT's modules may differ. So ranks are padded with zeros to the largest of the
    site, layers without an adapter are filled, and in writing trailing zeros of every axis r are left out; a module
    whose tensors all have that axis is left out with its last one.

    Args:
      type: PEFT's peft_type.
      scope: the scope of the leaves at a site.
      tensors: leaf -> tensor. Leaves of the same suffix are alternatives, told by their shapes.
      to_config: (config, parts by module, base) -> fields of adapter_config.json.
      from_config: (fields, {module: {leaf: array}}, base) -> (the factory's arguments, the same parts or changed ones).
      fields: see `Form`.
      to_tensors: (config, leaves of a site, one of its modules) -> the leaves in `tensors`; with the layer axis, where
        the site has one.
      from_tensors: (config, the leaves in `tensors`, the extra leaves as lists) -> leaves of a site: the inverse.
      fill: leaf -> what a layer without an adapter has: a number (default 0), or a function of its kernel (n, m).
      extra: leaves that the tensors don't hold (seeds), kept in jaxpeft.json.
      when: see `Form`.
      check: see `Form`.
    """
    ranked = any("r" in tensor.axes for tensor in tensors.values())

    def write(config, leaves, base):
        parts, kept = {}, {}
        first = {segment: start for segment, start, _ in tree.segments(tree.unflatten(leaves))}
        places = {(module.site, module.layer): name for name, module in base.modules.items()}
        for path, own in _by_site(leaves, scope).items():
            site, start = tree.canonical(path), first.get(path.split("/")[0])
            if (site, start) not in places:
                raise InputError(f"{path} is no linear site of this {base.config.model_type} configuration")
            made = to_tensors(config, own, base.modules[places[site, start]])
            arrays = {leaf: np.asarray(made[leaf], np.float32) for leaf in tensors if leaf in made}
            rank = max((_size(tensors[leaf], x, "r") for leaf, x in arrays.items()), default=0)
            rows = (
                [arrays]
                if start is None
                else [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)]
            )
            for row, whole in enumerate(rows):
                if one := _trimmed(whole, tensors):
                    parts[places[site, None if start is None else start + row]] = Part(path, rank, one)
            if own_extra := {leaf: np.asarray(own[leaf]).tolist() for leaf in extra if leaf in own}:
                kept[site] = own_extra
        if not parts:
            raise InputError("the parameters hold no adapter that is not zero")
        parts = {name: parts[name] for name in base.modules if name in parts}
        written = {
            f"base_model.model.{name}.{tensors[leaf].suffix}": _to_peft(x, tensors[leaf])
            for name, part in parts.items()
            for leaf, x in part.leaves.items()
        }
        facts: dict[str, Any] = {"extra": kept}
        if ranked:
            facts["ranks"] = {base.modules[name].site: part.rank for name, part in parts.items()}
        return Written(written, to_config(config, parts, base), facts)

    def restore(config, parts, facts, base):
        leaves = {}
        for site, own in _stacked(parts, tensors, fill or {}, facts.get("ranks", {}), base).items():
            made = from_tensors(config, own, facts.get("extra", {}).get(site, {}))
            leaves.update({f"{site}/{scope}/{leaf}": x for leaf, x in made.items()})
        return leaves

    return Form(
        type,
        scope,
        write,
        lambda found, base: _parse(found, tensors, base),
        from_config,
        restore,
        check,
        frozenset(fields),
        when,
        ("ranks", "extra") if ranked else ("extra",),
    )


def _by_site(leaves: tree.Flat, scope: str) -> dict[str, Leaves]:
    found: dict[str, Leaves] = {}
    for path, leaf in leaves.items():
        site, _, name = path.rpartition(f"/{scope}/")
        found.setdefault(site, {})[name] = leaf
    return found


def _axes(tensor: Tensor) -> str:
    """The axes of the leaf."""
    return tensor.axes.replace("1", "")[::-1]


def _size(tensor: Tensor, leaf: Any, letter: str) -> int:
    """The leaf's size along an axis, counted from the end (a layer axis is in front); 0 if it has no such axis."""
    axes = _axes(tensor)
    return leaf.shape[axes.index(letter) - len(axes)] if letter in axes else 0


def _to_peft(leaf: np.ndarray, tensor: Tensor) -> np.ndarray:
    """A leaf as PEFT's tensor: axes reversed, those of one put in."""
    ones = tuple(i for i, letter in enumerate(tensor.axes) if letter == "1")
    return np.ascontiguousarray(np.expand_dims(leaf.T, ones))


def _from_peft(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The inverse of `_to_peft`, float32."""
    ones = tuple(i for i, letter in enumerate(tensor.axes) if letter == "1")
    return array.squeeze(ones).T.astype(np.float32)


def _trimmed(leaves: dict[str, np.ndarray], tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Without trailing zeros along the rank, which can neither act nor learn; {} if nothing is left."""
    axes = {leaf: _axes(tensors[leaf]).find("r") for leaf in leaves}
    ranked = {leaf: np.moveaxis(leaves[leaf], axis, 0) for leaf, axis in axes.items() if axis >= 0}
    if not ranked:
        return leaves
    used = [np.flatnonzero(x.reshape(len(x), -1).any(axis=1)) for x in ranked.values()]
    rank = max(int(at[-1]) + 1 if len(at) else 0 for at in used)
    if rank == 0 and len(ranked) == len(leaves):
        return {}
    return {leaf: x if axes[leaf] < 0 else x.take(range(max(rank, 1)), axes[leaf]) for leaf, x in leaves.items()}


def _parse(found: Tensors, tensors: Mapping[str, Tensor], base: Base) -> dict[str, Any]:
    """Module name -> {leaf: array}, each checked against the base."""
    suffixes = list(dict.fromkeys(tensor.suffix for tensor in tensors.values()))
    stems = "|".join(re.escape(suffix.removesuffix(".weight")) for suffix in suffixes)
    pattern = re.compile(
        rf"(?:base_model\.model\.)?(?P<module>.+)\.(?P<stem>{stems})(?:\.(?P<adapter>(?!weight$)[^.]+))?(?P<end>\.weight)?"
    )
    parts: dict[str, dict[str, np.ndarray]] = {}
    ranks: dict[str, dict[str, int]] = {}
    adapters = set()
    for key, array in found.items():
        matched = pattern.fullmatch(key)
        suffix = matched["stem"] + (matched["end"] or "") if matched else ""
        if not matched or suffix not in suffixes:
            raise InputError(f"the tensor {key} is not supported; supported: <module>.{' and .'.join(suffixes)}")
        name = matched["module"]
        if name not in base.modules:
            raise InputError(
                f"an adapter for another base: it adapts {name}, which is no linear module of this one; "
                f"nearest: {tree.nearest(name, base.modules)}"
            )
        adapters.add(matched["adapter"])
        candidates = {leaf: tensor for leaf, tensor in tensors.items() if tensor.suffix == suffix}
        leaf = _leaf(key, array, candidates, name, base.modules[name])
        parts.setdefault(name, {})[leaf] = _from_peft(array, tensors[leaf])
        if rank := _size(tensors[leaf], parts[name][leaf], "r"):
            ranks.setdefault(name, {})[matched["stem"]] = rank
    if len(adapters) > 1:
        raise InputError(f"holds several adapters ({', '.join(sorted(map(str, adapters)))}); save one alone")
    if not parts:
        raise InputError("holds no adapter")
    for name, own in parts.items():
        if lacking := [suffix for suffix in suffixes if suffix not in {tensors[leaf].suffix for leaf in own}]:
            raise InputError(f"{name} has no {lacking[0]}")
        if len(set(ranks.get(name, {}).values())) > 1:
            differ = (f"{stem} of rank {rank}" for stem, rank in sorted(ranks[name].items()))
            raise InputError(f"{name} has {' and '.join(differ)}")
    return parts


def _leaf(key: str, array: np.ndarray, candidates: Mapping[str, Tensor], name: str, module: Module) -> str:
    """The leaf whose shape a tensor has."""
    sizes = {"n": module.n, "m": module.m, "1": 1}
    for leaf, (_, axes) in candidates.items():
        if array.ndim == len(axes) and all(
            sizes.get(letter, size) == size for letter, size in zip(axes, array.shape, strict=True)
        ):
            return leaf
    sides = {"n": f"{sizes['n']} inputs", "m": f"{sizes['m']} outputs"}
    named = {sides[letter]: None for _, axes in candidates.values() for letter in axes if letter in sides}
    raise InputError(
        f"an adapter for another base: {key} has shape {array.shape}, where {name} has {' and '.join(named)}"
    )


def _stacked(
    parts: Mapping[str, Mapping[str, np.ndarray]],
    tensors: Mapping[str, Tensor],
    fill: Mapping[str, Fill],
    ranks: Mapping[str, int],
    base: Base,
) -> dict[str, Leaves]:
    """Site -> {leaf: (L, ...)}, padded with zeros to the site's rank and filled where a layer has no adapter.

    Sites without layers have no layer axis. `ranks` may lack a site: its largest rank is taken.
    """
    layers: dict[str, list[str]] = {}
    for name, module in base.modules.items():
        layers.setdefault(module.site, []).append(name)
    found: dict[str, Leaves] = {}
    for site in dict.fromkeys(base.modules[name].site for name in parts):
        own = {name: parts[name] for name in layers[site] if name in parts}
        _, layer, n, m = base.modules[layers[site][0]]
        present = [_size(tensors[leaf], x, "r") for part in own.values() for leaf, x in part.items()]
        sizes = {"n": n, "m": m, "r": max(ranks.get(site, 0), *present, 0)}
        found[site] = {}
        for leaf in dict.fromkeys(leaf for part in own.values() for leaf in part):
            shape = tuple(sizes[letter] for letter in _axes(tensors[leaf]))
            rows = []
            for name in layers[site]:
                row = np.zeros(shape, np.float32)
                if name in own and leaf in own[name]:
                    x = own[name][leaf]
                    row[tuple(slice(size) for size in x.shape)] = x
                else:
                    neutral = fill.get(leaf, 0.0)
                    row[...] = neutral(base.kernel(name)) if callable(neutral) else neutral
                rows.append(row)
            found[site][leaf] = jnp.asarray(rows[0] if layer is None else np.stack(rows))
    return found


def sites_as_targets(sites: Iterable[str], base: Base) -> list[str]:
    """Names that choose these sites and no others, for a factory's `targets`: their last parts if that is enough."""
    sites = set(sites)
    last = {site.rsplit("/", 1)[-1] for site in sites}
    same = {module.site for module in base.modules.values() if module.site.rsplit("/", 1)[-1] in last}
    return sorted(last if same == sites else sites)


def last_names_suffice(names: Iterable[str], base: Base) -> bool:
    """Whether the last parts of these modules' names are those of no other module."""
    names = set(names)
    last = {name.rsplit(".", 1)[-1] for name in names}
    return {name for name in base.modules if name.rsplit(".", 1)[-1] in last} == names


def as_target_modules(names: Iterable[str], base: Base) -> list[str]:
    """PEFT's target_modules: names that choose these modules and no others."""
    names = list(names)
    return sorted({name.rsplit(".", 1)[-1] for name in names}) if last_names_suffice(names, base) else names


# The LORA family.

_PAIR = {"a": Tensor("lora_A.weight", "rn"), "b": Tensor("lora_B.weight", "mr")}
_LORA_FIELDS = (
    "r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora init_lora_weights bias "
    "target_modules exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config "
    "ensure_weight_tying"
).split()
# Initialisations that leave the base's kernels as they are.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def lora_pairs(
    scope: str,
    scale: Callable[[Config, str], float],
    tensors: Mapping[str, Tensor] | None = None,
    fields: Callable[[Config], dict[str, Any]] = lambda config: {},
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: arguments,
    to_tensors: Callable[[Config, Mapping[str, Any], Module], Mapping[str, Any]] = lambda config, leaves, module: (
        leaves
    ),
    from_tensors: FromTensors = lambda config, leaves, extra: leaves,
    fill: Mapping[str, Fill] | None = None,
    extra: Sequence[str] = (),
    when: Mapping[str, Any] | None = ALWAYS,
) -> Form:
    """The form of x A B: leaves `a` (n, r), `b` (r, m) at a site, and perhaps more; peft_type LORA.

    Ranks and scales become PEFT's r and lora_alpha, with patterns where modules differ. In reading, layers of a site
    share one scale: the commonest, and the rest is folded into B.

    Args:
      scope: see `per_site`.
      scale: (config, site) -> the factor of A B.
      tensors: leaf -> tensor, beside a and b.
      fields: config -> fields of adapter_config.json that are not the default; "use_rslora" and "lora_dropout" if the
        method has them.
      arguments: the factory's from {rank, alpha, targets, dropout, rslora, rank_pattern, alpha_pattern}, which
        `jaxpeft.lora` takes.
      to_tensors, from_tensors, fill, extra, when: see `per_site`.
    """

    def to_config(config, parts, base):
        own = {"use_rslora": False, "use_dora": False, "lora_dropout": 0.0, **fields(config)}
        ranks = {name: part.leaves["b"].shape[0] for name, part in parts.items()}
        alphas = {
            name: _tidy(scale(config, part.path) * _divisor(ranks[name], own["use_rslora"]))
            for name, part in parts.items()
        }
        short = last_names_suffice(parts, base)
        rank, alpha = commonest(ranks.values()), commonest(alphas.values())
        return {
            "alpha_pattern": _pattern(alphas, alpha, short),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": alpha,
            "r": rank,
            "rank_pattern": _pattern(ranks, rank, short),
            "target_modules": as_target_modules(parts, base),
            **own,
        }

    def from_config(found, parts, base):
        rslora = bool(found.get("use_rslora"))
        members: dict[str, list[str]] = {}
        for name in parts:
            members.setdefault(base.modules[name].site, []).append(name)
        ranks, alphas, scaled = {}, {}, dict(parts)
        for site, names in members.items():
            own_ranks = {name: parts[name]["a"].shape[1] for name in names}
            own_alphas = {name: _alpha(found, name) for name in names}
            scales = {name: own_alphas[name] / _divisor(own_ranks[name], rslora) for name in names}
            ranks[site], common = max(own_ranks.values()), commonest(scales.values())
            _, _, n, m = base.modules[names[0]]
            if ranks[site] > min(n, m):
                raise InputError(f"{names[0]} has rank {ranks[site]}, above the smaller side of its {n} x {m} kernel")
            same = len({*own_ranks.values()}) == len({*own_alphas.values()}) == 1
            alphas[site] = own_alphas[names[0]] if same else common / (1 / _divisor(ranks[site], rslora))
            for name in names:
                if (ratio := scales[name] / common) != 1:
                    scaled[name] = {**parts[name], "b": parts[name]["b"] * np.float32(ratio)}
        rank, alpha = commonest(ranks.values()), commonest(alphas.values())
        made = {
            "rank": rank,
            "alpha": alpha,
            "targets": sites_as_targets(members, base),
            "dropout": float(found.get("lora_dropout") or 0.0),
            "rslora": rslora,
            "rank_pattern": {f"^{re.escape(site)}$": r for site, r in ranks.items() if r != rank} or None,
            "alpha_pattern": {f"^{re.escape(site)}$": x for site, x in alphas.items() if x != alpha} or None,
        }
        return arguments(made), scaled

    return per_site(
        "LORA",
        scope,
        {**_PAIR, **(tensors or {})},
        to_config,
        from_config,
        _LORA_FIELDS,
        to_tensors,
        from_tensors,
        fill,
        extra,
        when,
        _check_lora,
    )


def _check_lora(fields: Fields) -> None:
    """Refuses what changes biases or kernels."""
    if (bias := fields.get("bias", "none")) != "none":
        raise InputError(f"bias {bias!r} is not supported; supported: 'none'")
    init = fields.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _INITS):
        raise InputError(
            f"init_lora_weights {init!r} changes the base's kernels; save the adapter for the original base "
            "with PEFT's save_pretrained(directory, path_initial_model_for_weight_conversion=...)"
        )


def _divisor(rank: int, rslora: bool) -> float:
    """alpha over the scale."""
    return math.sqrt(rank) if rslora else rank


def _alpha(fields: Fields, name: str) -> float:
    """lora_alpha, or that of the first pattern which PEFT finds at the end of a module's name."""
    for pattern, value in (fields.get("alpha_pattern") or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return float(value)
        except re.error as error:
            raise InputError(f"alpha_pattern {pattern!r}: not a regular expression ({error})") from None
    return float(fields.get("lora_alpha", 8))


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


def commonest(values: Iterable[Any]) -> Any:
    """The value that occurs most often, the first of several."""
    return Counter(values).most_common(1)[0][0]


# Vectors.


def vectors(
    type: str,
    scope: str,
    suffix: str,
    arguments: Callable[[list[str], list[str]], dict[str, Any]],
    outputs: str = "out",
    inputs: str = "in",
    when: Mapping[str, Any] | None = ALWAYS,
) -> Form:
    """The form of one vector at a site, over its outputs or over its inputs, as PEFT's IA3 has them.

    A layer without one gets ones, which compute the same; they train, where PEFT has nothing to train.

    Args:
      type: PEFT's peft_type.
      scope: see `per_site`.
      suffix: the tensor's name at a module; (m, 1) over the outputs, (1, n) over the inputs.
      arguments: (targets of all sites, targets of those with a vector over their inputs) -> the factory's arguments.
      outputs, inputs: the leaves (m,) and (n,); a site has one of them.
      when: see `Form`.
    """

    def to_config(config, parts, base):
        del config
        feed = [name for name, part in parts.items() if inputs in part.leaves]
        last = tuple(name.rsplit(".", 1)[-1] for name in feed)
        short = last_names_suffice(parts, base) and not any(
            name.endswith(last) for name, part in parts.items() if outputs in part.leaves
        )
        names = (lambda found: sorted({name.rsplit(".", 1)[-1] for name in found})) if short else list
        return {
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "feedforward_modules": names(feed),
            "init_ia3_weights": True,
            "target_modules": names(parts),
        }

    def from_config(fields, parts, base):
        del fields
        sites = {base.modules[name].site: leaf for name, part in parts.items() for leaf in part}
        for name, part in parts.items():
            if sites[base.modules[name].site] not in part:
                raise InputError(f"{name} scales its {'inputs' if inputs in part else 'outputs'}, other layers do not")
        feed = [site for site, leaf in sites.items() if leaf == inputs]
        return arguments(sites_as_targets(sites, base), sites_as_targets(feed, base)), parts

    return per_site(
        type,
        scope,
        {outputs: Tensor(suffix, "m1"), inputs: Tensor(suffix, "1n")},
        to_config,
        from_config,
        ("target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights"),
        fill={outputs: 1.0, inputs: 1.0},
        when=when,
    )


# Per model.


def per_model(
    type: str,
    scope: str,
    names: Sequence[str],
    to_tensors: Callable[[Config, tree.Flat, Base], Mapping[str, Any]],
    from_tensors: Callable[[Config, Tensors, Base], tree.Flat],
    to_config: Callable[[Config, Tensors, Base], dict[str, Any]],
    from_config: Callable[[Fields, Tensors, Base], dict[str, Any]],
    fields: Iterable[str] = (),
    when: Mapping[str, Any] | None = ALWAYS,
    check: Callable[[Fields], None] = _nothing,
) -> Form:
    """The form of a method whose tensors are of the whole model (prompts, prefixes).

    Args:
      type: PEFT's peft_type.
      scope: the scope of the leaves, anywhere in their paths.
      names: the tensors' names; all must be there.
      to_tensors: (config, leaves {path: leaf}, base) -> {name: tensor}.
      from_tensors: (config, {name: tensor float32}, base) -> leaves {path: leaf}: the inverse.
      to_config: (config, {name: tensor}, base) -> fields of adapter_config.json.
      from_config: (fields, {name: tensor}, base) -> the factory's arguments; refuses tensors that don't fit the base.
      fields, when, check: see `Form`.
    """

    def write(config, leaves, base):
        tensors = {name: np.asarray(x, np.float32, order="C") for name, x in to_tensors(config, leaves, base).items()}
        return Written(tensors, to_config(config, tensors, base), {})

    def parse(tensors, base):
        del base
        for name in tensors:
            if name not in names:
                raise InputError(f"the tensor {name} is not supported; supported: {', '.join(names)}")
        if lacking := [name for name in names if name not in tensors]:
            raise InputError(f"has no {lacking[0]}")
        return {name: tensors[name].astype(np.float32) for name in names}

    def read(found, parts, base):
        return from_config(found, parts, base), parts

    def restore(config, parts, facts, base):
        del facts
        return {path: jnp.asarray(leaf) for path, leaf in from_tensors(config, parts, base).items()}

    return Form(type, scope, write, parse, read, restore, check, frozenset(fields), when)


def to_keys_values(prompt: Any, layers: int) -> tuple[Any, Any]:
    """A prefix as PEFT keeps it (p, L 2 d_kv) -> keys and values (L, p, d_kv) as a cache holds them (keys rotated).

    Raises:
      InputError: if its columns are not those of 2 L equal parts.
    """
    p, width = prompt.shape
    if width % (2 * layers):
        raise InputError(
            f"an adapter for another base: {width} numbers per token are not keys and values of {layers} layers"
        )
    parts = prompt.reshape(p, layers, 2, width // (2 * layers))
    return parts[:, :, 0].swapaxes(0, 1), parts[:, :, 1].swapaxes(0, 1)


def from_keys_values(keys: Any, values: Any) -> np.ndarray:
    """The inverse of `to_keys_values`."""
    parts = np.stack([np.asarray(keys), np.asarray(values)], axis=2)  # (L, p, 2, d)
    return parts.swapaxes(0, 1).reshape(parts.shape[1], -1)
