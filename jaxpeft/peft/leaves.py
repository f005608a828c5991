"""Whether an adapter's leaves are those of its method: asked before they are written, and where they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import models, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, about, setup
from jaxpeft.peft.base import Foreign, is_written, shapes_of

_CUT = re.compile(r"layers_(\d{1,9})_(\d{1,9})/")


def check_leaves(
    where: str,
    leaves: Mapping[str, Any],
    method: Method,
    config: Any,
    lacking: Callable[[str], bool] = lambda path: False,
    further: bool = False,
) -> None:
    """Refuses leaves that are not exactly those that the method adds to such a base: names, shapes and types.

    Args:
      where: they are, for the message.
      leaves: {path: array}, those that an adapter's file holds.
      method: that they should be of.
      config: of the base, or a `Foreign`.
      lacking: path -> whether it may be missing, as in PEFT's form, whose modules are those that the file names.
      further: whether others may be there: a prefix that PEFT has written has lost the network that made it.

    Raises:
      InputError: for the first leaf that the method lacks or has otherwise.
    """
    expected = _expected(leaves, method, config)
    for path, leaf in leaves.items():
        if path not in expected:
            if further:
                continue
            raise InputError(f"{where}: holds {path}, which is no part of {method.name} on such a base")
        if leaf.shape != expected[path].shape:
            raise InputError(
                f"{where}: {path} has shape {leaf.shape}, where {method.name} on such a base has {expected[path].shape}"
            )
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in (leaf, expected[path])]
        if floats[0] != floats[1] or not (floats[0] or leaf.dtype == expected[path].dtype):
            raise InputError(f"{where}: {path} is {leaf.dtype}, where {method.name} has {expected[path].dtype}")
    if missing := sorted(path for path in expected.keys() - leaves.keys() if not lacking(path)):
        raise InputError(f"{where}: lacks {missing[0]} of shape {expected[missing[0]].shape}, which {method.name} has")


def check_values(where: str, leaves: Mapping[str, Any], method: Method, config: Any) -> None:
    """Refuses integers that count places in a kernel and name one that it has not.

    Raises:
      InputError: for the first leaf with such a value.
    """
    kernels = shapes_of(config)
    if isinstance(config, Foreign):  # as sites have them: matrices
        kernels = tree.flatten(jax.eval_shape(config.model.adopt, tree.unflatten(kernels)))
    for path, leaf in leaves.items():
        most = _places(path, method, kernels)
        if most is not None and leaf.size and not (leaf.min() >= 0 and leaf.max() < most):
            strange = leaf.min() if leaf.min() < 0 else leaf.max()
            raise InputError(f"{where}: {path} holds {strange}, where {method.name} has 0 to {most - 1} on such a base")


def _expected(leaves: Mapping[str, Any], method: Method, config: Any) -> tree.Flat:
    """The shapes of what `setup` of the method adds to such a base, but for those that only values decide."""
    found = [] if isinstance(config, Foreign) else [_CUT.match(path) for path in leaves]
    cuts = {int(layer) for cut in found if cut for layer in cut.groups()}

    def added(key, params):
        for layer in sorted(cuts):  # where a function that no file can name had cut the stack
            params = tree.cut_layers(params, layer)
        _, trainable, rest = setup(method, base, params, key, batches=lambda: ())
        return {path: leaf for path, leaf in {**trainable, **rest}.items() if is_written(path, method, config)}

    base = config.model if isinstance(config, Foreign) else models.model_of(config)
    told = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.float32)
        for path, leaf in leaves.items()
        if any(about(spec.name).shaped(path) for spec in method.specs)
    }
    params = tree.unflatten({**shapes_of(config), **told})
    return jax.eval_shape(added, jax.eval_shape(lambda: jax.random.key(0)), params)


def _places(path: str, method: Method, base: Mapping[str, Any]) -> int | None:
    """The number below which a leaf's integers are; None where they count no places in a kernel."""
    for spec in method.specs:
        kernel = base.get(f"{path.partition(f'/{spec.name}/')[0]}/kernel")
        if kernel is not None and (most := about(spec.name).places(path, *kernel.shape[-2:])) is not None:
            return most
    return None
