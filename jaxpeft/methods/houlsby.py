"""Houlsby adapters: two bottlenecks per layer, after attention and after the MLP.

    x <- x + A_1(attention(norm(x)));  x <- x + A_2(mlp(norm(x)))        A(h) = h + s up(act(down(h))), d -> a -> d

An adapter follows the module's last projection and precedes the residual connection, and with it the norm of layers
that have theirs behind (BERT). Equations, shapes and what is kept: `jaxpeft.bottleneck`. Nothing can be merged, as an
activation lies between.

Paper: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, and its code: weights
from a normal distribution of deviation 1e-3, cut at two deviations, biases 0, gelu.

Deviations: the paper trains the norms' scales and biases too; here `norms=True` does. By default they stay, so that the
base stays and the adapters are all there is to save. The paper tunes the width a (64 for BERT); here it is d / 16, as
in the adapters library.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxpeft import bottleneck
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.method import Method


def houlsby(
    width: int | None = None,
    reduction: int = 16,
    activation: str = "gelu",
    scale: float = 1.0,
    init: str = "small",
    norms: bool = False,
    layers: Sequence[int] | None = None,
) -> Method:
    """Adapters after the attention and the MLP of each layer.

    Args:
      width: a; None: d / reduction.
      reduction: d / a, a whole number.
      activation: one of `bottleneck.ACTIVATIONS`: "gelu" (exact), "relu", "swish", "tanh", ...
      scale: s.
      init: "small": both maps within 2e-3; "zero": up is 0, which starts at the base exactly.
      norms: whether the norms' scales and biases train too.
      layers: numbers of the layers with adapters, ascending; None: all.

    Returns:
      The method; it trains `layers/<module>/houlsby/down` (L, d, a), `down_bias` (L, a), `up` (L, a, d) and `up_bias`
      (L, d) in the modules `self_attn` and `mlp`. It has no merged form.

    Raises:
      InputError: for a setting out of range.
    """
    config = dict(locals())
    return bottleneck.adapters("houlsby", config, ("self_attn", "mlp"), **config)


ABOUT = About(
    summary="bottleneck adapters after attention and after the MLP of each layer",
    level="module",
    trains="the adapters, 2(2ad + a + d) numbers per layer",
    saves="gradients and optimizer state of all but the adapters; it keeps d + a more activations per adapter",
    reference="Houlsby et al. 2019, arXiv:1902.00751",
    example={"width": 4},
    promises=Promises(block_bytes=functools.partial(bottleneck.block_bytes, 2), starts_at_base=False, merges=False),
    defaults=Defaults(lr=3e-4),
)
