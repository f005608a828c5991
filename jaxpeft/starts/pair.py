"""What a start is told of a site, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.quant import dense, like


class Sited(NamedTuple):
    """A site that gets an adapter: its path, the rank r and the factor s of A B."""

    path: str
    rank: int
    scale: float


class Pair(NamedTuple):
    """A (..., n, r) and B (..., r, m) float32; taken: the (A0, B0) of which s A0 B0 leaves the kernel, None without."""

    a: jax.Array
    b: jax.Array
    taken: tuple[jax.Array, jax.Array] | None = None


class Start(NamedTuple):
    """How factors start.

    pairs: (params, sites, view) -> {path of a site: Pair}; the parameters are those that the chain has come to.
    takes_out: whether the pairs have a part that is taken out of the kernel.
    kinds: what it is for besides linear maps, as of `sites.find`.
    """

    pairs: Callable[[tree.Params, Sequence[Sited], Any], dict[str, Pair]]
    takes_out: bool
    kinds: Collection[str] = ()


def left(kernel: Any, a: jax.Array, b: jax.Array, scale: float) -> Any:
    """W - s A B (..., n, m) of a kernel W, stored as it is."""
    return like(kernel, dense(kernel) - scale * jnp.matmul(a, b, precision="highest"))
