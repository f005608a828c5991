"""What do several adapters in one batch cost beside one adapter for all rows?

    python -m pallas_kernels.multi_lora_matmul.bench --model llama3-8b --ranks 16 --rows 8192

Eight adapters of ranks r, r/2, r/4, r/8 and again, padded with zeros to r; each row of 1024 tokens has one of them, in
a shuffled order: (multi) multi_lora_matmul; (multi xla) the same in plain JAX; (multi ranks) multi_lora_matmul of
lists, with nothing padded; (ragged_dot) grouped products over rows sorted by adapter, as SkyRL trains many
adapters. All against (ours) lora_matmul on the same rows with the first adapter, of rank r. `forward` is y; `both` adds
dx, dA and dB. Which row has which adapter is an argument of the compiled functions: sorting and putting back are in the
time. What was measured: docs/device.md.

Source of the last form: https://github.com/NovaSky-AI/SkyRL, `skyrl/tx/layers/lora.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.lora_matmul import bench as dense
from pallas_kernels.lora_matmul import lora_matmul
from pallas_kernels.lora_matmul.shapes import MODELS, Shape
from pallas_kernels.multi_lora_matmul import multi_lora_matmul

ADAPTERS, LENGTH = 8, 1024


def own_ranks(rank: int) -> list[int]:
    """Of the adapters: rank, its half, quarter and eighth, and again; at least 1."""
    return [max(1, rank >> g % 4) for g in range(ADAPTERS)]


def padded(a: jax.Array, b: jax.Array, ranks: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """(G, n, r) and (G, r, m): A (n, r) and B (r, m) for each of G ranks, with zeros beyond it."""
    own = jnp.arange(len(b)) < jnp.asarray(ranks)[:, None]
    return jnp.where(own[:, None, :], a, 0), jnp.where(own[:, :, None], b, 0)


def ragged_dot(
    x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, adapter: jax.Array, *, scales: jax.Array
) -> jax.Array:
    """`multi_lora_matmul` by `jax.lax.ragged_dot`: rows are sorted by adapter, multiplied group by group, and put back.

    Every adapter has the largest rank; one of a lower rank pays for its zeros. Whole rows are sorted, where SkyRL sorts
    tokens, and the order is known to have no duplicates, so that the derivative of a gather needs no atomic additions.

    JAX has the derivative of ragged_dot: dx by another one, dA and dB by one that is ragged in the summed axis. What
    XLA makes of them: on a TPU kernels, in JAX 0.10.2 for y and dx only (dA and dB are a dense product over masks), in
    0.12 for all; on an NVIDIA GPU, in both versions, none: the sorted rows are written once per adapter, masked, and
    all of that is multiplied. Eight adapters on 8192 tokens, n = m = 4096, r = 16, bfloat16, take 512 MiB of
    temporaries forward and 2 GiB with the backward pass on an H200 (multi_lora_matmul 0.5 MiB), so that ratios on a
    GPU say how XLA compiles ragged_dot today, not how fast grouped products can be.

    Args:
      x: (B, S, n).
      w: (n, m).
      a: (G, n, r).  b: (G, r, m), in x's dtype.
      adapter: (B,) integers of 0..G-1, in any order.
      scales: (G,).

    Returns:
      (B, S, m) in x's dtype.
    """
    rows, length, n = x.shape
    order = jnp.argsort(adapter)
    sizes = length * jnp.bincount(adapter, length=len(a))
    z = jax.lax.ragged_dot(_permuted(x, order).reshape(-1, n), a, sizes)
    lifted = jax.lax.ragged_dot(z, b, sizes).reshape(rows, length, -1)
    return x @ w + scales.astype(x.dtype)[adapter][:, None, None] * _permuted(lifted, jnp.argsort(order))


def _permuted(x: jax.Array, order: jax.Array) -> jax.Array:
    """x[order] of x (B, ...), order a permutation (B,)."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def functions(shape: Shape, rank: int, rows: int, dtype: Any) -> dict[str, dict[str, Any]]:
    """{pass: {name: function without arguments}}; rows are cut into as many of LENGTH tokens as there are."""
    x, w, a, b, dy = jax.jit(dense.arrays, static_argnums=(0, 1, 2, 3))(shape, rank, rows, dtype)
    length = min(LENGTH, rows)
    cut = lambda v: v[: rows // length * length].reshape(-1, length, v.shape[-1])
    x, dy = cut(x), cut(dy)
    ranks = own_ranks(rank)
    many, lists = padded(a, b, ranks), ([a[:, :own] for own in ranks], [b[:own] for own in ranks])
    adapter = jax.random.permutation(jax.random.key(1), jnp.arange(len(x)) % ADAPTERS)
    scales = jnp.full((ADAPTERS,), 2.0)

    def multi(implementation, factors=many):
        return functools.partial(multi_lora_matmul, scales=scales, implementation=implementation), factors

    forms = {
        "ours": (lambda x, w, a, b, adapter: lora_matmul(x, w, a, b, scale=2.0), (a, b)),
        "multi": multi(None),
        "multi xla": multi("xla"),
        "multi ranks": multi(None, lists),
        "ragged_dot": (functools.partial(ragged_dot, scales=scales), many),
    }
    found: dict[str, dict[str, Any]] = {"forward": {}, "both": {}}
    for name, (forward, factors) in forms.items():

        def both(x, w, a, b, adapter, dy, forward=forward):
            y, pull = jax.vjp(lambda x, a, b: forward(x, w, a, b, adapter), x, a, b)
            return y, pull(dy)

        one, two = jax.jit(forward), jax.jit(both)
        found["forward"][name] = lambda one=one, factors=factors: one(x, w, *factors, adapter)
        found["both"][name] = lambda two=two, factors=factors: two(x, w, *factors, adapter, dy)
    return found


if __name__ == "__main__":
    timing.main(__doc__, functions, MODELS, "ours")
