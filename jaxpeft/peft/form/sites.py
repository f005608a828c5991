"""Forms of adapters at linear sites, whose layers are modules of PEFT's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.peft.base import Module
from jaxpeft.peft.form.kinds import (
    ALWAYS,
    Base,
    Config,
    Fields,
    Fill,
    Form,
    FromTensors,
    Leaves,
    Tensor,
    Tensors,
    Written,
    refuse_nothing,
)


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
    check: Callable[[Fields], None] = refuse_nothing,
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
        segments = [] if base.foreign else tree.segments(tree.unflatten(leaves))
        first = {segment: start for segment, start, _ in segments}
        places = {(module.site, module.layer): name for name, module in base.modules.items()}
        for path, own in _by_site(leaves, scope).items():
            site, start = tree.canonical(path), first.get(path.split("/")[0])
            if base.foreign:
                site, start = path, 0 if (path, 0) in places else None
            if base.foreign and (site, start) not in places:
                raise InputError(f"{path} has no name for PEFT; named are {', '.join(sorted({s for s, _ in places}))}")
            if (site, start) not in places:
                raise InputError(f"{path} is no linear site of this {base.config.model_type} configuration")
            made = to_tensors(config, own, base.modules[places[site, start]])
            arrays = {leaf: np.asarray(made[leaf], tensors[leaf].dtype) for leaf in tensors if leaf in made}
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
        tuple(f".{tensor.suffix}" for tensor in tensors.values() if tensor.dtype == np.int32),
        modules=lambda base: base.modules,
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
        if 0 in array.shape:
            raise InputError(f"{key} has shape {array.shape}: a rank of 0")
        if rank := _size(tensors[leaf], parts[name][leaf], "r"):
            ranks.setdefault(name, {})[matched["stem"]] = rank
    if len(adapters) > 1:
        raise InputError(f"holds several adapters ({', '.join(sorted(map(str, adapters)))}); save one alone")
    if not parts:
        raise InputError("holds no adapter")
    for name, own in parts.items():
        _check_whole(name, own, tensors)
        if len(set(ranks.get(name, {}).values())) > 1:
            differ = (f"{stem} of rank {rank}" for stem, rank in sorted(ranks[name].items()))
            raise InputError(f"{name} has {' and '.join(differ)}")
    return parts


def _check_whole(name: str, own: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuses leaves of a module that are not each of its tensors, or in place of one all those that may be."""
    there = {tensors[leaf].suffix for leaf in own}
    for leaf, tensor in tensors.items():
        others = [other.suffix for other in tensors.values() if other.instead == leaf]
        found = [suffix for suffix in others if suffix in there]
        if found and tensor.suffix in there:
            raise InputError(f"{name} has {tensor.suffix} and {found[0]}, which stands in its place")
        lacking = [suffix for suffix in (others if found else [tensor.suffix]) if suffix not in there]
        if lacking and not tensor.instead:
            raise InputError(f"{name} has no {lacking[0]}")


def _leaf(key: str, array: np.ndarray, candidates: Mapping[str, Tensor], name: str, module: Module) -> str:
    """The leaf whose shape a tensor has."""
    sizes = {"n": module.n, "m": module.m, "1": 1}
    for leaf, tensor in candidates.items():
        axes = tensor.axes
        if array.ndim == len(axes) and all(
            sizes.get(letter, size) == size for letter, size in zip(axes, array.shape, strict=True)
        ):
            return leaf
    sides = {"n": f"{sizes['n']} inputs", "m": f"{sizes['m']} outputs"}
    named = {sides[letter]: None for tensor in candidates.values() for letter in tensor.axes if letter in sides}
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
        sizes = _own_sizes(own, tensors) | {"n": n, "m": m, "r": max(ranks.get(site, 0), *present, 0)}
        if ranks.get(site, 0) > min(n, m):
            raise InputError(f"ranks: {site} has {ranks[site]}, above the smaller side of its {n} x {m} kernel")
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


def _own_sizes(parts: Mapping[str, Mapping[str, np.ndarray]], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes along the tensors' other axes, of which a site's modules have the same.

    Raises:
      InputError: if two of them differ.
    """
    sizes: dict[str, int] = {}
    for name, part in parts.items():
        for leaf, x in part.items():
            for letter, size in zip(_axes(tensors[leaf]), x.shape, strict=True):
                if letter not in "nmr" and sizes.setdefault(letter, size) != size:
                    raise InputError(f"{name} has {tensors[leaf].suffix} of another shape than other layers have")
    return sizes


def sites_as_targets(sites: Iterable[str], base: Base) -> list[str]:
    """Names that choose these sites and no others, for a factory's `targets`: their last parts if that is enough."""
    sites = set(sites)
    if base.foreign:  # it may have others than those that are named
        return sorted(sites)
    last = {site.rsplit("/", 1)[-1] for site in sites}
    same = {module.site for module in base.modules.values() if module.site.rsplit("/", 1)[-1] in last}
    return sorted(last if same == sites else sites)


def last_names_suffice(names: Iterable[str], base: Base) -> bool:
    """Whether the last parts of these modules' names are those of no other module."""
    names = set(names)
    if base.foreign:  # there may be others than those that were given
        return False
    last = {name.rsplit(".", 1)[-1] for name in names}
    return {name for name in base.modules if name.rsplit(".", 1)[-1] in last} == names


def as_target_modules(names: Iterable[str], base: Base) -> list[str]:
    """PEFT's target_modules: names that choose these modules and no others."""
    names = list(names)
    return sorted({name.rsplit(".", 1)[-1] for name in names}) if last_names_suffice(names, base) else names


def commonest(values: Iterable[Any]) -> Any:
    """The value that occurs most often, the first of several."""
    return Counter(values).most_common(1)[0][0]
