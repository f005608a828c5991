"""The base of a run: loaded as the method stores it, and told from another by what the checkpoint holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxpeft import hf, tree
from jaxpeft.errors import InputError
from jaxpeft.hf.read import Placement
from jaxpeft.method import Method
from jaxpeft.model import Model
from jaxpeft.train import config

Convert = Callable[[tree.Params], Mapping[str, Callable[[jax.Array], Any]]]


def load(
    path_or_hub_id: str,
    dtype: Any,
    method: Method | None = None,
    labels: Sequence[str] = (),
    key: jax.Array | None = None,
    rope_scaling: str | None = None,
    placement: Placement | None = None,
) -> tuple[Model, tree.Params, str]:
    """A checkpoint's model; what the method packs is packed while it is read.

    Args:
      path_or_hub_id, dtype, labels, key, rope_scaling, placement: as `hf.load_pretrained` takes them.
      method: that is going to be put on it; None: nothing is packed.

    Returns:
      (Model, nested parameters, `config.digest_of_base` of them as they were before they were packed).

    Raises:
      InputError: for what cannot be loaded, or not be packed as the method wants it.
    """
    sums: dict[str, jax.Array] = {}
    convert = None if method is None else _watched(method, sums)
    model, params = hf.load_pretrained(path_or_hub_id, dtype, labels, key, convert, rope_scaling, placement)
    return model, params, config.digest_of_base(params, sums)


def _watched(method: Method, sums: dict[str, jax.Array]) -> Convert:
    """The conversions, each of which adds up in `sums` what the digest takes of its leaf, layer by layer."""

    def watch(path, conversion):
        layers = itertools.count()

        def one(array):
            whole = array[None] if tree.stacked(path) else array
            sums[path] = sums.get(path, 0) + config.checksum(whole, next(layers))
            return conversion(array)

        return one

    def convert(shapes):
        found = method.convert(shapes)
        if away := next((path for path in found if method.role(path).host), None):
            raise InputError(f"{method.name}: {away} would be quantized, and moves in the host's memory; leave one out")
        return {path: watch(path, conversion) for path, conversion in found.items()}

    return convert
