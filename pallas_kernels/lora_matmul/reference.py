"""LoRA's products in plain JAX: what the kernels compute, and the fallback where none serves.

    z = s A^T drop(x)^T            (r, T), rounded to x's dtype       the only residual
    y = x W + z^T B                (T, m)

    e = s B dy^T                   (r, T), rounded to dy's dtype
    dx = dy W^T + drop(e^T A^T)    (T, n)
    dA = drop(x)^T e^T             (n, r)    as (e drop(x))^T
    dB = z dy                      (r, m)

T rows, n inputs, m outputs, r rank. z and e are (r, T): r is far below the 128 columns to which a TPU pads a last axis.
Sums are float32. The kernels round once, at the end. Here the two products of y and dx are rounded before they are
added (no float32 array of their size is made), and z and e also before s multiplies them. dA and dB are float32.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.dropout import drop
from pallas_kernels.stacked import put, taken


def forward(x, w, a, b, seed, *, scale: float, rate: float):
    """(y (T, m), z (r, T)) of x (T, n), w (n, m), a (n, r), b (r, m), seed () int32; all in x's dtype."""
    z = low(x, a, seed, scale=scale, rate=rate)
    return x @ taken(w) + jnp.einsum("rt,rm->tm", z, b), z


def forward_into(x, w, a, b, seed, out, *, scale: float, rate: float):
    """(the stack that `out` (T, m) is a layer of, with y there, y, z (r, T)); the others as of `forward`."""
    y, z = forward(x, w, a, b, seed, scale=scale, rate=rate)
    return put(out, y), y, z


def low(x, a, seed, *, scale: float, rate: float):
    """z (r, T) of x (T, n), a (n, r)."""
    return scaled(jnp.einsum("tn,nr->rt", drop(x, seed, rate), a), scale)


def input_gradient(dy, w, a, b, seed, *, scale: float, rate: float):
    """(dx (T, n), e (r, T)) of dy (T, m), w (n, m), a (n, r), b (r, m)."""
    e = low_gradient(dy, b, scale=scale)
    return jnp.einsum("tm,nm->tn", dy, taken(w)) + drop(jnp.einsum("rt,nr->tn", e, a), seed, rate), e


def low_gradient(dy, b, *, scale: float):
    """e (r, T) of dy (T, m), b (r, m)."""
    return scaled(jnp.einsum("tm,rm->rt", dy, b), scale)


def scaled(x, scale):
    """s x in x's dtype; s itself, which may be an array, is not rounded to that."""
    return (scale * x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def factor_gradient(z, x, seed, *, rate: float):
    """The product over rows z drop(x), float32 (r, k), of z (r, T), x (T, k): dB of (z, dy), dA^T of (e, x)."""
    return jnp.matmul(z, drop(x, seed, rate), preferred_element_type=jnp.float32)


def factor_gradient_of_float32(z, x, seed, *, rate: float):
    """The same of operands that are cast first: XLA's CPU backend multiplies no bfloat16 into float32."""
    return factor_gradient(z.astype(jnp.float32), x.astype(jnp.float32), seed, rate=rate)
