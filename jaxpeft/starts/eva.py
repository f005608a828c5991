"""EVA: A starts at the principal directions of what its site reads.

    X - mean(X) = U S V^T        X (N, n): the inputs of the site at all positions that count, of some batches
    A = V_r, with `whiten` V_r / sqrt(S_r);  B = 0

so that x A has the largest variance that r numbers can have. The decomposition is incremental (Ross et al. 2008): of
what is known, S V^T, the rows of the next batch less their mean, and one row for the change of the mean,

    M = [S V^T; X_t - mean(X_t); sqrt(N N_t / (N + N_t)) (mean - mean(X_t))]

the first 2 r right singular vectors are kept. They are found by subspace iteration on M^T M, so that no matrix of n x n
is made, and what is at work at a site is its inputs in float32.

Paper: Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv:2410.07170.
Deviations: the batches are those that the view gives (eight of a run), not as many as it takes until the directions
stay; ranks stay as they are given (rho = 1), as layers of a stack share one. The positions that count are those for
which the loss has a target, where PEFT's are the targets' own, one further on; of rows that are classified all that is
no padding. Each site is whitened once (in PEFT, sites that share an input divide the directions that they share in
turn).
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.starts import probes
from jaxpeft.starts.pair import Pair, Start

ITERATIONS = 8  # of the subspace; PEFT's are 4, each of M and of M^T

State = dict[str, jax.Array]


class Inputs(nn.Module):
    """The site's product. Parameters, whose gradient is what they become with this batch:

    vectors: V (n, q) float32.  values: S (q,).  mean: (n,).  count: () positions seen.
    """

    rank: int

    @nn.compact
    def __call__(self, inner, x, site, ctx):
        n = site.kernel.shape[0]
        shapes = {"vectors": (n, min(2 * self.rank, n)), "values": (min(2 * self.rank, n),), "mean": (n,), "count": ()}
        state = {name: self.param(name, nn.initializers.zeros, shape) for name, shape in shapes.items()}
        counts = ctx.rows.get(probes.COUNTS)
        weights = jnp.ones(x.shape[:-1]) if counts is None or counts.shape != x.shape[:-1] else counts
        y = inner(x)
        return y + _seen(state, x, weights.astype(jnp.float32)).astype(y.dtype)


@jax.custom_vjp
def _seen(state: State, x: jax.Array, weights: jax.Array) -> jax.Array:
    """Zero; the state's gradient is the next state."""
    del state, x, weights
    return jnp.zeros(())


_seen.defvjp(
    lambda state, x, weights: (jnp.zeros(()), (state, x, weights)),
    lambda saved, _: (updated(*saved), None, None),
)


def updated(state: State, x: jax.Array, weights: jax.Array) -> State:
    """The state with further rows.

    Args:
      state: of `Inputs`.
      x: (..., n) rows.
      weights: (...) float32: 1 for those that count, 0 for others.
    """
    with jax.default_matmul_precision("highest"):
        x, weights = x.reshape(-1, x.shape[-1]).astype(jnp.float32), weights.reshape(-1)
        count, new = state["count"], weights.sum()
        total, mean = jnp.maximum(count + new, 1), weights @ x / jnp.maximum(new, 1)
        known = state["vectors"] * state["values"]
        rows = (x - mean) * weights[:, None]
        moved = jnp.sqrt(count * new / total) * (state["mean"] - mean)

        def squared(v):
            """M^T M v."""
            return known @ (known.T @ v) + rows.T @ (rows @ v) + jnp.outer(moved, moved @ v)

        start = jax.random.normal(jax.random.key(0), known.shape)
        v = jax.lax.fori_loop(0, ITERATIONS, lambda _, v: jnp.linalg.qr(squared(v))[0], start)
        squares, turn = jnp.linalg.eigh(v.T @ squared(v))
        return {
            "vectors": v @ turn[:, ::-1],
            "values": jnp.sqrt(jnp.maximum(squares[::-1], 0)),
            "mean": (count * state["mean"] + new * mean) / total,
            "count": count + new,
        }


def eva(whiten: bool = False) -> Start:
    """The principal directions of the inputs.

    Args:
      whiten: divides each by the root of its singular value.

    Raises:
      InputError: of a model without batches.
    """

    def pairs(params, sites, view):
        if not sites:
            return {}
        flat, found = tree.flatten(params), probes.batches("lora: init 'eva'", view)
        shapes = {site: flat[f"{site.path}/kernel"].shape for site in sites}
        if found:
            through = any(not tree.stacked(site.path) for site in sites)  # the head too
            loss = probes.running(view.loss, whole=through)
            states, step = probes.gradients(view.base, params, sites, lambda site: Inputs(site.rank), loss)
            states = functools.reduce(step, found, states)
            a = {site: _factor(states[site.path], site.rank, whiten) for site in sites}
        else:
            a = {site: jnp.zeros((*shape[:-1], site.rank)) for site, shape in shapes.items()}
        b = {site: jnp.zeros((*shape[:-2], site.rank, shape[-1])) for site, shape in shapes.items()}
        return {site.path: Pair(a[site], b[site]) for site in sites}

    return Start(pairs, takes_out=False)


def _factor(state: State, rank: int, whiten: bool) -> jax.Array:
    """A (..., n, r); of each column the largest entry is positive."""
    a = state["vectors"][..., :rank]
    largest = jnp.take_along_axis(a, jnp.argmax(jnp.abs(a), axis=-2, keepdims=True), axis=-2)
    a = a * jnp.where(largest < 0, -1, 1)
    return a / jnp.sqrt(jnp.maximum(state["values"][..., None, :rank], 1e-12)) if whiten else a
