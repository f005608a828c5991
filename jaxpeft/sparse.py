"""Sparse updates of kernels: y = x (W + S), where S[idx_t] = v_t at k entries and zero elsewhere.

idx (k,) int32 counts W's entries row after row; v (k,) is float32. Methods differ in how they choose idx. S is made
where it is read, in x's dtype, and again in the backward pass; its gradient is as large as a kernel, of which k
entries are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import sites, tree
from jaxpeft.errors import InputError
from jaxpeft.methods import shira as _shira
from jaxpeft.methods.lora import Targets
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged

LARGEST = 2**31 - 1  # entries that int32 tells apart


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
    return max(int(density * n * m), 1)


def check_density(name: str, density: float) -> None:
    """Raises InputError for a density outside (0, 0.5]."""
    if not 0 < density <= 0.5:
        raise InputError(f"{name}: density {density} must be above 0 and at most 0.5")


def chosen_sites(name: str, targets: Targets) -> Callable[[tree.Params], list[str]]:
    """params -> the sites that `targets` names.

    Raises:
      InputError: when called, for targets that match nothing, or a kernel of more entries than int32 tells apart.
    """

    def choose(params):
        flat, found = tree.flatten(params), sites.find(params, targets, name)
        for site in found:
            n, m = flat[sites.kernel_path(flat, site)].shape[-2:]
            if n * m > LARGEST:
                raise InputError(
                    f"{name}: {site}, a kernel of {n} x {m}, has more than {LARGEST} entries; leave it out"
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
            add = lambda w, i, v: w.reshape(-1).at[i].add(v).reshape(w.shape)
            add = jax.vmap(add) if values.ndim == 2 else add
            merged[f"{site}/kernel"] = as_merged(kernel, add(dense(kernel), index, values))
    return tree.unflatten(merged)
