"""Rotary frequencies and their scalings to longer contexts, as Hugging Face configurations describe them.

Base frequencies: f_i = theta^(-2i/D), i = 0 .. D/2 - 1 (Su et al. 2021, arXiv:2104.09864). Scalings:

    linear   f / factor (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    dynamic  theta grows with a text that is longer than the original context M: for L tokens
             theta ((factor L / M) - (factor - 1))^(D/(D-2)), L at least M (NTK-aware scaling, bloc97 and emozilla 2023;
             as Peng et al. describe it)
    llama3   long wavelengths by `factor`, short ones not at all, linear between (Llama 3.1's reference code)
    yarn     the same idea with bounds from numbers of rotations, and cos, sin scaled (Peng et al. 2023,
             arXiv:2309.00071)

`dynamic` takes each text's own length, where transformers takes that of the longest in the batch: what a text means
does not depend on its neighbours. With a cache the length is that so far, as there; earlier keys stay as they were.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.models import fields

# kind -> the numbers that it needs, and those that it may have.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
}
# Kinds that --rope-scaling can put on a model without one.
EXTENSIONS = ("linear", "dynamic", "yarn")


def of_config(config: Mapping[str, Any], head_dim: int) -> tuple[float, dict[str, Any], int]:
    """(theta, the scaling for `frequencies`, tokens that the model has room for) of a parsed config.json.

    The room is max_position_embeddings, and where that is the original context, `factor` times it: with `dynamic`
    always, with `yarn` if the product is larger.

    Raises:
      InputError: for a field that is missing, of the wrong type, or not supported.
    """
    if head_dim % 2:
        raise InputError(f"config.json: head_dim {head_dim} is odd; rotary positions turn pairs")
    most = fields.count(config, "max_position_embeddings", 2048)
    name, given = _given(config)
    theta = fields.number({"rope_theta": given.get("rope_theta", config.get("rope_theta"))}, "rope_theta", 10000.0)
    if theta <= 1:
        raise InputError(f"config.json: rope_theta {theta} should be above 1")
    fields.one_of({**config, **given}, "partial_rotary_factor", (1,), 1)
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    if config.get("original_max_position_embeddings") is not None:  # beside the scaling: transformers prefers it
        given["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    needed, optional = KINDS[kind]
    scaling: dict[str, Any] = {} if kind == "default" else {"rope_type": kind}
    for field in needed + tuple(field for field in optional if given.get(field) is not None):
        try:
            scaling[field] = fields.number(given, field)
        except InputError as error:
            raise InputError(f"{error} (in {name}, of rope_type {kind})") from None
    if kind == "yarn":
        scaling["truncate"] = fields.switch(given, "truncate", True)
    original = most if kind in ("default", "linear") else scaling.setdefault("original_max_position_embeddings", most)
    if kind in ("dynamic", "yarn"):
        most = max(most, int(original * scaling["factor"]))
    if kind == "llama3" and scaling["low_freq_factor"] == scaling["high_freq_factor"]:
        raise InputError(f"config.json: low_freq_factor and high_freq_factor are both {scaling['low_freq_factor']}")
    if kind == "dynamic" and head_dim == 2:
        raise InputError("config.json: rope_type 'dynamic' needs a head_dim above 2")
    return float(theta), scaling, most


def _given(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(The field's name, its value): rope_parameters of transformers 5, rope_scaling of versions before."""
    new = fields.mapping(config, "rope_parameters")
    return ("rope_parameters", new) if new else ("rope_scaling", fields.mapping(config, "rope_scaling"))


def parse(text: str) -> tuple[str, float]:
    """yarn=4 -> ("yarn", 4.0).

    Raises:
      InputError: for anything but KIND=FACTOR, a kind that is not in EXTENSIONS, or a factor that is not above 1.
    """
    kind, _, number = text.partition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if kind not in EXTENSIONS or not 1 < factor < math.inf:
        raise InputError(f"--rope-scaling {text!r}: should be {'|'.join(EXTENSIONS)}=FACTOR, such as yarn=4, above 1")
    return kind, factor


def extended(config: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A parsed config.json whose rotary positions are scaled, as transformers reads it.

    max_position_embeddings becomes what the model then has room for; with `dynamic`, whose formula reads it as the
    original context, it stays.

    Args:
      config: of a model with rotary positions.
      text: see `parse`.

    Raises:
      InputError: if they are scaled already.
    """
    kind, factor = parse(text)
    name, given = _given(config)
    if (before := given.get("rope_type") or given.get("type") or "default") != "default":
        raise InputError(f"--rope-scaling {text}: config.json scales its rotary positions already (rope_type {before})")
    most = fields.count(config, "max_position_embeddings", 2048)
    own: dict[str, Any] = {**given, "rope_type": kind, "factor": factor}
    own.pop("type", None)
    if kind == "yarn":
        own["original_max_position_embeddings"] = most
    room = most if kind == "dynamic" else int(most * factor)
    return {**config, name: own, "max_position_embeddings": room}


def frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int
) -> tuple[np.ndarray, float]:
    """(frequencies float32 (head_dim / 2,), factor of cos and sin).

    Args:
      head_dim: D.
      theta: the base.
      scaling: from `of_config`: `rope_type` and its numbers; {} for none. Of `dynamic`, the frequencies are those of a
        text within the original context (see `by_length`).
      max_positions: YaRN's original context where the scaling doesn't say.
    """
    base = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return (base / scaling["factor"]).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(base, scaling).astype(np.float32), 1.0
    if kind == "yarn":
        scaled, factor = _yarn(base, head_dim, theta, scaling, max_positions)
        return scaled.astype(np.float32), factor
    return base.astype(np.float32), 1.0


def by_length(length: jax.Array, head_dim: int, theta: float, scaling: Mapping[str, Any]) -> jax.Array:
    """The frequencies of `dynamic` for tokens of texts of `length` (B, S): float32 (B, S, 1, head_dim / 2)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    longer = jnp.maximum(length, original).astype(jnp.float32)
    grown = (factor * longer / original - (factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return (theta * grown[..., None, None]) ** -exponents


def lengths(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """How long, so far, the text is that each token belongs to: its largest position in this batch + 1, (B, S).

    Args:
      positions: (B, S) int32.
      segments: (B, S) int32, which of a row's texts; None: each row is one.
    """
    if segments is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
    most = functools.partial(jax.ops.segment_max, num_segments=positions.shape[1] + 1)
    return jnp.take_along_axis(jax.vmap(most)(positions, segments), segments, axis=1) + 1


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
