"""One grid of learning rates for every method, and a walk downhill on it."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def rate(index: int) -> float:
    """The grid's learning rates, quarters of decades: 10^(index / 4) to one digit.

    >>> [rate(i) for i in range(-12, -7)]
    [0.001, 0.002, 0.003, 0.006, 0.01]
    """
    return float(f"{(1, 2, 3, 6)[index % 4]}e{index // 4}")


def place(lr: float) -> int:
    """The index of a rate on the grid."""
    return round(4 * math.log10(lr))


def search(loss: Callable[[int], float], start: int, stride: int) -> int:
    """Walks downhill from `start` to an index whose neighbours, `stride` away, are both no better.

    A loss that is not finite is worst.
    """

    def order(index: int) -> tuple[float, int]:
        value = loss(index)
        return (value, 0) if math.isfinite(value) else (math.inf, index)  # of diverged runs prefer the lower rate

    best = start
    while True:
        lowest = min((best, best - stride, best + stride), key=order)
        if lowest == best:
            return best
        best = lowest


def by_state(rate: float) -> optax.GradientTransformation:
    """Updates times a rate that is part of the state, so that one compiled step serves a whole grid."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda x: state * x, updates), state

    return optax.GradientTransformation(lambda params: jnp.float32(rate), update)
