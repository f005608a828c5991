"""SwiGLU's elementwise part in plain JAX, forward and backward.

    y = silu(gate) * up,    silu(x) = x s(x),    s(x) = 1 / (1 + exp(-x))       every factor rounded to gate's dtype

    d gate = dy up s (1 + gate (1 - s))         s = s(gate)
    d up   = dy gate s                          both in float32, rounded once

All arrays (..., f).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def forward(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Y."""
    return jax.nn.silu(gate) * up


def backward(gate: jax.Array, up: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(d gate, d up), each in its input's dtype."""
    g, u, d = (x.astype(jnp.float32) for x in (gate, up, dy))
    s = jax.nn.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).astype(gate.dtype), (d * (g * s)).astype(up.dtype)
