"""LoReFT: hidden states of a prompt are moved within a trained subspace, to where a trained linear map wants them.

    h <- h + (h W + b - h R) R^T        h (d,), W (d, r), b (r,), R (d, r) with orthonormal columns

Within the subspace of R the edited state is h W + b, and what is orthogonal to it stays: h R = h W + b afterwards. The
edit stands behind each layer, on the residual stream, at the first f and the last l tokens of the prompt ("f7+l7"), of
a prompt of p tokens at no more than p // 2 at each end. The prompt ends with the token that predicts the first one with
a loss; in decoding it is what is read at first, and generated tokens are left alone. In plain text, whose first token
has a loss already, there is nothing to edit: use "all", every token. Packing, padding and what is kept for the backward
pass: `jaxpeft.reft`.

R = Q of the QR decomposition (with a positive diagonal) of a free matrix X (d, r), through which it is differentiated;
X starts orthonormal. Computed as h (W - R) + b: one product. W - R and R are float32 and cast to the stream's dtype for
the products.

Paper: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv:2404.03592. Numbers and starts are
those of pyreft: W and b in U(-1/sqrt(d), 1/sqrt(d)), so that the start is not at the base; `init="base"` starts at it,
with W = R and b = 0. As in the published runs for commonsense reasoning one set is shared between both ends, and trains
at 9e-4. Deviations: pyreft makes R of Householder reflections, which gives the same matrices by other numbers; its data
sets count a prompt without its last token, here it is the last of the last ones; no dropout, which there falls on the
whole edited state; no activation on h W + b.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpeft import reft
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method

INITS = ("linear", "base")


def change(own: reft.Leaves, h: jax.Array) -> jax.Array:
    """(h W + b - h R) R^T of states h (..., d), in their dtype."""
    r = reft.orthonormal(own["rotate"])
    w = own["source"].astype(jnp.float32) - r
    z = h @ w.astype(h.dtype) + own["bias"].astype(h.dtype)
    return z @ r.T.astype(h.dtype)


def loreft(
    rank: int = 8,
    positions: str = "f7+l7",
    share: bool = True,
    init: str = "linear",
    layers: Sequence[int] | None = None,
) -> Method:
    """LoReFT behind each layer.

    Args:
      rank: r, at most d.
      positions: "f7+l7", "f7", "l7": so many first and last tokens of each prompt; "all": every token.
      share: whether both ends of a prompt have one set of R, W and b.
      init: "linear": as a linear map starts; "base": W = R and b = 0, which starts at the base.
      layers: numbers of the layers whose output is edited, ascending; None: all.

    Returns:
      The method; it trains `layers/loreft/rotate` (L, d, r), X, `source` (L, d, r), W, and `bias` (L, r); without
      sharing `layers/loreft/first/...` and `last/...`. It has no merged form.

    Raises:
      InputError: for a setting out of range, or data without prompts.
    """
    config = dict(locals())
    if init not in INITS:
        raise InputError(f"loreft: init {init!r} is not one of {', '.join(INITS)}")

    def start(key, d):
        of_r, of_w, of_b = jax.random.split(key, 3)
        rotate = jax.nn.initializers.orthogonal()(of_r, (d, rank))
        if init == "base":
            return {"rotate": rotate, "source": reft.orthonormal(rotate), "bias": jnp.zeros(rank)}
        return {"rotate": rotate, "source": reft.uniform(of_w, d, d, rank), "bias": reft.uniform(of_b, d, rank)}

    return reft.interventions(
        "loreft", config, change, start, rank=rank, positions=positions, share=share, layers=layers
    )


ABOUT = About(
    summary="edits of a prompt's first and last hidden states, within a trained orthonormal subspace",
    level="module",
    trains="the edits, 2dr + r numbers per layer",
    saves="gradients and optimizer state of all but the edits; it keeps d more activations per layer",
    reference="Wu et al. 2024, arXiv:2404.03592",
    example={"rank": 4, "positions": "f2+l3"},
    promises=Promises(block_bytes=reft.block_bytes, starts_at_base=False, merges=False),
    defaults=Defaults(lr=9e-4),
)
