"""Hybrid of ZO-Bench: gradients of the last layers, and two more forward passes for all that lies below them.

    deep      theta_d, the layers L - K ... L - 1:    g_d = dL/dtheta_d, by a backward pass that ends below them
    others    theta_s, embeddings, the first L - K layers, final norm and head:
              slope = (L(theta_s + eps z, theta_d) - L(theta_s - eps z, theta_d)) / (2 eps),   z ~ N(0, I)
    theta_d  <- theta_d - rate direction(g_d)
    theta_s  <- theta_s - ratio rate (slope z + decay theta_s)

The loss and g_d are those at theta, and the estimate is of the same batch: the products of three forward passes, and of
a backward pass of K layers. What the last K layers read for their gradients is kept, 1/L of full fine-tuning's for each
of them, and nothing of the layers below, whose plain activations are gone as the next layer has run. theta_d has
masters, gradients and moments; theta_s has none: its weights are moved in their own dtype, by a z that is made where it
is used (`jaxpeft.zeroth_order`).

In a chain, theta is what the other methods train, such as LoRA's factors (`hybrid+lora`), in float32: those of the last
K layers by their gradients and the run's optimizer, all others by -rate ratio slope z, which no optimizer sees and for
which there are no moments.

Paper: Zhang et al. 2024, "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark",
arXiv:2402.11592. Deviations: the estimate's rate is a fixed ratio of the other's, as an estimate has the length of z
and Adam's direction has not. Final norm and head, which lie behind the last layer, are among the others, as
`full(which="last:K")` has it: a head is often the table of embeddings. Otherwise those of `mezo`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree, zeroth_order
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, TRAINED, Leaves, Method, Moment, Objective, Spec, View, told
from jaxpeft.methods.full import full
from jaxpeft.zeroth_order import OWN, Settings

ESTIMATED = "hybrid/slopes"  # in aux


def hybrid(
    which: str = "last:1",
    eps: float = 1e-3,
    lr_ratio: float = 0.1,
    rounding: str = "stochastic",
    seeds: int = 1,
) -> Method:
    """Gradients for the last layers, and MeZO's estimate for what else trains.

    Args:
      which: "last:K": the last K layers have gradients.
      eps: how far the two evaluations lie from the parameters.
      lr_ratio: the learning rate of what is estimated over that of the last layers.
      rounding: of moved bfloat16 weights: "stochastic", or "nearest".
      seeds: n, directions per step, each of two evaluations.

    Returns:
      The method, a modifier. The parameters come in two segments, which `merge` joins.

    Raises:
      InputError: for another `which`, an eps or a ratio that is not above 0, an unknown rounding, or no seeds; for a
        model of fewer layers, or without a stack of them. When a step is traced: for a chain that trains nothing in the
        last layers, or nothing but them; weights that are quantized; a step without a learning rate of its own.
    """
    config = dict(locals())
    if not which.startswith("last:"):
        raise InputError(f"hybrid: which {which!r}: write last:K, the last K layers, which have gradients")
    if not 0 < lr_ratio < float("inf"):
        raise InputError(f"hybrid: lr_ratio {lr_ratio} must be a finite number above 0")
    last = full(which)
    estimate = zeroth_order.estimated(Settings("hybrid", eps, seeds, rounding))

    def others(view: View) -> View:
        """What the estimate is told: the last layers are as they are."""
        return view._replace(role=lambda path: FROZEN if last.trainable(path) else view.role(path))

    def gradient(objective: Objective, view: View) -> Objective:
        rest_of = others(view)
        if not any(map(last.trainable, view.trained)):
            raise InputError(f"hybrid: nothing trains in the layers of which={which}; put mezo in its place")
        if not (rest_of.trained or rest_of.moved):
            raise InputError(f"hybrid: nothing trains beside the layers of which={which}; leave hybrid out")
        estimated = estimate.gradient(objective, rest_of)

        def value_and_grad(trainable, rest, batch, key, opt_state):
            deep, own = tree.split(trainable, last.trainable)
            (_, said), grads = estimated.value_and_grad(own, {**rest, **deep}, batch, key, opt_state)
            slopes = {name: x for name, x in said.items() if name.startswith("slope")}
            # One after the other, so that what the backward pass keeps is not there in the evaluations.
            batch, slopes, grads = jax.lax.optimization_barrier((batch, slopes, grads))
            (loss, aux), of_deep = objective.value_and_grad(deep, {**rest, **own}, batch, key, opt_state)
            return (loss, {**aux, **slopes, ESTIMATED: slopes["slopes"]}), {**grads, **of_deep}

        return objective._replace(value_and_grad=value_and_grad)

    def update(optimizer: optax.GradientTransformation, view: View) -> optax.GradientTransformation:
        if not others(view).trained:
            return optimizer
        mask = lambda deep: lambda leaves: {path: last.trainable(path) == deep for path in leaves}
        return optax.chain(optax.masked(optimizer, mask(True)), optax.masked(optax.scale(lr_ratio), mask(False)))

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        if moment.rate is None:
            raise InputError("hybrid: what is estimated has a rate of its own: give make_train_step a rate")
        aux = {**moment.aux, "slopes": told("hybrid", moment.aux, ESTIMATED)}
        return estimate.move(leaves, moment._replace(aux=aux, rate=jnp.float32(lr_ratio) * moment.rate))

    return Method(
        prepare=last.prepare,
        gradient=gradient,
        update=update,
        move=move,
        merge=last.merge_own,
        specs=(Spec("hybrid", config),),
        alone=lambda path: TRAINED if last.trainable(path) else OWN,
    )


def kept_bytes(config, itemsize: int, **_) -> int:
    """Bytes per token that one more layer below the last keeps: none."""
    del config, itemsize
    return 0


def state_numbers(view: View, which: str = "last:1", **_) -> int:
    """Adam's two for each number of the last layers that trains."""
    deep, _ = tree.split(view.trained, full(which).trainable)
    return 2 * tree.size(deep)


ABOUT = About(
    summary="gradients for the last layers, and two forward passes along a random direction for all else",
    level="step",
    trains="the last layers; what else there is moves, in its own dtype; in a chain, what the others train",
    saves="activations, gradients, masters and optimizer state of all but the last layers",
    reference="Zhang et al. 2024, arXiv:2402.11592",
    example={"which": "last:1"},
    promises=Promises(layer_bytes=kept_bytes, state=state_numbers, falls=0.05, lr=3e-3),
    defaults=Defaults(lr=1e-5, lr_with={"lora": 2e-4}, beside=1.0),
    stored="base",
)
