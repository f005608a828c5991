"""ZO2: MeZO with the layers' weights in the host's memory; a layer comes to the device once for all evaluations.

    for l = 1 ... L:    W_l to the device
                        x+ <- block(W_l + eps z_l, x+),   x- <- block(W_l - eps z_l, x-)
    slope = (L+ - L-) / (2 eps),   z ~ N(0, I)
    for each leaf, l = 1 ... L:    W_l to the device,   W_l <- W_l - rate (slope z_l + decay W_l),   and back

The layers' kernels (L, n, m) lie in pinned host memory, are read there, and each step leaves them in the buffers that
it found them in; the layers' vectors, embeddings, final norm and head lie on the device. There are two streams x+, x-
(B, S, d), with `seeds=n` 2 n of them, which go through a layer one after the other while it is there. On the device are
those, what lies outside the layers, and one or two layers, so the need grows with L by vectors alone. z is that of
`mezo` (`jaxpeft.noise`), and with equal seeds the steps are too: the loss, the slope and the weights. What only reads
the weights, an evaluation, brings each layer to the device likewise. A memory plan has no part in a step.

What it costs: the bytes of the layers go over the link to the host's memory twice towards the device and once back in
each step, whatever the batch. Nothing is kept for a backward pass.

Paper: Wang et al. 2025, "ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU
Memory", arXiv:2503.12668.

Deviations: the paper updates a layer when it comes for the next step, with the slope of the step before, so that each
layer comes once per step; what reads the weights between steps must then first finish the update. Here a step ends with
its own update in a second round, so that a checkpoint, an evaluation and `merge` see the weights as they are. Which
copies run beside products is the compiler's choice. Otherwise those of `mezo`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import constraints, tree, zeroth_order
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Objective, Spec, View
from jaxpeft.model import Batch, Model, entered, joined, nothing_before, runs_through_blocks
from jaxpeft.train.step import mean_over
from jaxpeft.zeroth_order import AWAY, OWN, Losses, Settings, perturbed


def zo2(eps: float = 1e-3, rounding: str = "stochastic", seeds: int = 1) -> Method:
    """MeZO on all weights, of which those of the layers lie in the host's memory.

    Args:
      eps: how far the two evaluations lie from the parameters.
      rounding: of bfloat16 weights: "stochastic", or "nearest".
      seeds: n, directions per step, each of two evaluations; all of them share a layer's way to the device.

    Returns:
      The method; it moves all parameters, in their own dtype.

    Raises:
      InputError: for an eps that is not above 0, an unknown rounding, or no seeds; for a model without layers. When a
        step is traced: for a chain in which something else trains, or runs the layers in its own way; quantized
        weights; a step without a learning rate of its own.
    """
    config = dict(locals())
    settings = Settings("zo2", eps, seeds, rounding, others=False)
    return zeroth_order.estimated(settings, together)._replace(
        prepare=unpacked,
        convert=lambda params: {},  # nothing, and what others pack is seen where it is loaded
        forward=lambda model, view: checked(model),
        specs=(Spec("zo2", config),),
        alone=lambda path: AWAY if tree.stacked(path) and path.endswith("/kernel") else OWN,
    )


def unpacked(params: tree.Params, view: View) -> tree.Params:
    """The parameters, refused where one that moves is quantized: of such none has a place in the host's memory."""
    for path, leaf in tree.flatten(params).items():
        if view.role(path) is OWN or view.role(path) is AWAY:
            zeroth_order.check_moves("zo2", path, leaf)
    return params


def checked(model: Model) -> Model:
    """The model, refused where it shows no layers."""
    if not model.stack.layered:
        raise InputError("zo2: the model shows no layers that could come to the device one by one; use mezo")
    return model


def together(
    objective: Objective, paths: frozenset[str], settings: Settings, trainable: Any, rest: Any, batch: Batch, key: Any
) -> Losses:
    """`zeroth_order.one_by_one`, with one way of the layers to the device for all evaluations of a micro-batch."""
    found: list[Model] = []

    def seen(model):
        found.append(model)
        return model

    objective.on(seen)
    (model,) = found  # as the chain has made it
    if not runs_through_blocks(model.stack.run) or model.stack.before is not nothing_before:
        raise InputError("zo2: another member of the chain runs the layers in its own way; put mezo in zo2's place")
    params = tree.combine(trainable, rest)

    def losses(words, amounts):
        def part(batch, key):
            del key
            streams, said = run(model, paths, settings, params, batch, words, amounts)

            def evaluate(_, point):
                words, amount, x, said = point

                def end(model):
                    noisy = perturbed(model, paths, words, amount, settings)
                    return noisy._replace(stack=noisy.stack._replace(run=lambda *_: (x, said)))

                return None, objective.on(end).value(trainable, rest, batch, None)

            values, aux = jax.lax.scan(evaluate, None, (words, amounts, streams, said))[1]
            return (values, {**aux, "weight": aux["weight"][0]}) if objective.parts > 1 else (values, aux)

        values, aux = mean_over(part, batch, key, objective.parts)
        return values, {**aux, "weight": jnp.broadcast_to(aux["weight"], values.shape)}

    return losses


def run(
    model: Model,
    paths: frozenset[str],
    settings: Settings,
    params: tree.Params,
    batch: Batch,
    words: jax.Array,
    amounts: jax.Array,
) -> tuple[jax.Array, Any]:
    """`scan_layers` of E evaluations, each layer's turn for all of them: (streams (E, B, S, d), what layers say).

    Args:
      model: at theta.
      paths: of theta's leaves.
      settings: of the method.
      params: nested, the stacks of layers in the host's memory.
      batch: dict of (B, S) arrays.
      words: (E, 3) int32, the draws.
      amounts: (E,) float32, how far each evaluation lies from theta.
    """

    def start(_, point):
        words, amount = point
        x, ctx, _ = entered(perturbed(model, paths, words, amount, settings).stack, params, batch)
        return None, (x, ctx)

    block = perturbed(model, paths, words[0], amounts[0], settings).stack.block  # `ctx` tells it draw and amount
    streams, contexts = jax.lax.scan(start, None, (words, amounts))[1]
    said = []
    for segment, first, end in tree.segments(params):

        def layers(streams, inputs, segment=segment):
            layer, index = inputs
            layer = constraints.gathered(layer, segment)

            def one(_, point):
                x, ctx = point
                x, sums = block(layer, x, ctx.at(index), None, segment)
                return None, (constraints.rows(x), sums)

            return jax.lax.scan(one, None, (streams, contexts))[1]

        streams, sums = jax.lax.scan(layers, streams, (params[segment], jnp.arange(first, end, dtype=jnp.int32)))
        said.append(sums)
    return streams, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), joined(said))


ABOUT = About(
    summary="mezo with the layers' weights in the host's memory, each on the device once for both evaluations",
    level="step",
    trains="all weights, in their own dtype",
    saves="what mezo saves, and on the device the weights of all layers but one or two at a time",
    chain="alone",
    reference="Wang et al. 2025, arXiv:2503.12668",
    example={},
    promises=Promises(backward=False, state=zeroth_order.state_numbers, falls=0.05, lr=1e-3),
    defaults=Defaults(lr=1e-6, direction="sgd"),
    stored="base",
)
