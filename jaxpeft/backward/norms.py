"""Norms whose derivative reads what they have made, by name: normalised rows, and one float32 of each row.

With m the mean over channels, r = 1 / sqrt(var + epsilon) and n = r (x - mean x), of RMSNorm n = r x,

    y  = n scale + bias
    g  = dy scale
    dx = r (g - m(g) - n m(g n))                m(g) of LayerNorm alone
    d scale = sum(dy n),  d bias = sum(dy)      over all tokens

n is `NAME_normalized` (..., d), in x's dtype, r is `NAME_rstd` (...) float32, where NAME is the norm's. A plan that
speaks of one of them, such as `NAME_normalized=prune`, is traced so; any other has the derivative that the norm has
without, and its bytes. y, if a layer's map reads it again, follows from x or from `NAME` itself, not from n.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft.backward.plan import NORMALIZED, RSTD

_named = jax.make_user_context(default_value=False)  # a part of what JAX knows kept traces by


@contextlib.contextmanager
def naming(wanted: bool = True) -> Iterator[None]:
    """Norms that are traced inside name what their derivatives read, if it is wanted."""
    with _named(wanted):
        yield


def names() -> bool:
    """Whether norms that are traced now do."""
    return _named.value


def from_normalized(
    name: str,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    y: jax.Array,
    normalized: jax.Array,
    rstd: jax.Array,
) -> jax.Array:
    """`y`, which has been computed, with a derivative that reads `normalized` and `rstd` by their names.

    Args:
      name: the norm's.
      x: (..., d).
      scale: (d,), as it was multiplied by.
      bias: (d,) of a LayerNorm, None of an RMSNorm.
      y: (..., d), in x's dtype.
      normalized: (..., d) of any floating dtype; it is rounded to x's.
      rstd: (...) float32.
    """
    y, normalized, rstd = jax.lax.stop_gradient((y, normalized.astype(x.dtype), rstd))
    normalized = checkpoint_name(normalized, name + NORMALIZED)
    return _computed(x, scale, bias, y, normalized, checkpoint_name(rstd, name + RSTD))


@jax.custom_vjp
def _computed(x, scale, bias, y, normalized, rstd):
    return y


def _keep(x, scale, bias, y, normalized, rstd):
    return y, (scale, bias, normalized, rstd)


def _pull(saved, dy):
    scale, bias, normalized, rstd = saved
    mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
    total = functools.partial(jnp.sum, axis=tuple(range(dy.ndim - 1)))
    wide, n = dy.astype(jnp.float32), normalized.astype(jnp.float32)
    g = wide * scale.astype(jnp.float32)
    around = g if bias is None else g - mean(g)
    dx = rstd[..., None] * (around - n * mean(g * n))
    d_bias = None if bias is None else total(wide).astype(bias.dtype)
    return dx.astype(normalized.dtype), total(wide * n).astype(scale.dtype), d_bias, None, None, None


_computed.defvjp(_keep, _pull)
