"""Bottleneck adapters: a narrow network after a module of a layer, or beside it.

    after     y + s up(act(down(y)))        y (..., d) the module's output, which the residual connection adds
    beside    y + s up(act(down(x)))        x (..., d) the module's input

    down(h) = h D + c, D (d, a);   up(z) = z U + e, U (a, d)        2 a d + a + d numbers

Kept for the backward pass, at each adapter: what it reads, d numbers per token, and down's output, a. The activation is
computed again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import features, sites, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.models import layers as model_layers

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **model_layers.ACTIVATIONS,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}

_small = nn.initializers.truncated_normal(1e-3)
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# How D and U start: both within 2e-3; U(-1/sqrt(d), 1/sqrt(d)) and 0, which starts at the base.
INITS: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "small": (_small, _small),
    "zero": (_uniform, nn.initializers.zeros),
}

# The norms on the stream: of the layers, behind the embedding and before the head; not those on heads of queries.
_NORMS = re.compile(r"^(layers[^/]*/)?(\w+_)?(layer)?norm/(scale|bias)$")


class Bottleneck(nn.Module):
    """The adapter. Parameters: down (d, a), down_bias (a,), up (a, d), up_bias (d,), float32."""

    width: int
    activation: str
    scale: float = 1.0
    start: str = "small"
    beside: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        h, zeros = x if self.beside else y, nn.initializers.zeros
        d = h.shape[-1]
        of_down, of_up = INITS[self.start]
        down = self.param("down", of_down, (d, self.width)).astype(h.dtype)
        down_bias = self.param("down_bias", zeros, (self.width,)).astype(h.dtype)
        up = self.param("up", of_up, (self.width, d)).astype(h.dtype)
        up_bias = self.param("up_bias", zeros, (d,)).astype(h.dtype)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def activated_up(low, up):
            return ACTIVATIONS[self.activation](low) @ up

        low = checkpoint_name(h @ down + down_bias, "adapter_low")
        return y + self.scale * (activated_up(low, up) + up_bias)


def adapters(
    name: str,
    config: Mapping[str, Any],
    modules: Sequence[str],
    *,
    width: int | None,
    reduction: int,
    activation: str,
    scale: float,
    init: str,
    norms: bool,
    layers: Sequence[int] | None,
    beside: bool = False,
) -> Method:
    """The method that puts bottleneck adapters on modules of the layers.

    Args:
      name: of the method, and the scope of its parameters in a module.
      config: what its factory was called with.
      modules: paths in a layer.
      width: a; None: d / reduction.
      reduction: d / a.
      activation: one of ACTIVATIONS.
      scale: s.
      init: one of INITS.
      norms: whether the norms' scales and biases train too.
      layers: numbers of those with adapters, ascending; None: all.
      beside: whether an adapter reads its module's input.

    Raises:
      InputError: for a setting out of range. Of the model, when set up: if it shows no layers, lacks one of `layers`,
        or has a width that `reduction` does not divide.
    """
    features.check_settings(name, reduction, layers)
    if width is not None and width < 1:
        raise InputError(f"{name}: width {width} must be at least 1")
    for what, value, known in (("activation", activation, ACTIVATIONS), ("init", init, INITS)):
        if value not in known:
            raise InputError(f"{name}: {what} {value!r} is not one of {', '.join(known)}")

    def chosen(params):
        return features.check_layers(name, layers, features.count_layers(name, params))

    def segments(params):
        own = chosen(params)
        return [segment for segment, first, _ in tree.segments(params) if first in own]

    def prepare(params, view):
        own, count = chosen(params), features.count_layers(name, params)
        for layer in range(1, count):
            if (layer in own) != (layer - 1 in own):
                params = tree.cut_layers(params, layer)
        return params

    def forward(model, view):
        d = features.width(name, model)
        a = width or features.divided(name, "width", d, reduction)
        return sites.wrap(model, name, Bottleneck(a, activation, scale, init, beside), modules, segments)

    def trainable(path):
        return f"/{name}/" in path or (norms and _NORMS.search(path) is not None)

    merge = features.no_merge(name, "an activation lies within its adapters")
    return Method(prepare, forward, trains(trainable), merge=merge, specs=(Spec(name, dict(config)),))


def block_bytes(
    count: int, config: Any, itemsize: int, width: int | None = None, reduction: int | None = None, **_
) -> int:
    """Bytes per token that one layer with `count` adapters keeps beyond a frozen backbone's: d + a at each."""
    d = config.hidden_size
    return count * (d + (width or d // (reduction or 1))) * itemsize
