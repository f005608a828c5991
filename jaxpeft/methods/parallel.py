"""Parallel adapters: one bottleneck per layer, beside the MLP.

    x <- x + mlp(n) + s up(act(down(n))),  n = norm(x)        d -> a -> d, s = 4

The adapter reads the MLP's input and adds to its output, so both can be computed at once. Layers with their norms
behind (BERT) have n = x. Equations, shapes and what is kept: `jaxpeft.bottleneck`.

Paper: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366: the scaled
parallel adapter. As there, down starts as LoRA's A and up at 0, so the adapted model starts at the base. Width d / 2 as
in the adapters library; the paper's is 512 of 1024.

Deviation: `norms=True` trains the norms' scales and biases too, which the paper does not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxpeft import bottleneck
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.method import Method


def parallel(
    width: int | None = None,
    reduction: int = 2,
    activation: str = "relu",
    scale: float = 4.0,
    init: str = "zero",
    norms: bool = False,
    layers: Sequence[int] | None = None,
) -> Method:
    """Adapters beside the MLP of each layer.

    Args:
      width: a; None: d / reduction.
      reduction: d / a, a whole number.
      activation: one of `bottleneck.ACTIVATIONS`.
      scale: s.
      init: "zero": up is 0, which starts at the base exactly; "small": both maps within 2e-3.
      norms: whether the norms' scales and biases train too.
      layers: numbers of the layers with adapters, ascending; None: all.

    Returns:
      The method; it trains `layers/mlp/parallel/down` (L, d, a), `down_bias` (L, a), `up` (L, a, d) and `up_bias`
      (L, d). It has no merged form.

    Raises:
      InputError: for a setting out of range.
    """
    config = dict(locals())
    return bottleneck.adapters("parallel", config, ("mlp",), **config, beside=True)


ABOUT = About(
    summary="bottleneck adapters beside the MLP of each layer",
    level="module",
    trains="the adapters, 2ad + a + d numbers per layer",
    saves="gradients and optimizer state of all but the adapters; it keeps d + a more activations per adapter",
    reference="He et al. 2021, arXiv:2110.04366",
    example={"width": 4},
    promises=Promises(block_bytes=functools.partial(bottleneck.block_bytes, 1), merges=False),
    defaults=Defaults(lr=1e-4),
)
