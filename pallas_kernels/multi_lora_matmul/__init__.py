"""One frozen linear map for rows that belong to different low-rank adapters: several are trained at once.

    y[i] = x[i] W + s_g x[i] A_g B_g        g = adapter[i], x[i] (S, n) the i-th row of the batch

The frozen product is one for all rows; the low-rank ones read the adapter that owns the tile of 128 tokens they are
working on, from a table. Adapters have ranks of their own up to r: A_g is zero in the columns, and B_g in the rows,
beyond its rank, and their gradients are zero there too, so that they stay zero under any optimizer that leaves a
parameter with zero gradients where it is. Or they come as lists, each factor of its own rank: nothing is held,
multiplied, differentiated or updated but that, in kernels as in plain JAX (ragged.py). z alone has rows of the largest
rank: whose a tile is is known when the program runs, and all may be that adapter's.

For the backward pass z (r, B S) is kept, and x only if the A are differentiated, as in lora_matmul.

Source: Zhu et al. 2025, "LoRAFusion", arXiv:2510.00206 (tiles of one adapter, a table of their owners).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import lora_matmul as dense
from pallas_kernels import tuning
from pallas_kernels.lora_matmul.reference import scaled
from pallas_kernels.multi_lora_matmul import reference
from pallas_kernels.multi_lora_matmul.ragged import low_rank
from pallas_kernels.multi_lora_matmul.reference import TILE, rows_of_z
from pallas_kernels.platform import Implementation, operation, traced_for
from pallas_kernels.stacked import Stacked, taken
from pallas_kernels.tuning import Sizes

__all__ = ["TILE", "low_rank", "multi_lora_matmul"]


def flops_of_both(x, w, a, b, *rest):
    """2 T (n m + r (n + m)), in either direction; r of adapters of different ranks: their mean, as of even shares."""
    del rest
    (n, m), ranks = w.shape, [factor.shape[0] for factor in b] if isinstance(b, tuple) else [b.shape[1]]
    return 2.0 * x.shape[0] * (n * m + sum(ranks) / len(ranks) * (n + m))


def flops_of_factor(z, x, owner, *, count, ranks=()):
    """2 r T k, r as of `flops_of_both`."""
    del owner
    return 2.0 * (sum(ranks) / count if ranks else z.shape[0]) * x.shape[0] * x.shape[1]


def sizes_of_both(x, w, a, b, *rest):
    """Of the products with W, in either direction; r is z's."""
    del a, rest
    n, m = w.shape
    return Sizes(x.shape[0], n, m, rows_of_z(b), x.dtype)


forward = operation(
    "multi_lora_forward",
    reference.forward,
    flops=flops_of_both,
    **tuning.kernels("pallas_kernels.multi_lora_matmul", "forward", sizes_of_both),
)
input_gradient = operation(
    "multi_lora_input_gradient",
    reference.input_gradient,
    flops=flops_of_both,
    **tuning.kernels("pallas_kernels.multi_lora_matmul", "input_gradient", sizes_of_both),
)
factor_gradient = operation(
    "multi_lora_factor_gradient",
    reference.factor_gradient,
    flops=flops_of_factor,
    cpu=Implementation(reference.factor_gradient_of_float32, lambda *args, **static: True, partitions=True),
    **tuning.kernels("pallas_kernels.multi_lora_matmul", "factor_gradient", dense.sizes_of_factor),
)


