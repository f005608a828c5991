"""MeZO: the gradient from two forward passes along one random direction; no backward pass.

    slope = (L(theta + eps z) - L(theta - eps z)) / (2 eps),   z ~ N(0, I)
    theta <- theta - rate (slope z + decay theta)

With `seeds=n`, slope z is the mean of n such estimates in independent directions (n-SPSA), whose distance from the
gradient falls with 1 / sqrt(n): a step has n times the evaluations, one after the other, in the memory of one.

z is a function of the step's key, the leaf's path, the layer and the element (`jaxpeft.noise`), and is made where it is
used: in the evaluations inside the block, on one layer's part of a stack, and in the update once more
(`jaxpeft.zeroth_order`). Nothing is kept for a backward pass, there are no gradients of weights, and no optimizer
state: a step needs what a forward pass needs.

Variants, of ZO-Bench (Zhang et al. 2024, arXiv:2402.11592), by `variant` and `sparsity`:

    one_sided      slope = (L(theta + eps z) - L(theta)) / eps; n + 1 evaluations
    sign           sign(slope) z in place of slope z
    momentum       slope z through momentum of 0.9, or Adam: the optimizer's state of what trains, one or two numbers
    adam           each; weights that move have none, but train, with masters, in `mezo+full`
    conservative   of theta - rate slope z, theta + rate slope z and theta what has the least loss; 5 evaluations
    blockwise      a slope for each layer, and one for what lies outside, each of two evaluations in which nothing else
                   is perturbed; the update follows when all are known
    forward        slope = dL/deps at theta along z, exactly: one evaluation with a tangent beside each value (forward
                   mode), in plain JAX in place of kernels; eps is not used
    sparsity       z is 0 at a share of the elements, chosen by the same counter: nothing is stored, nothing rescaled

All have the memory of one evaluation, but for the moments, and the tangents of `forward` (Llama-3.2-1B, 4 x 1024, h200:
0.47 GiB of workspace in place of 0.30). A first-order part of the model is `hybrid`.

Alone, a run is the base and a slope and a rate of each step: `jaxpeft export --replay` makes any step's weights again
of them, without a checkpoint or a forward pass. (Not of `blockwise`, whose slopes are not among a step's metrics.)

In a chain, theta is what the other methods train, in float32, and slope z is its gradient. Alone, theta is the weights
that `which` names: they are moved leaves, in their own dtype.

Paper: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333.

Deviations: parameters are not changed in place and restored, which adds rounding errors four times a step, but are
perturbed as they are read: vectors in float32, matrices rounded to their dtype. Moved bfloat16 weights are rounded
stochastically, so that steps below half of their last place, which most are, are not lost (`rounding="nearest"` as in
the paper). Micro-batches of a step share z.
"""

from __future__ import annotations

from jaxpeft import zeroth_order
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, Method, Spec
from jaxpeft.methods.full import full
from jaxpeft.zeroth_order import OWN, Settings

EPS = 1e-3


def mezo(
    which: str = "all",
    eps: float = EPS,
    rounding: str = "stochastic",
    seeds: int = 1,
    variant: str = "sgd",
    sparsity: float = 0.0,
) -> Method:
    """MeZO on what the other methods of a chain train, or, alone, on the weights that `which` names.

    Args:
      which: alone: as in `full`: "all", "biases", "norms", "head", "embeddings", "last:K" or a regular expression.
      eps: how far the two evaluations lie from the parameters. The paper has 1e-3 for weights, 1e-2 for LoRA, 1e-1 for
        prefixes.
      rounding: of moved bfloat16 weights: "stochastic", or "nearest".
      seeds: n, directions per step, each of two evaluations.
      variant: "sgd"; "one_sided", of two points; "sign", of the slope; "conservative", the best of three steps;
        "blockwise", a slope for each layer; "forward", in forward mode; or "momentum" or "adam", which need something
        that trains beside, as `mezo+full`.
      sparsity: share of the elements, chosen anew at random for each direction, that z is 0 at.

    Returns:
      The method, a modifier.

    Raises:
      InputError: for an eps that is not above 0, an unknown rounding or variant, no seeds, several of a conservative
        step, a sparsity outside [0, 1), an eps of a forward gradient, or what `full` refuses. When a step is traced:
        for weights that are quantized, moments of weights that move, or a step without a learning rate of its own.
    """
    config = dict(locals())
    if variant == "forward" and eps != EPS:
        raise InputError(f"mezo: eps {eps} has no effect with variant=forward, which evaluates at the parameters alone")
    weights = full(which)
    return zeroth_order.estimated(Settings("mezo", eps, seeds, rounding, 1 - sparsity, variant=variant))._replace(
        prepare=weights.prepare,
        merge=weights.merge_own,
        specs=(Spec("mezo", config),),
        alone=lambda path: OWN if weights.trainable(path) else FROZEN,
    )


ABOUT = About(
    summary="two forward passes along a random direction in place of a backward pass",
    level="step",
    trains="alone: the weights that it names, in their own dtype; else what the rest of the chain trains",
    saves="all that a forward pass does not need: activations, gradients, optimizer state, float32 masters",
    reference="Malladi et al. 2023, arXiv:2305.17333",
    example={},
    promises=Promises(backward=False, state=zeroth_order.state_numbers, falls=0.05, lr=1e-3),
    defaults=Defaults(lr=1e-6, lr_with={"lora": 5e-5, "prefix": 1e-2}, beside=0.25, direction="sgd"),
    stored="base",
)
