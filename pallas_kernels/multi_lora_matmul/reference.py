"""LoRA's products for rows that belong to different adapters, in plain JAX.

With g(t) the adapter of row t (rows come in tiles of TILE rows of one adapter: owner[t // TILE]),

    z[:, t] = s_g A_g^T x_t                 (r, T), rounded to x's dtype
    y_t = x_t W + z[:, t]^T B_g             (T, m)

    e[:, t] = s_g B_g dy_t                  (r, T), rounded
    dx_t = dy_t W^T + e[:, t]^T A_g^T       (T, n)
    dA_g = sum_t:g(t)=g x_t e[:, t]^T       (G, n, r)   as (e x)^T
    dB_g = sum_t:g(t)=g z[:, t] dy_t        (G, r, m)

A: (G, n, r), B: (G, r, m), s: (G,) float32. Or A and B are tuples of (n, r_g) and (r_g, m), every adapter of its own
rank; then r is the largest, rounded up to 8, z and e are zero in rows from r_g on, dA and dB are such tuples, and an
owner of G is none: z and e are zero. An adapter that owns no tile has zero gradients. Tiles of an adapter need not be
neighbours.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.lora_matmul.reference import scaled
from pallas_kernels.stacked import taken

TILE = 128
ROWS = 8  # z of adapters of different ranks has a multiple of


def rows_of_z(b) -> int:
    """r, of b (G, r, m) or a tuple of (r_g, m)."""
    return -(-max(f.shape[0] for f in b) // ROWS) * ROWS if isinstance(b, tuple) else b.shape[1]


def _rows(owner, rows: int):
    """g(t) (T,)."""
    return jnp.repeat(owner, TILE)[:rows]


def forward(x, w, a, b, scales, owner):
    """(y (T, m), z (r, T)) of x (T, n), w (n, m), a (G, n, r), b (G, r, m), scales (G,), owner (ceil(T / TILE),)."""
    of = _rows(owner, len(x))
    z = _select(lambda g: _tall(scaled(jnp.einsum("tn,nr->rt", x, a[g]), scales[g]), b), b, of)
    lifted = _select(lambda g: jnp.einsum("rt,rm->tm", z[: len(b[g])], b[g]), b, of[:, None])
    return x @ taken(w) + lifted, z


def input_gradient(dy, w, a, b, scales, owner):
    """(dx (T, n), e (r, T)) of dy (T, m)."""
    of = _rows(owner, len(dy))
    e = _select(lambda g: _tall(scaled(jnp.einsum("tm,rm->rt", dy, b[g]), scales[g]), b), b, of)
    back = _select(lambda g: jnp.einsum("rt,nr->tn", e[: len(b[g])], a[g]), b, of[:, None])
    return jnp.einsum("tm,nm->tn", dy, taken(w)) + back, e


def factor_gradient(z, x, owner, *, count: int, ranks: tuple[int, ...] = ()):
    """z x over the rows of each of `count` adapters: float32 (G, r, k) of z (r, T), x (T, k); of ranks r_g (r_g, k)."""
    of = _rows(owner, len(x))
    own = [jnp.where(of == g, z[:r], jnp.zeros((), z.dtype)) for g, r in enumerate(ranks or (len(z),) * count)]
    found = [jnp.matmul(part, x, preferred_element_type=jnp.float32) for part in own]
    return tuple(found) if ranks else jnp.stack(found)


def factor_gradient_of_float32(z, x, owner, **static):
    """The same of operands that are cast first: XLA's CPU backend multiplies no bfloat16 into float32."""
    return factor_gradient(z.astype(jnp.float32), x.astype(jnp.float32), owner, **static)


def _tall(z, b):
    """z (r_g, T) with zeros up to r."""
    return jnp.pad(z, ((0, rows_of_z(b) - len(z)), (0, 0)))


def _select(function, b, of):
    """Where row t's values come from function(g(t)), zeros if nobody's; `of` broadcasts with the result."""
    out = function(0)
    if isinstance(b, tuple):
        out = jnp.where(of == 0, out, jnp.zeros_like(out))
    for g in range(1, len(b)):
        out = jnp.where(of == g, function(g), out)
    return out
