"""Gradients in a few directions of each kernel: the directions, and kernels that take up what was learned in them.

With dW (n, m), n <= m, and P (n, r) of orthonormal columns: dR = P^T dW, and W takes up P R; where n > m, dR = dW P and
R P^T. Matrices may be stacked. For `galore`, `natural_galore` and `owlore`, whose leaves are `<site>/galore/p` and `r`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.method import Objective

OVERSAMPLING = 8


def _one_at_a_time(decompose: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A function of a matrix as one of matrices (..., n, m).

    A batched decomposition waits, on a processor, for threads of the pool that it runs in: as many of them at a time as
    there are threads, two on two cores, wait for ever (jaxlib 0.10.2, lapack's ParallelBatchMap).
    """

    def each(matrices: jax.Array) -> jax.Array:
        if matrices.ndim == 2:
            return decompose(matrices)
        found = jax.lax.map(decompose, matrices.reshape(-1, *matrices.shape[-2:]))
        return found.reshape(*matrices.shape[:-2], *found.shape[1:])

    return each


def leading(matrix: jax.Array, rank: int) -> jax.Array:
    """The leading left singular vectors of a matrix (..., n, k): (..., n, r), the largest element of each positive.

    A decomposition's signs are those of rounding: other devices would have others, and Adam's moments outlive P.
    """

    def one(matrix: jax.Array) -> jax.Array:
        q, t = jnp.linalg.qr(matrix.astype(jnp.float32))
        found = jnp.matmul(q, jnp.linalg.svd(t, full_matrices=False)[0][:, :rank], precision="highest")
        largest = jnp.take_along_axis(found, jnp.argmax(jnp.abs(found), axis=0)[None], axis=0)
        return jnp.where(largest < 0, -found, found)

    return _one_at_a_time(one)(matrix)


def exact(gradient: jax.Array, rank: int) -> jax.Array:
    """P of a kernel's gradient (..., n, m)."""
    n, m = gradient.shape[-2:]

    def one(gradient: jax.Array) -> jax.Array:
        u, _, vt = jnp.linalg.svd(gradient.astype(jnp.float32), full_matrices=False)
        return u[:, :rank] if n <= m else vt[:rank].T

    return _one_at_a_time(one)(gradient)


def project(gradient: jax.Array, basis: jax.Array) -> jax.Array:
    """dR of dW (..., n, m)."""
    n, m = gradient.shape[-2:]
    wide = gradient.astype(jnp.float32)
    return jnp.matmul(basis.mT, wide, precision="highest") if n <= m else jnp.matmul(wide, basis, precision="highest")


def back(basis: jax.Array, r: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """P R or R P^T, for a kernel of this shape."""
    return jnp.matmul(basis, r) if shape[-2] <= shape[-1] else jnp.matmul(r, basis.mT)


def sketched(objective: Objective, rank: int, trainable, rest, batch, key, opt_state):
    """(value, aux), gradients, and the projections that the sketches of this pass give."""
    zeros, seeds, bases = {}, {}, [path for path in rest if path.endswith("/galore/p")]
    for path in bases:
        side, stack = rest[path].shape[-2], rest[path].shape[:-2]
        name, k = path.removesuffix("p"), min(rank + OVERSAMPLING, side)
        zeros[f"{name}s"] = jnp.zeros((*stack, side, k))
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        seeds[f"{name}seed"] = jax.random.bits(own, stack, jnp.uint32)
    value, grads = objective.value_and_grad({**trainable, **zeros}, {**rest, **seeds}, batch, key, opt_state)
    found = {path: leading(grads.pop(f"{path.removesuffix('p')}s"), rank) for path in bases}
    return value, grads, found


def decomposed(objective: Objective, rank: int, trainable, rest, batch, key, opt_state):
    """The same of the full gradients, which the gradients of R are made of too."""
    sites_ = [path.removesuffix("/galore/p") for path in rest if path.endswith("/galore/p")]
    kernels = {f"{site}/kernel" for site in sites_}
    own = {f"{site}/galore/r" for site in sites_}
    others = {path: leaf for path, leaf in trainable.items() if path not in own}
    still = {path: leaf for path, leaf in {**rest, **trainable}.items() if path in own or path in rest.keys() - kernels}
    value, grads = objective.value_and_grad(
        {**others, **{path: rest[path] for path in kernels}}, still, batch, key, opt_state
    )
    found = {}
    for site in sites_:
        full = grads.pop(f"{site}/kernel")
        found[f"{site}/galore/p"] = exact(full, rank)
        grads[f"{site}/galore/r"] = project(full, found[f"{site}/galore/p"])
    return value, grads, found


def taken_up(
    kernel: jax.Array,
    basis: jax.Array,
    r: jax.Array,
    scale: float,
    keeps: Any,
    key: jax.Array | None,
    layers: jax.Array | None = None,
) -> jax.Array:
    """keeps W + scale back(R), a layer at a time, so that no second stack of kernels is made.

    Args:
      kernel: W (n, m), or (L, n, m).
      basis: P.  r: R.
      scale: s.  keeps: a number, 1 without weight decay.
      key: for stochastic rounding of bf16; None: to the nearest.
      layers: (g,) int32, of a stack: those that P (g, ...) and R (g, ...) are of; L and above: of none. None: all.
    """

    def one(kernel, basis, r, layer):
        wide = keeps * kernel.astype(jnp.float32) + scale * back(basis, r, kernel.shape)
        if key is None or kernel.dtype != jnp.bfloat16:
            return wide.astype(kernel.dtype)
        return stochastic(wide, jax.random.bits(jax.random.fold_in(key, layer), kernel.shape, jnp.uint16))

    if kernel.ndim == 2:
        return one(kernel, basis, r, 0)

    def body(i, kernel):
        layer = i if layers is None else layers[i]
        p, of = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (basis, r))
        own = jax.lax.dynamic_index_in_dim(kernel, layer, keepdims=False)
        new = one(own, p, of, layer)
        new = new if layers is None else jnp.where(layer < len(kernel), new, own)
        return jax.lax.dynamic_update_index_in_dim(kernel, new, layer, 0)

    return jax.lax.fori_loop(0, len(basis), body, kernel)


def stochastic(wide: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 -> bf16, up or down at random so that the mean is exact; `bits` are 16 random ones each."""
    raw = jax.lax.bitcast_convert_type(wide, jnp.uint32) + bits.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((raw >> 16).astype(jnp.uint16), jnp.bfloat16)
