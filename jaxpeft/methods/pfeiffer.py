"""Pfeiffer adapters: one bottleneck per layer, after the MLP.

    x <- x + A(mlp(norm(x)))        A(h) = h + s up(act(down(h))), d -> a -> d

Half of Houlsby's adapters (houlsby.py): none after attention. The adapter follows the MLP's last projection and
precedes the residual connection. Equations, shapes and what is kept: `jaxpeft.bottleneck`.

Paper: Pfeiffer et al. 2020, "AdapterFusion", arXiv:2005.00247, which found this place; relu and a = d / 16 as in the
adapters library.

Deviation: the adapter reads the MLP's output. In the paper it reads what the layer's last norm makes of that output and
the residual, and adds to the output; the same norm then follows a second time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxpeft import bottleneck
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.method import Method


def pfeiffer(
    width: int | None = None,
    reduction: int = 16,
    activation: str = "relu",
    scale: float = 1.0,
    init: str = "small",
    norms: bool = False,
    layers: Sequence[int] | None = None,
) -> Method:
    """Adapters after the MLP of each layer.

    Args:
      width: a; None: d / reduction.
      reduction: d / a, a whole number.
      activation: one of `bottleneck.ACTIVATIONS`.
      scale: s.
      init: "small": both maps within 2e-3; "zero": up is 0, which starts at the base exactly.
      norms: whether the norms' scales and biases train too.
      layers: numbers of the layers with adapters, ascending; None: all.

    Returns:
      The method; it trains `layers/mlp/pfeiffer/down` (L, d, a), `down_bias` (L, a), `up` (L, a, d) and `up_bias`
      (L, d). It has no merged form.

    Raises:
      InputError: for a setting out of range.
    """
    config = dict(locals())
    return bottleneck.adapters("pfeiffer", config, ("mlp",), **config)


ABOUT = About(
    summary="bottleneck adapters after the MLP of each layer",
    level="module",
    trains="the adapters, 2ad + a + d numbers per layer",
    saves="gradients and optimizer state of all but the adapters; it keeps d + a more activations per adapter",
    reference="Pfeiffer et al. 2020, arXiv:2005.00247",
    example={"width": 4},
    promises=Promises(block_bytes=functools.partial(bottleneck.block_bytes, 1), starts_at_base=False, merges=False),
    defaults=Defaults(lr=3e-4),
)
