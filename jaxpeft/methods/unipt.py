"""UniPT: tokens of every layer, gathered around those of the last one, beside a frozen backbone.

    F_1, ..., F_N                            outputs (B, S, d) of the chosen layers, under stop_gradient
    t_i = LN(P_i F_i)                        P_i (d, k) with bias, k = d / reduction; the anchor is a = t_N
    M_i = l1(relu(a t_i^T) * seen)           (S, S) per row: no softmax, no 1 / sqrt(k); rows sum to 1, or are all 0
    m_i = M_i t_i + t_i
    c_i = softmax_i(w . (mean(a) * mean(t_i)))
    u = a + LN(Q sum_i c_i m_i)              Q (k, k) with bias
    out = U relu(u)                          U (k, d) with bias; with `residual`: h_L + U relu(u), U starting at zero

`seen` is the token's own segment without padding, and in a decoder only its own position and those before it; means are
over what is seen, so in a decoder each token has its own c_i. `out` goes to the model's pooling and frozen head.

Kept for the backward pass is F_i, which P_i reads: d per token and chosen layer. The rest is computed again for a few
rows at a time, so S x S scores exist for these only. (As published, without recomputation, each layer also keeps its
scores, S numbers per token, and t_i and m_i.)

Paper: Diao et al. 2024, arXiv:2308.14316, the form for BERT. Deviations: causal masks and causal means for decoders;
`residual`, after the form for CLIP, starts at the base; the bias inside the softmax over layers, which it does not see,
is left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import decoding, features, tree
from jaxpeft.about import About, Promises
from jaxpeft.method import Method, Spec, trains
from jaxpeft.model import Batch, Stack

EPSILON = 1e-6  # of a row's sum


def layer_bytes(config: Any, itemsize: int, **_) -> int:
    """Bytes per token that one more chosen layer keeps: its output."""
    return itemsize * config.hidden_size


def unipt(reduction: int = 2, layers: Sequence[int] | None = None, residual: bool = False) -> Method:
    """UniPT on any model with visible layers.

    Args:
      reduction: d over k.
      layers: whose outputs are gathered, ascending from 0, the last one being the anchor's; None: all.
      residual: whether the result is added to the backbone's last state; it then starts at the base.

    Returns:
      The method; it trains `unipt/...` and has no merged form.

    Raises:
      InputError: for a reduction that does not divide the model's width, or layers that it lacks.
    """
    features.check_settings("unipt", reduction, layers)
    config = {"reduction": reduction, "layers": layers, "residual": residual}

    def forward(model, view):
        features.check_run("unipt", model)
        d = features.width("unipt", model)
        k = features.divided("unipt", "hidden size", d, reduction)
        causal = features.decodes(model)

        def chosen(params):
            return features.check_layers("unipt", layers, features.count_layers("unipt", params))

        def init(key, params):
            params = model.init(key, params)
            if "unipt" in params:
                return params
            own = jax.random.fold_in(key, zlib.crc32(b"unipt"))
            return {**params, "unipt": _fresh(own, len(chosen(params)), d, k, residual)}

        def run(stack, params, batch, key=None, cache=None):
            del key
            return _run(stack, params, batch, cache, chosen(params), causal, residual)

        base_cache = model.stack.init_cache

        def init_cache(rows, length):
            count = model.config.num_hidden_layers if layers is None else len(layers)
            return {
                "base": base_cache(rows, length),
                "t": jnp.zeros((count, rows, length, k), model.config.dtype),
                "segment_ids": jnp.zeros((rows, length), jnp.int32),
                "index": jnp.zeros((), jnp.int32),
            }

        stack = model.stack._replace(run=run, init_cache=init_cache if base_cache else None, frozen_layers=True)
        return model._replace(init=init, stack=stack)

    return Method(
        forward=forward,
        roles=trains(lambda path: path.startswith("unipt/")),
        merge=features.no_merge("unipt"),
        specs=(Spec("unipt", config),),
    )


def _fresh(key, count: int, d: int, k: int, residual: bool) -> tree.Params:
    keys = jax.random.split(key, 4)
    up = features.fresh_linear(keys[3], k, d)
    return {
        **features.fresh_projections(keys[0], count, d, k),
        "confidence": jax.random.normal(keys[1], (k,)) / k**0.5,
        "gather": features.fresh_linear(keys[2], k, k),
        "gather_norm": features.fresh_norm(k),
        "up": jax.tree.map(jnp.zeros_like, up) if residual else up,
    }


def _run(stack: Stack, params: tree.Params, batch: Batch, cache, layers, causal: bool, residual: bool):
    own = params["unipt"]
    found = features.frozen_pass(stack, params, batch, layers, cache and cache["base"])
    segments = features.segments_of(found.last, batch)
    if cache is None:

        def beside(f, segments):
            t = features.project(own, f)
            return gather(own, t, t, features.Seen(segments, segments, jnp.zeros((), jnp.int32)).mask(causal))

        out = features.by_rows(beside, found.kept, segments, axes=(1, 0))
    else:
        assert found.cache is not None
        start = cache["index"]
        new = features.project(own, found.kept)
        t = jax.lax.dynamic_update_slice_in_dim(cache["t"], new, start, axis=2)
        keys = jax.lax.dynamic_update_slice_in_dim(cache["segment_ids"], segments, start, axis=1)
        out = gather(own, t, new, features.Seen(segments, keys, start).mask(causal))
        base = decoding.advanced(found.cache, segments.shape[1])
        cache = {"base": base, "t": t, "segment_ids": keys, "index": start + segments.shape[1]}
    return (found.last + out if residual else out), cache


def gather(own: tree.Params, t: jax.Array, mine: jax.Array, seen: jax.Array) -> jax.Array:
    """U relu(u), (B, S, d).

    Args:
      own: the method's parameters.
      t: t_i of all tokens, (N, B, C, k).
      mine: of those that ask, (N, B, S, k).
      seen: (B, S, C) bool.
    """
    anchor = mine[-1]
    scores = jnp.einsum("nbsk,nbck->nbsc", jnp.broadcast_to(anchor, mine.shape), t).astype(jnp.float32)
    scores = jax.nn.relu(scores) * seen
    scores = scores / (scores.sum(-1, keepdims=True) + EPSILON)
    m = jnp.einsum("nbsc,nbck->nbsk", scores.astype(t.dtype), t) + mine
    share = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    mean = jnp.einsum("bsc,nbck->nbsk", share.astype(t.dtype), t)
    logits = jnp.einsum("k,bsk,nbsk->nbs", own["confidence"], mean[-1].astype(jnp.float32), mean.astype(jnp.float32))
    gathered = jnp.einsum("nbs,nbsk->bsk", jax.nn.softmax(logits, axis=0).astype(t.dtype), m)
    u = anchor + features.layer_norm(features.linear(gathered, own["gather"]), **own["gather_norm"])
    return features.linear(jax.nn.relu(u), own["up"])


ABOUT = About(
    summary="tokens of all layers gathered around the last layer's, beside the frozen model",
    level="stack",
    trains="projections and the gathering of tokens",
    saves="the backbone's backward pass, and all activations but d numbers per token and layer",
    reference="Diao et al. 2024, arXiv:2308.14316",
    example={"reduction": 4},
    promises=Promises(layer_bytes=layer_bytes, starts_at_base=False, merges=False),
)
