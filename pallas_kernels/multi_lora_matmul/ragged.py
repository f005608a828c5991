"""Adapters of ranks of their own, side by side: A = [A_1 .. A_G] (n, R), B = [B_1; ..; B_G] (R, m), R = r_1 + .. + r_G.

    z[i] = x[i] A where the column is one of the row's adapter, times s_g, else 0          (B, S, R)
    low[i] = z[i] B                                                                        (B, S, m)

A row multiplies all columns and keeps its own: nothing is padded, and every factor is read once, however many rows ask
for it. That is the form for few tokens per row, as in decoding, and where there are no kernels, which read of a row's
adapter alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.lora_matmul.reference import scaled


def low_rank(
    x: jax.Array,
    a: Sequence[jax.Array],
    b: Sequence[jax.Array],
    adapter: jax.Array,
    *,
    scales: Sequence[float] | jax.Array,
    name: str = "lora_low",
) -> jax.Array:
    """s_g x[i] A_g B_g of each row's adapter, (B, S, m) in x's dtype; 0 for a row without one.

    Args:
      x: (B, S, n).
      a: (n, r_g) of each adapter.  b: (r_g, m).
      adapter: (B,) integers of 0..G-1; negative: none.
      scales: (G,) s_g.
      name: of z.
    """
    of = np.repeat(np.arange(len(a)), [factor.shape[-1] for factor in a])
    z = x @ jnp.concatenate(a, axis=1).astype(x.dtype)
    z = scaled(z, jax.lax.stop_gradient(jnp.asarray(scales, jnp.float32))[of])
    z = jnp.where((adapter[:, None] == of)[:, None, :], z, jnp.zeros((), z.dtype))
    return checkpoint_name(z, name) @ jnp.concatenate(b, axis=0).astype(x.dtype)
