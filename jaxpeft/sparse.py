"""Sparse updates of kernels: y = x (W + S), where S[idx_t] = v_t at k entries and zero elsewhere.

idx (k,) int32 counts W's entries row after row; v (k,) is float32. Methods differ in how they choose idx. S is made
where it is read, in x's dtype, and again in the backward pass; its gradient is as large as a kernel, of which k
entries are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import sites, tree
from jaxpeft.errors import InputError
from jaxpeft.methods import shira as _shira
from jaxpeft.methods.lora import Targets
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged

LARGEST = 2**31 - 1  # entries that int32 tells apart


def ahead(step: jax.Array, begin: int, until: int) -> jax.Array:
    """(1 - t / (until - begin))^3 () float32, t the steps done between the two: what a cubic schedule has before it."""
    return (1 - jnp.clip((step - begin) / (until - begin), 0, 1)) ** 3


def product(
    x: jax.Array, index: jax.Array, values: jax.Array, shape: tuple[int, int], whole: jax.Array | None = None
) -> jax.Array:
    """x (S + whole) of entries `index` (k,) of a matrix row after row; S is made again in the backward pass."""

    def change(x, index, values, whole):
        added = _shira.sparse(pairs(index, shape[1]), values.astype(x.dtype), shape)
        return x @ (added if whole is None else added + whole)

    return jax.checkpoint(change, prevent_cse=False)(x, index, values, whole)


def pairs(index: jax.Array, m: int) -> jax.Array:
    """(..., 2): row and column of each entry (...) of a matrix of m columns."""
    return jnp.stack(jnp.divmod(index, m), axis=-1)


def flat_draw(key: jax.Array, n: int, m: int, count: int) -> jax.Array:
    """(count,) int32, different entries of an n x m matrix."""
    index = _shira.draw(key, n, m, count)
    return index[:, 0] * m + index[:, 1]


def entries(density: float, n: int, m: int) -> int:
    """k of a kernel."""
    return int(density * n * m)


def parameters(module: nn.Module, density: float, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(index (k,) int32, of entries drawn at random; values (k,) float32, zeros) of a kernel of this shape."""
    count = entries(density, *shape)
    index = module.param("index", lambda key: flat_draw(key, *shape, count))
    return index, module.param("values", nn.initializers.zeros, (count,))


def most(salience: jax.Array, count: int) -> jax.Array:
    """(..., count) int32: the entries of matrices (..., n, m) with the largest salience, ascending."""
    flat = salience.reshape(*salience.shape[:-2], -1)
    return jnp.sort(jax.lax.top_k(flat, count)[1].astype(jnp.int32), axis=-1)


def largest(scores: jax.Array, count: jax.Array) -> jax.Array:
    """Where a matrix (n, m) has its `count` () largest numbers; of equal ones the first, row after row.

    By bisection on the bits of the least of them: 32 counts, in place of the sorting of n m numbers.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(bits << 1, bits, 0)  # -0 is 0; as numbers, those below 2^-126 would equal it too
    keys = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))  # ordered as the numbers are

    def digit(place, least):
        higher = least | (jnp.uint32(1 << 31) >> place.astype(jnp.uint32))
        return jnp.where(jnp.sum(keys >= higher, dtype=jnp.int32) >= count, higher, least)

    least = jax.lax.fori_loop(0, 32, digit, jnp.uint32(0))
    ties = keys == least
    wanted = count - jnp.sum(keys > least, dtype=jnp.int32)
    of_row = jnp.sum(ties, axis=1, dtype=jnp.int32)
    before = jnp.cumsum(of_row) - of_row
    row = jnp.sum(before < wanted) - 1  # in which the last of them lies
    there = jnp.cumsum(jnp.take(ties, row, axis=0, mode="clip").astype(jnp.int32)) <= wanted - before[row]
    rows = jnp.arange(len(before))[:, None]
    return (keys > least) | ties & ((rows < row) | (rows == row) & there)


def check_density(name: str, density: float) -> None:
    """Raises InputError for a density outside (0, 0.5]."""
    if not 0 < density <= 0.5:
        raise InputError(f"{name}: density {density} must be above 0 and at most 0.5")


def check_size(name: str, site: str, n: int, m: int) -> None:
    """Raises InputError for a kernel (n, m) of more entries than int32 tells apart."""
    if n * m > LARGEST:
        raise InputError(f"{name}: {site}, a kernel of {n} x {m}, has more than {LARGEST} entries; leave it out")


def chosen_sites(name: str, targets: Targets, density: float, said: str = "") -> Callable[[tree.Params], list[str]]:
    """params -> the sites that `targets` names; `said` is how a user has asked for this density.

    Raises:
      InputError: when called, for targets that match nothing, a kernel of more entries than int32 tells apart, or one
        of which so small a share is none.
    """

    def choose(params):
        flat, found = tree.flatten(params), sites.find(params, targets, name)
        for site in found:
            n, m = flat[sites.kernel_path(flat, site)].shape[-2:]
            check_size(name, site, n, m)
            if entries(density, n, m) < 1:
                raise InputError(
                    f"{name}: {said or f'density {density}'} leaves {site} empty, a kernel of {n} x {m}: less than "
                    "one entry; leave it out"
                )
        return found

    return choose


def fold(params: Mapping[str, Any], name: str) -> tree.Params:
    """W <- W + S at every adapted site, whose leaves go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if f"/{name}/" not in f"/{path}"}
    for path, values in flat.items():
        if path.endswith(f"/{name}/values"):
            site = path.removesuffix(f"/{name}/values")
            kernel, index = merged[f"{site}/kernel"], flat[f"{site}/{name}/index"]
            add = tree.over(values.ndim - 1, lambda w, i, v: w.reshape(-1).at[i].add(v).reshape(w.shape))
            merged[f"{site}/kernel"] = as_merged(kernel, add(dense(kernel), index, values))
    return tree.unflatten(merged)
