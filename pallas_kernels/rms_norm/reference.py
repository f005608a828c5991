"""RMSNorm in plain JAX, forward and backward.

    r   = 1 / sqrt(mean_d(x^2) + epsilon)       (...)       float32, kept
    n   = r x                                   (..., d)    float32
    y   = n * scale                             (..., d)    both factors rounded to x's dtype

    g   = dy * scale                            (..., d)    float32
    dx  = r (g - x r^2 mean_d(g x))             (..., d)
    d scale = sum(dy * n) over all tokens       (d,)        n rounded as in y

The mean in dx is written without r, so that one pass over x yields both means where r is computed again. The products
dy * n are rounded to x's dtype and summed in float32: XLA writes them out for an NVIDIA GPU.

Of a part of an array a Hopper GPU makes r apart from y: XLA would make both in one kernel of Triton's, which takes no
slices, so that the part would be copied first: four times the bytes of x, in place of three.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.platform import reads_parts


def forward(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(y, r) of x (..., d), scale (d,)."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    if reads_parts():
        inverse = jax.lax.optimization_barrier(inverse)
    # Without its last axis of 1, which a TPU would pad to 128.
    return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype), inverse[..., 0]


def backward(x: jax.Array, scale: jax.Array, inverse: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dx, d scale), in x's and scale's dtypes, of x (..., d), scale (d,), r (...), dy (..., d)."""
    inverse = inverse[..., None]
    wide = x.astype(jnp.float32)
    g = dy.astype(jnp.float32) * scale.astype(x.dtype).astype(jnp.float32)
    dx = inverse * (g - wide * (inverse * inverse * jnp.mean(g * wide, axis=-1, keepdims=True)))
    normed = (wide * inverse).astype(x.dtype)
    d_scale = jnp.sum((dy * normed).astype(jnp.float32), axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), d_scale.astype(scale.dtype)
