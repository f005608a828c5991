"""Visual query tuning: trained queries ask every layer of a frozen encoder, and a linear classifier reads the answers.

    h_0, h_1, ..., h_L                    the frozen stream (B, S, d), bit for bit that of the model without queries
    Z_l = block_l(P_l; keys, values of h_{l-1})        P_l (q, d) trained, for each layer l = 1 .. L
    logits = W [LN(pool(h_L)), LN(Z_1), ..., LN(Z_L)]  W ((L q + 1) d, labels) with bias; LN without parameters

In a layer's attention queries come from P_l, keys and values from the frozen tokens only, padding left out: queries see
neither each other nor those of other layers. Their rows go through the rest of the frozen block and are then read out.
There is no chain from layer to layer: the gradient of P_l passes the q rows of layer l, and no frozen token.

Kept for the backward pass are each layer's keys and values, 2 d per token; what became of the q rows is computed again.

The stream that the model returns is h_L followed by the L q answers, (B, S + L q, d). The model's own classifier and
final norm are not used.

Paper: Tu, Mai, Chao 2023, "Visual Query Tuning", arXiv:2212.03220. P starts uniform in (-v, v), v = sqrt(6 / (3 p^2 +
d)) with patches of p x p pixels; in a text encoder, where there are none, d stands for 3 p^2. Deviations: the pooled
state is normalised like the answers; features are not selected by a group lasso; there is no dropout.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import features, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.model import Batch, Context, Model, Stack


def layer_bytes(config: Any, itemsize: int, **_) -> int:
    """Bytes per token that one more layer keeps, beside what does not grow with the tokens of a row."""
    return 2 * itemsize * config.num_attention_heads * config.head_dim


def vqt(queries: int = 5, normalize: bool = True) -> Method:
    """Visual query tuning of an encoder that classifies rows (ViT, BERT, RoBERTa).

    Args:
      queries: q, per layer.
      normalize: whether the classifier reads layer-normed vectors.

    Returns:
      The method; it trains `vqt/queries` (L, q, d) and `vqt/head`, and has no merged form.

    Raises:
      InputError: for no queries, a decoder, or a model that classifies no rows.
    """
    config = {"queries": queries, "normalize": normalize}
    if queries < 1:
        raise InputError(f"vqt: queries {queries} must be at least 1")

    def forward(model, view):
        d = features.width("vqt", model)
        _check(model)
        features.check_run("vqt", model)
        answers = model.config.num_hidden_layers * queries

        def init(key, params):
            params = model.init(key, params)
            if "vqt" in params:
                return params
            keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"vqt")))
            patch = getattr(model.config, "patch_size", None)
            bound = math.sqrt(6 / ((3 * patch**2 if patch else d) + d))
            shape = (model.config.num_hidden_layers, queries, d)
            own = {
                "queries": jax.random.uniform(keys[0], shape, minval=-bound, maxval=bound),
                "head": features.fresh_linear(keys[1], (answers + 1) * d, model.config.num_labels),
            }
            return {**params, "vqt": own}

        def pool(x, batch):
            first = model.stack.pool(x[:, :-answers], batch)
            x = jnp.concatenate([first[:, None], x[:, -answers:]], axis=1)
            x = features.layer_norm(x) if normalize else x
            return x.reshape(x.shape[0], -1)

        def head(params, x):
            return features.linear(x, params["vqt"]["head"]).astype(jnp.float32)

        stack = model.stack._replace(run=_run, pool=pool, head=head, frozen_layers=True)
        return model._replace(init=init, stack=stack)

    return Method(
        forward=forward,
        roles=trains(lambda path: path.startswith("vqt/")),
        merge=features.no_merge("vqt"),
        specs=(Spec("vqt", config),),
    )


def _check(model: Model) -> None:
    if features.decodes(model):
        raise InputError(f"vqt: asks encoders; {model.config.model_type} is a decoder")
    if not model.config.num_labels:
        raise InputError("vqt: reads rows for a classifier; this model has no labels (see --task classify)")


def _run(stack: Stack, params: tree.Params, batch: Batch, key=None, cache=None):
    """The stream (B, S + L q, d): the frozen tokens, then the answers in the order of the layers."""
    del key
    x, ctx = jax.lax.stop_gradient(stack.embed(params, batch, None))
    seen = (features.segments_of(x, batch) > 0).astype(jnp.int32)
    rows, answers = x.shape[0], []
    for segment, first, end in tree.segments(params):

        def body(x, per_layer, segment=segment):
            layer, index, asked = per_layer
            x, keys = jax.lax.stop_gradient(stack.block(layer, x, ctx.at(index), {}, segment))
            asked = asked.astype(x.dtype)

            @functools.partial(jax.checkpoint, prevent_cse=False)
            def ask(asked):
                asked = jnp.broadcast_to(asked, (rows, *asked.shape))
                own = Context({"segment_ids": jnp.ones(asked.shape[:2], jnp.int32)}, layer=index)
                return stack.block(layer, asked, own, {**keys, "segment_ids": seen}, segment)[0]

            return x, ask(asked)

        frozen = jax.lax.stop_gradient(params[segment])
        x, z = jax.lax.scan(body, x, (frozen, jnp.arange(first, end), params["vqt"]["queries"][first:end]))
        answers.append(z)
    z = jnp.concatenate(answers).swapaxes(0, 1).reshape(rows, -1, x.shape[-1])
    return jnp.concatenate([x, z], axis=1), cache


ABOUT = About(
    summary="trained queries that ask every layer of a frozen encoder, and a linear classifier of the answers",
    level="input",
    trains="q d numbers per layer, and the classifier",
    saves="the backbone's backward pass, and all activations but keys and values",
    reference="Tu et al. 2023, arXiv:2212.03220",
    example={"queries": 2},
    promises=Promises(layer_bytes=layer_bytes, starts_at_base=False, merges=False, classifies=True),
)
