"""Natural GaLore: GaLore whose projected gradients are turned by the inverse of an empirical Fisher matrix.

    g = vec(dR) (k,)               of one kernel's R, k = r max(n, m): GaLore's dR = P^T dW, or dW P
    G = [g_1 ... g_s] (k, s)       the last s of them, this step's among them
    F = lambda I + G G^T           (k, k), which is never made
    g~ = lambda F^-1 g = g - G (lambda I + G^T G)^-1 G^T g        (Woodbury)
                       = lambda G (lambda I + G^T G)^-1 e         e picks g out of G: g = G e; nothing cancels

g~ takes dR's place before clipping and the optimizer; everything else is GaLore's (`jaxpeft/methods/galore.py`), and
what has no projection keeps its gradient. The system is s x s and solved by Cholesky, a layer at a time.

What it costs: G lies in the optimizer's state, s k float32 numbers for each kernel, with s = 20 ten times Adam's two
moments of R. (At rank r = 1/20 of the smaller side, that is as much as a whole float32 gradient: the paper's table of
memory, which equals GaLore's, does not count it.)

Source: Das 2024, "Natural GaLore", arXiv:2410.16029, and its code. Deviations: g~ is lambda times that of the code,
whose F^-1 g is 1/lambda = 1000 times as long: Adam divides by it again, but clipping by the global norm would leave
nothing of the other leaves' gradients. G starts anew where P changes, as vectors of coordinates in other directions say
nothing about these; the code keeps them. With an optimizer that is not Adam lambda is a part of the step's length.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, View, blind
from jaxpeft.methods import galore as _galore
from jaxpeft.methods import lora as _lora


class NaturalState(NamedTuple):
    """inner: the optimizer's state.  history: {path of R: G (..., s, n, m)}, a ring.  steps: () int32, steps done."""

    inner: Any
    history: dict[str, jax.Array]
    steps: jax.Array


def natural_galore(
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    history: int = 20,
    damping: float = 1e-3,
    projection: str = "sketch",
    targets: _lora.Targets = "all-linear",
    rounding: str = "stochastic",
    which: str = "layers",
) -> Method:
    """Natural GaLore on the kernels that `targets` chooses, of those that the chain trains, or of the model's.

    Args:
      rank: as of `galore`, and so are the others not said here.
      every: steps between projections.
      scale: alpha, the update's factor.
      projection: how P is found.
      targets: the kernels.
      rounding: how bfloat16 weights are rounded.
      which: alone: what trains, as of `galore`.
      history: s, gradients that are kept, this step's among them.
      damping: lambda.

    Returns:
      The method; its leaves are GaLore's.

    Raises:
      InputError: as `galore` does, and for a history below 1 or a damping not above 0.
    """
    config = dict(locals())
    if history < 1:
        raise InputError(f"natural_galore: history {history} must be at least 1")
    if not 0 < damping < math.inf:
        raise InputError(f"natural_galore: damping {damping} must be a finite number above 0")
    base = {name: value for name, value in config.items() if name not in ("history", "damping")}
    method = _galore.projected(Spec("natural_galore", config), **base)

    @blind
    def update(optimizer, view):
        return preconditioned(optax.with_extra_args_support(optimizer), history, damping, every, projection)

    return method._replace(update=update)


def preconditioned(
    optimizer: optax.GradientTransformationExtraArgs, history: int, damping: float, every: int, projection: str
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, to which gradients of each R come as g~."""
    projected = lambda leaves: {path: leaf for path, leaf in leaves.items() if path.endswith("/galore/r")}

    def init(params):
        ring = {
            path: jnp.zeros((*leaf.shape[:-2], history, *leaf.shape[-2:]), jnp.float32)
            for path, leaf in projected(params).items()
        }
        return NaturalState(optimizer.init(params), ring, jnp.zeros((), jnp.int32))

    def update(grads, state, params=None, **extra):
        # A sketch's P is there from the step on that follows the one of its renewal.
        renewed = (state.steps - (projection == "sketch")) % every == 0
        rings, turned = {}, {}
        for path, gradient in projected(grads).items():
            kept = jnp.where(renewed, 0, state.history[path])
            place = state.steps % history
            rings[path] = kept.at[..., place, :, :].set(gradient.astype(jnp.float32))
            turned[path] = natural(rings[path], place, damping).astype(gradient.dtype)
        directions, inner = optimizer.update({**grads, **turned}, state.inner, params, **extra)
        return directions, NaturalState(inner, rings, state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def natural(history: jax.Array, place: Any, damping: float) -> jax.Array:
    """lambda (lambda I + G G^T)^-1 g, (..., n, m).

    Args:
      history: G (..., s, n, m) float32; what is not there yet is zero.
      place: which of them is g.
      damping: lambda.
    """

    def one(history):
        rows = history.reshape(len(history), -1)
        system = damping * jnp.eye(len(rows)) + jnp.matmul(rows, rows.T, precision="highest")
        # Scaled to a unit diagonal: gradients of a tenth and of a thousandth stand beside one another in it.
        root = jax.lax.rsqrt(jnp.diagonal(system))
        factor = jax.scipy.linalg.cho_factor(system * root * root[:, None])
        solved = root * jax.scipy.linalg.cho_solve(factor, root * jax.nn.one_hot(place, len(rows)))
        return damping * jnp.matmul(solved, rows, precision="highest").reshape(history.shape[1:])

    # One layer at a time: see galore's decompositions.
    return one(history) if history.ndim == 3 else jax.lax.map(one, history)


def state_numbers(view: View, rank: int, history: int = 20, **arguments) -> int:
    """Numbers of GaLore's state, and of s gradients of each R."""
    rings = {path: leaf for path, leaf in view.trained.items() if path.endswith("/galore/r")}
    return _galore.state_numbers(view, rank, **arguments) + history * tree.size(rings)


ABOUT = About(
    summary="GaLore with a natural gradient, from the projected gradients of the last steps",
    level="step",
    trains="what it names: by default the layers, their kernels in projected form",
    saves="as GaLore, but (s + 2) r max(n,m) numbers of optimizer state per kernel, of which 2 are Adam's; s is 20",
    chain="alone",
    reference="Das 2024, arXiv:2410.16029",
    example={"rank": 4, "every": 3, "history": 4},
    promises=Promises(
        site_bytes=_galore.saved_bytes,
        state=state_numbers,
        returns=lambda leaves: [path for path in leaves if path.endswith("/galore/r")],
    ),
    stored="base",
)
