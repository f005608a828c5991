"""Sparse MeZO: MeZO on the small weights alone; the mask is made of the weights wherever one is read.

    slope = (L(theta + eps m z) - L(theta - eps m z)) / (2 eps),   m = [|theta| <= h],  z ~ N(0, I)
    theta <- theta - rate (slope m z + decay theta)

h is the least number that has a share of 1 - `sparsity` of a tensor's magnitudes, as they are at the start, at or below
it: one float32 per tensor and layer, a frozen leaf `sparse_mezo/<path>` () or (L,). m is a function of theta as it is
before the step, so that both evaluations and the update have the same one. It is made beside z, on what a block reads
and in the update, and no mask is ever stored. A weight that grows past h stays there.

h is found without a copy or a sort: a float's bits are in its order, so that 31 counts of what lies at or below a
number of 31 bits give it, exactly. Norms' scales, which are all the same at the start, are all at or below h.

Kept for the backward pass: nothing, as MeZO. An estimate's variance is in proportion to what is perturbed; so the rate
may be 1 / (1 - sparsity) times MeZO's, which is the default's ratio.

The weights move alone. In a chain with methods that train there is no size to choose by: B of LoRA begins at zero.

Paper: Liu et al. 2024, "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
arXiv:2402.15751, which has sparsities of 0.5 to 0.8 and chooses by task. Deviations: those of `mezo`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxpeft import tree, zeroth_order
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, Method, Spec
from jaxpeft.methods.full import full
from jaxpeft.quant import unfolded
from jaxpeft.zeroth_order import OWN, Settings

SCOPE = "sparse_mezo/"


@functools.partial(jax.jit, static_argnames="share")
def threshold(w: jax.Array, share: float) -> jax.Array:
    """The least h, () float32, with at least a share of |w| at or below it: the k-th smallest, k = round(share size).

    Args:
      w: of any shape, without infinities.
      share: above 0, at most 1.
    """
    count = max(round(share * w.size), 1)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        bits = jax.lax.bitcast_convert_type(jnp.abs(w.astype(jnp.float32)), jnp.int32)
        enough = jnp.sum(bits <= middle, dtype=jnp.int32) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    _, high = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(0x7F800000)))
    return jax.lax.bitcast_convert_type(high, jnp.float32)


def sparse_mezo(
    which: str = "all", sparsity: float = 0.75, eps: float = 1e-3, rounding: str = "stochastic", seeds: int = 1
) -> Method:
    """Sparse MeZO on the weights that `which` names.

    Args:
      which: as in `full`: "all", "biases", "norms", "head", "embeddings", "last:K" or a regular expression.
      sparsity: share of each tensor's weights, the largest ones, that stay as they are.
      eps: how far the two evaluations lie from the weights.
      rounding: of bfloat16 weights: "stochastic", or "nearest".
      seeds: directions per step, each of two evaluations, whose estimates are averaged.

    Returns:
      The method; it adds thresholds `sparse_mezo/<path>`, which `merge` takes away.

    Raises:
      InputError: for a sparsity outside [0, 1), an eps that is not above 0, an unknown rounding, no seeds, what `full`
        refuses, or weights that are quantized. When a step is traced: for a chain in which something else trains, or a
        step without a learning rate of its own.
    """
    config = dict(locals())
    if not 0 <= sparsity < 1:
        raise InputError(f"sparse_mezo: sparsity {sparsity} must be at least 0 and below 1")
    weights = full(which)

    def forward(model, view):
        def init(key, params):
            flat = tree.flatten(model.init(key, params))
            for path in [path for path in flat if view.role(path) is OWN and SCOPE + path not in flat]:
                zeroth_order.check_moves("sparse_mezo", path, flat[path])
                of = functools.partial(threshold, share=1 - sparsity)
                leaf = unfolded(flat[path])
                flat[SCOPE + path] = jax.lax.map(of, leaf) if tree.stacked(path) else of(leaf)
            return tree.unflatten(flat)

        return model._replace(init=init)

    def merge(params):
        flat = tree.flatten(params)
        return weights.merge_own(tree.unflatten({path: x for path, x in flat.items() if not path.startswith(SCOPE)}))

    settings = Settings("sparse_mezo", eps, seeds, rounding, scope=SCOPE, others=False)
    return zeroth_order.estimated(settings)._replace(
        prepare=weights.prepare,
        forward=forward,
        merge=merge,
        specs=(Spec("sparse_mezo", config),),
        alone=lambda path: OWN if not path.startswith(SCOPE) and weights.trainable(path) else FROZEN,
    )


ABOUT = About(
    summary="MeZO on the small weights alone, by a mask that is made where a weight is read and never stored",
    level="step",
    trains="of the weights that it names those of small magnitude, in their own dtype",
    saves="all that a forward pass does not need: activations, gradients, optimizer state, masters, and the mask",
    chain="alone",
    reference="Liu et al. 2024, arXiv:2402.15751",
    example={"sparsity": 0.75},
    promises=Promises(backward=False, state=zeroth_order.state_numbers, falls=0.05, lr=1e-2),
    defaults=Defaults(lr=4e-6, direction="sgd"),
    stored="base",
)
