"""Whether an adapter can train at all: what of the loss's gradient depends on the loss, seen on the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Objective
from jaxpeft.model import Batch
from jaxpeft.sites import kernel_path


def unreached(loss: Callable[[tree.Flat], jax.Array], leaves: tree.Flat) -> list[str]:
    """The leaves whose gradient is zero whatever the loss is: unused, or behind a `stop_gradient`. Nothing is computed.

    A gradient that only happens to be zero, as that of LoRA's A at B = 0, is not of these.
    """

    def pull(seed, leaves):
        value, vjp = jax.vjp(loss, leaves)
        return vjp(seed.astype(value.dtype))[0]

    jaxpr = jax.make_jaxpr(pull)(jnp.ones(()), leaves).jaxpr
    of_leaf = [[i == place for i in range(len(leaves))] for place in range(len(leaves))]
    used = [partial_eval.dce_jaxpr(jaxpr, outputs)[1][0] for outputs in of_leaf]
    return [path for path, use in zip(sorted(leaves), used, strict=True) if not use]


def check_reached(
    method: Method, objective: Objective, trained: tree.Flat, rest: tree.Flat, batch: Batch, key: jax.Array
) -> None:
    """Refuses adapters whose output never reaches the loss: they would train without effect.

    Raises:
      InputError: with the sites' names.
    """
    known = {**rest, **trained}
    scopes = {spec.name for spec in method.specs}
    at_site = {path for path in trained if kernel_path(known, _site(path)) in known}
    adapters = {path: leaf for path, leaf in trained.items() if path in at_site or path.partition("/")[0] in scopes}
    if not (adapters and objective.backward):
        return
    others: dict[str, Any] = {path: leaf for path, leaf in trained.items() if path not in adapters}
    loss = lambda leaves: objective.value({**others, **leaves}, rest, batch, key)[0]
    if dead := sorted({_site(path) if path in at_site else path for path in unreached(loss, adapters)}):
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        raise InputError(
            f"{method.name}: the loss does not depend on {', '.join(dead[:3])}{more} by anything that can be "
            "differentiated; leave them out of targets"
        )


def _site(path: str) -> str:
    """The site whose adapter has this leaf."""
    return "/".join(path.split("/")[:-2])