def multi_lora_matmul(
    x: jax.Array,
    w: jax.Array | Stacked,
    a: Any,
    b: Any,
    adapter: jax.Array,
    *,
    scales: jax.Array | Sequence[float],
    name: str = "lora_low",
    implementation: str | None = None,
) -> jax.Array:
    """x W + the low-rank update of each row's adapter.

    Args:
      x: (B, S, n) floating point; the products are computed in its dtype with float32 sums. Where 128 does not divide
        S, rows are padded to it; rows shorter than 128 tokens take plain JAX, which gathers each row's factors, or of
        lists multiplies with all.
      w: (n, m); frozen. A layer of a stack is not differentiated.
      a: (G, n, r).  b: (G, r, m). Cast to x's dtype; gradients come in their own. Lists are of (n, r_g) and (r_g, m).
      adapter: (B,) integers of 0..G-1, in any order; with lists a negative one is none, and the row's result x W.
      scales: (G,) s_g, not differentiated.
      name: of z.
      implementation: as of `lora_matmul`.

    Returns:
      (B, S, m) in x's dtype.

    Raises:
      ValueError: for shapes that don't fit.
      NotImplementedError: when lowered, if the implementation that is asked for cannot run.
    """
    rows, length = x.shape[:2]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        _check_lists(x, w, a, b, adapter, scales)
        plain = length < TILE or traced_for() == "cpu" if implementation is None else implementation == "xla"
        if plain:
            return x @ taken(w) + low_rank(x, a, b, adapter, scales=scales, name=name)
        a, b, adapter = tuple(a), tuple(b), jnp.where(adapter < 0, len(a), adapter)
    else:
        _check(x, w, a, b, adapter, scales)
        if length < TILE and implementation in (None, "xla"):
            return _gathered(x, w, a, b, adapter, scales, name)
    padding = -length % TILE
    tokens = jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x
    owner = jnp.repeat(adapter.astype(jnp.int32), (length + padding) // TILE)
    flat = tokens.reshape(-1, x.shape[-1])
    scales = jax.lax.stop_gradient(jnp.asarray(scales, jnp.float32))
    fixed = jax.lax.stop_gradient((flat, w, *_cast((a, b), x.dtype)))
    y, z = forward(*fixed, scales, owner, implementation=implementation)
    y = _computed(implementation, flat, w, a, b, scales, owner, y, checkpoint_name(z, name))
    return y.reshape(rows, length + padding, -1)[:, :length]


def _gathered(x, w, a, b, adapter, scales, name):
    z = scaled(jnp.einsum("bsn,bnr->bsr", x, a.astype(x.dtype)[adapter]), scales[adapter][:, None, None])
    return x @ taken(w) + jnp.einsum("bsr,brm->bsm", checkpoint_name(z, name), b.astype(x.dtype)[adapter])


@jax.tree_util.register_static
class _Perturbed(NamedTuple):
    """Which arguments are differentiated."""

    x: bool
    w: bool
    a: bool
    b: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _computed(implementation, x, w, a, b, scales, owner, y, z):
    """`y`, which has been computed, with the derivative of the product."""
    return y


def _keep(implementation, x, w, a, b, scales, owner, y, z):
    perturbed = _Perturbed(x.perturbed, *map(dense.is_perturbed, (w, a, b)))
    kept = x.value if perturbed.a or perturbed.w else None
    return y.value, (perturbed, kept, *map(dense.values, (w, a, b)), scales.value, owner.value, z.value)


def _pull(implementation, saved, dy) -> tuple[Any, ...]:
    perturbed, x, w, a, b, scales, owner, z = saved
    if isinstance(dy, SymbolicZero):
        return (None,) * 8
    own = {"ranks": tuple(len(factor) for factor in b)} if isinstance(b, tuple) else {}
    run = functools.partial(factor_gradient, count=len(scales), implementation=implementation, **own)
    dx, e = input_gradient(dy, w, *_cast((a, b), dy.dtype), scales, owner, implementation=implementation)
    da = jax.tree.map(lambda f, d: d.swapaxes(-1, -2).astype(f.dtype), a, run(e, x, owner)) if perturbed.a else None
    db = jax.tree.map(lambda f, d: d.astype(f.dtype), b, run(z, dy, owner)) if perturbed.b else None
    if perturbed.w and isinstance(w, Stacked):
        raise ValueError("a layer of a stack of kernels is not differentiated")
    dw = (x.T @ dy).astype(w.dtype) if perturbed.w else None
    return dx if perturbed.x else None, dw, da, db, None, None, None, None


def _cast(factors, dtype):
    return jax.tree.map(lambda factor: factor.astype(dtype), factors)


_computed.defvjp(_keep, _pull, symbolic_zeros=True)


def _check(x, w, a, b, adapter, scales) -> None:
    n, m = w.shape
    count, r = (a.shape[0], a.shape[-1]) if a.ndim == 3 else (0, 0)
    fits = x.ndim == 3 and x.shape[-1] == n and a.shape == (count, n, r) and b.shape == (count, r, m)
    if not fits or adapter.shape != x.shape[:1] or jnp.shape(scales) != (count,):
        given = (
            f"x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}, adapter {adapter.shape}, scales {jnp.shape(scales)}"
        )
        raise ValueError(f"multi_lora_matmul: {given} are not (B, S, n), (n, m), (G, n, r), (G, r, m), (B,), (G,)")


def _check_lists(x, w, a, b, adapter, scales) -> None:
    n, m = w.shape
    ranks = [factor.shape[-1] for factor in a]
    fits = [(factor.shape, other.shape) for factor, other in zip(a, b, strict=False)] == [
        ((n, r), (r, m)) for r in ranks
    ]
    if not (fits and ranks and len(a) == len(b) == len(scales) and x.ndim == 3 and adapter.shape == x.shape[:1]):
        given = f"x {x.shape}, w {w.shape}, a {[f.shape for f in a]}, b {[f.shape for f in b]}, adapter {adapter.shape}"
        raise ValueError(f"multi_lora_matmul: {given} and {len(scales)} scales do not belong together")
