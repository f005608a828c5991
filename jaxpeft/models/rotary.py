"""Rotary frequencies and their scalings to longer contexts, as Hugging Face configurations describe them.

Base frequencies: f_i = theta^(-2i/D), i = 0 .. D/2 - 1 (Su et al. 2021, arXiv:2104.09864). Scalings:

    linear   f / factor (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    llama3   long wavelengths by `factor`, short ones not at all, linear between (Llama 3.1's reference code)
    yarn     the same idea with bounds from numbers of rotations, and cos, sin scaled (Peng et al. 2023,
             arXiv:2309.00071)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.errors import InputError

KINDS = ("default", "linear", "llama3", "yarn")


def frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int
) -> tuple[np.ndarray, float]:
    """(frequencies float32 (head_dim / 2,), factor of cos and sin).

    Args:
      head_dim: D.
      theta: the base.
      scaling: Hugging Face's `rope_scaling` (or the rest of `rope_parameters`): `rope_type` and its numbers; {} for
        none.
      max_positions: `max_position_embeddings`, YaRN's original context where the scaling doesn't say.

    Raises:
      InputError: for a kind of scaling that is not in KINDS.
    """
    base = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return base.astype(np.float32), 1.0
    if kind == "linear":
        return (base / scaling["factor"]).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(base, scaling).astype(np.float32), 1.0
    if kind == "yarn":
        scaled, factor = _yarn(base, head_dim, theta, scaling, max_positions)
        return scaled.astype(np.float32), factor
    raise InputError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(KINDS)}")


def _llama3(base: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] * base / (2 * math.pi)
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return keep * base + (1 - keep) * base / scaling["factor"]


def _yarn(
    base: np.ndarray, head_dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int
) -> tuple[np.ndarray, float]:
    original = scaling.get("original_max_position_embeddings") or max_positions
    factor = scaling["factor"]

    def dimension(rotations):
        """The (fractional) index i that makes this many rotations over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    interpolate = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    scaled = interpolate * base / factor + (1 - interpolate) * base

    def magnitude(weight=1.0):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    stretch = scaling.get("attention_factor")
    if stretch is None:
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            stretch = magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
        else:
            stretch = magnitude()
    return scaled, float(stretch)
