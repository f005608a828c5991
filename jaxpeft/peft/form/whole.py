"""The form of tensors of the whole model: prompts and prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.peft.form.kinds import (
    ALWAYS,
    Base,
    Config,
    Fields,
    Form,
    Tensors,
    Written,
    refuse_nothing,
)


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
    check: Callable[[Fields], None] = refuse_nothing,
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

    return Form(type, scope, write, parse, read, restore, check, frozenset(fields), when, root="base_model.")


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
