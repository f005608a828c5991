"""Attention to a sequence whose tokens are divided over devices: keys and values go round them in a ring.

Device i has the queries, keys and values of part i of P. In P rounds it meets every part's keys and values, and hands
them on. Each round is attention of whole parts, by the platform's own kernel; rounds are joined by their log-sum-exps

    lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

and in the backward pass, where lse and out are known, they add up: gradients of keys and values go round with them. Of
causal attention the first round is a part with itself, causal; in the others a device computes where it meets a part
before its own. No device ever holds the keys and values of two parts.

A window is a matter of distances between parts: there keys and values are gathered, and the mask is by index.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def forward(run: Callable[..., Any], divided: Any, query, key, value, where, *, causal: bool, **options: Any):
    """(out (B, S, H, D), lse (B, H, S) float32) of one device's part; arguments as the operation's."""
    axes = divided.of("s")
    if not axes:
        return run(query, key, value, where, causal=causal, **options)
    if _by_index(where, options):
        key, value, where = _gathered(axes, key, value, where, query.shape[1])
        return run(query, key, value, where, causal=causal, **options)

    out, lse = run(query, key, value, where, causal=causal, **options)

    def join(carry, held):
        (out, lse), (key, value, segment) = carry, held
        more, other = run(query, key, value, where._replace(key_segment=segment), causal=False, **options)
        both = jnp.logaddexp(lse, other)
        share = [jnp.exp(x - both).swapaxes(1, 2)[..., None] for x in (lse, other)]
        return share[0] * out + share[1] * more.astype(jnp.float32), both

    def turn(number, state):
        carry, held = state
        held = _handed_on(axes, held)
        return _where_met(axes, number, causal, join, carry, held), held

    state = (out.astype(jnp.float32), lse), (key, value, where.key_segment)
    (out, lse), _ = jax.lax.fori_loop(1, divided.count("s"), turn, state)
    return out.astype(query.dtype), lse


def backward(run: Callable[..., Any], divided: Any, query, key, value, where, out, lse, d_out, *, causal, **options):
    """Cotangents of one device's queries, keys and values."""
    axes = divided.of("s")
    if not axes:
        return run(query, key, value, where, out, lse, d_out, causal=causal, **options)
    if _by_index(where, options):
        keys, values, where = _gathered(axes, key, value, where, query.shape[1])
        d_query, *others = run(query, keys, values, where, out, lse, d_out, causal=causal, **options)
        return d_query, *(jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True) for x in others)

    wide = lambda arrays: tuple(x.astype(jnp.float32) for x in arrays)
    total, *sums = wide(run(query, key, value, where, out, lse, d_out, causal=causal, **options))

    def add(carry, held):
        key, value, segment = held
        inputs = query, key, value, where._replace(key_segment=segment), out, lse, d_out
        return jax.tree.map(jnp.add, carry, wide(run(*inputs, causal=False, **options)))

    def turn(number, state):
        (total, *sums), held = state
        held, sums = _handed_on(axes, (held, sums))
        return _where_met(axes, number, causal, add, (total, *sums), held), held

    state = (total, *sums), (key, value, where.key_segment)
    (total, *sums), _ = jax.lax.fori_loop(1, divided.count("s"), turn, state)
    sums = _handed_on(axes, sums)  # home
    return tuple(x.astype(like.dtype) for x, like in zip((total, *sums), (query, key, value), strict=True))


def _by_index(where, options) -> bool:
    return options.get("window") is not None or where.window is not None


def _gathered(axes, key, value, where, queries: int):
    """Keys and values of all parts, and where they and this part's queries stand."""
    whole = lambda x, axis: jax.lax.all_gather(x, axes, axis=axis, tiled=True)
    key, value = whole(key, 1), whole(value, 1)
    first = jax.lax.axis_index(axes) * queries
    return (
        key,
        value,
        where._replace(
            query_index=first + jnp.arange(queries, dtype=jnp.int32),
            key_index=jnp.arange(key.shape[1], dtype=jnp.int32),
            key_segment=None if where.key_segment is None else whole(where.key_segment, 1),
        ),
    )


def _handed_on(axes, arrays):
    """The arrays of the device before; the first gets those of the last."""
    count = jax.lax.axis_size(axes)
    to_next = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, to_next), arrays)


def _where_met(axes, number, causal: bool, function, carry, held):
    """function(carry, held) in a round; of causal attention only on devices that meet a part before theirs."""
    if not causal:
        return function(carry, held)
    met = jax.lax.axis_index(axes) >= number
    return jax.lax.cond(met, lambda: function(carry, held), lambda: carry)
