"""The form of whole norms: LN tuning."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft import models, tree
from jaxpeft.errors import InputError
from jaxpeft.peft.base import shapes_of
from jaxpeft.peft.form.kinds import Base, Form, Written, refuse_nothing

_PARTS = {"scale": "weight", "bias": "bias"}


def norms(type: str, scope: str, stem: str, arguments: Callable[[str | list[str]], dict[str, Any]]) -> Form:
    """The form of a norm's own vectors, which stand in the place of the base's.

    A layer without one gets a copy of the base's, which computes the same; it trains, where PEFT has nothing to train.

    Args:
      type: PEFT's peft_type.
      scope: the leaves are <norm>/scope/scale and bias, (L, d), or (d,) beside the layers.
      stem: PEFT's name of the module's copy: its tensors are <module>.stem.weight and bias.
      arguments: "all", or names that the paths of the norms with one end with -> the factory's arguments.
    """
    wanted = re.compile(
        rf"(?:base_model\.model\.)?(?P<module>.+)\.{re.escape(stem)}(?:\.(?P<adapter>[^.]+))?\.(?P<part>weight|bias)"
    )

    def write(config, leaves, base):
        del config
        named, tensors, found = _named(base), {}, []
        for name, (norm, layer, _) in named.items():
            own = {leaf: leaves[path] for leaf in _PARTS if (path := f"{norm}/{scope}/{leaf}") in leaves}
            for leaf, x in own.items():
                x = np.asarray(x if layer is None else x[layer], np.float32, order="C")
                tensors[f"base_model.model.{name}.{stem}.{_PARTS[leaf]}"] = x
            found += [name] if own else []
        last = {name.rsplit(".", 1)[-1] for name in found}
        short = {name for name in named if name.rsplit(".", 1)[-1] in last} == set(found)
        return Written(tensors, {"exclude_modules": None, "target_modules": sorted(last) if short else found}, {})

    def parse(tensors, base):
        named = _named(base)
        parts: dict[str, dict[str, np.ndarray]] = {}
        adapters = set()
        for key, array in tensors.items():
            if not (matched := wanted.fullmatch(key)):
                raise InputError(f"the tensor {key} is not supported; supported: <module>.{stem}.weight and .bias")
            name, leaf = matched["module"], {"weight": "scale"}.get(matched["part"], "bias")
            if name not in named:
                raise InputError(
                    f"an adapter for another base: it adapts {name}, which is no norm of this one; "
                    f"nearest: {tree.nearest(name, named)}"
                )
            shape = named[name][2].get(leaf)
            if array.shape != shape:
                has = f"shape {shape}" if shape else "none"
                raise InputError(f"an adapter for another base: {key} has shape {array.shape}, where {name} has {has}")
            adapters.add(matched["adapter"])
            parts.setdefault(name, {})[leaf] = array.astype(np.float32)
        if len(adapters) > 1:
            raise InputError(f"holds several adapters ({', '.join(sorted(map(str, adapters)))}); save one alone")
        if not parts:
            raise InputError("holds no adapter")
        for name, own in parts.items():
            if lacking := [_PARTS[leaf] for leaf in named[name][2] if leaf not in own]:
                raise InputError(f"{name} has no {stem}.{lacking[0]}")
        return parts

    def read(fields, parts, base):
        del fields
        named = _named(base)
        chosen = {named[name][0] for name in parts}
        every = {norm for norm, _, _ in named.values()}
        last = {norm.rsplit("/", 1)[-1] for norm in chosen}
        short = {norm for norm in every if norm.rsplit("/", 1)[-1] in last} == chosen
        return arguments("all" if chosen == every else sorted(last if short else chosen)), parts

    def restore(config, parts, facts, base):
        del config, facts
        named, found = _named(base), {}
        chosen = {named[name][0] for name in parts}
        rows: dict[str, list[np.ndarray]] = {}
        for name, (norm, layer, own) in named.items():
            for leaf in own if norm in chosen else ():
                x = parts[name][leaf] if name in parts else _of_base(base, name, f"{norm}/{leaf}", layer)
                if layer is None:
                    found[f"{norm}/{scope}/{leaf}"] = jnp.asarray(x)
                else:
                    rows.setdefault(f"{norm}/{scope}/{leaf}", []).append(x)
        return found | {path: jnp.asarray(np.stack(layers)) for path, layers in rows.items()}

    fields = frozenset({"target_modules", "exclude_modules"})
    return Form(type, scope, write, parse, read, restore, refuse_nothing, fields, {}, modules=_named)


def _named(base: Base) -> dict[str, tuple[str, int | None, dict[str, tuple[int, ...]]]]:
    """Module name -> (norm's path, its layer, {leaf: shape}), in the order of the layers.

    Raises:
      InputError: for a model of no known family, whose norms have no names.
    """
    if base.foreign:
        raise InputError("PEFT's form of norms is for models of a known family; export without names=")
    found = {}
    shapes = shapes_of(base.config)
    for path, leaf in shapes.items():
        if not path.endswith("/scale"):
            continue
        norm = path.removesuffix("/scale")
        name = models.hf_name(base.config, path)[0].removesuffix(".weight")
        lead = int(tree.stacked(path))
        own = {part: shapes[f"{norm}/{part}"].shape[lead:] for part in _PARTS if f"{norm}/{part}" in shapes}
        for layer in range(leaf.shape[0]) if lead else (None,):
            found[name.format(i=layer)] = (norm, layer, own)
    return found


def _of_base(base: Base, name: str, path: str, layer: int | None) -> np.ndarray:
    """The base's own vector, float32."""
    if base.params is None:
        raise InputError(f"{name} has none, other layers do: it is read from the base; give the base's parameters too")
    leaf = base.params[path]
    return np.asarray(leaf if layer is None else leaf[layer], np.float32)
