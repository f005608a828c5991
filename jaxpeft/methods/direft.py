"""DiReFT: hidden states of a prompt get a trained low-rank function of themselves added.

    h <- h + (h W + b) R^T        h (d,), W and R (d, r), b (r,)

LoReFT (`loreft.py`) without the orthonormal subspace and without the difference to what stood there: a linear layer of
rank r on the residual stream, behind each layer, at the first f and the last l tokens of the prompt ("f7+l7"), or at
all tokens. What counts as the prompt: `loreft.py`; what is kept for the backward pass: `jaxpeft.reft`.

Paper: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv:2404.03592. pyreft calls it
NodiReFT, and DiReFT what has an orthonormal R: here `orthogonal=True`, which makes R as in LoReFT. W, b and a free R
start in U(-1/sqrt(d), 1/sqrt(d)), as linear maps do in pyreft, so that the start is not at the base; `init="base"`
starts at it, with W = 0 and b = 0. Deviations: no dropout, no activation, and others that `loreft.py` names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpeft import reft
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method

INITS = ("linear", "base")


def change(own: reft.Leaves, h: jax.Array, orthogonal: bool = False) -> jax.Array:
    """(h W + b) R^T of states h (..., d), in their dtype."""
    r = reft.orthonormal(own["rotate"]) if orthogonal else own["rotate"]
    z = h @ own["source"].astype(h.dtype) + own["bias"].astype(h.dtype)
    return z @ r.T.astype(h.dtype)


def direft(
    rank: int = 4,
    positions: str = "f7+l7",
    share: bool = True,
    orthogonal: bool = False,
    init: str = "linear",
    layers: Sequence[int] | None = None,
) -> Method:
    """DiReFT behind each layer.

    Args:
      rank: r, at most d.
      positions: "f7+l7", "f7", "l7": so many first and last tokens of each prompt; "all": every token.
      share: whether both ends of a prompt have one set of R, W and b.
      orthogonal: whether R has orthonormal columns.
      init: "linear": as linear maps start; "base": W = 0 and b = 0, which starts at the base.
      layers: numbers of the layers whose output is edited, ascending; None: all.

    Returns:
      The method; it trains `layers/direft/rotate` (L, d, r), R, or the matrix that it is made of, `source` (L, d, r),
      W, and `bias` (L, r); without sharing `layers/direft/first/...` and `last/...`. It has no merged form.

    Raises:
      InputError: for a setting out of range, or data without prompts.
    """
    config = dict(locals())
    if init not in INITS:
        raise InputError(f"direft: init {init!r} is not one of {', '.join(INITS)}")

    def start(key, d):
        of_r, of_w, of_b = jax.random.split(key, 3)
        rotate = jax.nn.initializers.orthogonal()(of_r, (d, rank)) if orthogonal else reft.uniform(of_r, d, d, rank)
        if init == "base":
            return {"rotate": rotate, "source": jnp.zeros((d, rank)), "bias": jnp.zeros(rank)}
        return {"rotate": rotate, "source": reft.uniform(of_w, d, d, rank), "bias": reft.uniform(of_b, d, rank)}

    edit = functools.partial(change, orthogonal=orthogonal)
    return reft.interventions("direft", config, edit, start, rank=rank, positions=positions, share=share, layers=layers)


ABOUT = About(
    summary="low-rank linear functions added to a prompt's first and last hidden states",
    level="module",
    trains="the edits, 2dr + r numbers per layer",
    saves="gradients and optimizer state of all but the edits; it keeps d more activations per layer",
    reference="Wu et al. 2024, arXiv:2404.03592",
    example={"rank": 4, "positions": "f2+l3"},
    promises=Promises(block_bytes=reft.block_bytes, starts_at_base=False, merges=False),
    defaults=Defaults(lr=9e-4),
)
