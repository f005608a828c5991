"""Random numbers as torch draws them on a CPU, for adapters that say by which key theirs were drawn, and no more."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def seeded(key: int) -> np.random.RandomState:
    """A Mersenne Twister, as `torch.Generator().manual_seed(key)` is one."""
    return np.random.RandomState(key % 2**32)


def uniform(twister: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 in [0, 1), of 24 of each 32 bits: `torch.rand(shape, generator=twister)`."""
    bits = twister.randint(0, 2**32, size=shape, dtype=np.uint32) & (2**24 - 1)
    return bits.astype(np.float32) / np.float32(2**24)


def uniform_bfloat16(twister: np.random.RandomState, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """`torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=twister)`, as float32.

    What is rounded to the upper end, which is no part of the interval, becomes the lower one.
    """
    bound = np.float32(bound)
    x, end = bfloat16(uniform(twister, shape) * np.float64(2 * bound) - bound), bfloat16(bound)
    return np.where(x == end, -end, x)


def bfloat16(x: np.ndarray | np.floating) -> np.ndarray:
    """Numbers rounded to bfloat16, as float32."""
    return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float32)
