"""Derivatives along one direction, forwards, of functions with parts that have backward rules of their own.

    f(x), df(x)[v] = jvp(f, x, v)

JAX does not differentiate a `custom_vjp` forwards, nor an operation with several implementations
(`pallas_kernels.platform`). What they compute is plain JAX: here the traced function is run again with the plain
computation in their place, in loops and branches too, and that is differentiated. A tangent flows beside each value,
and nothing is kept for later.

It is the derivative of what the function computes, to which the difference of two of its values comes close too: what
stands under a `stop_gradient` counts, as kernels whose results are given another derivative compute under one. Rules of
forward mode (`custom_jvp`) stay, but for those that ask which tangents are zero: they share work with a gradient (the
loss makes it chunk by chunk), which is not wanted here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from jaxpeft.backward.inline import evaluate, opened
from pallas_kernels.platform import DEFAULTS

_BODIES = ("jaxpr", "branches", "body_jaxpr", "cond_jaxpr")  # what loops, branches and `shard_map` run


def jvp(function: Callable[[Any], tuple[Any, Any]], at: Any, along: Any) -> tuple[Any, Any, Any]:
    """(value, its derivative along a direction, what else the function says).

    Args:
      function: x -> (value, aux), pytrees of arrays.
      at: x, a pytree of arrays.
      along: the direction, as x.

    Raises:
      TypeError: of JAX, for an operation that has no derivative at all.
    """
    leaves, treedef = jax.tree.flatten(at)
    closed, shape = jax.make_jaxpr(lambda *x: function(treedef.unflatten(x)), return_shape=True)(*leaves)
    results = jax.tree.structure(shape)

    def plain(*x):
        return results.unflatten(evaluate(closed, x, _plain))

    return jax.jvp(plain, leaves, jax.tree.leaves(along), has_aux=True)


def _plain(equation: Any, inputs: list[Any]) -> Any:
    """What takes an equation's place, as in `evaluate`: what it computes, as plain JAX; None where it may stay."""
    name, params = equation.primitive.name, equation.params
    if name == "custom_vjp_call" or (name == "custom_jvp_call" and params["symbolic_zeros"]):
        return evaluate(_closed(params["call_jaxpr"]), inputs, _plain)
    if name == "stop_gradient":
        return inputs
    if name in DEFAULTS:
        default, static = DEFAULTS[name], dict(params["static"])
        flat = lambda *leaves: jax.tree.leaves(default(*params["treedef"].unflatten(leaves), **static))
        return evaluate(jax.make_jaxpr(flat)(*inputs), inputs, _plain)
    bodies = {key: params[key] for key in _BODIES if key in params}
    if not bodies or name not in ("scan", "while", "cond", "shard_map"):
        return None
    changed = {key: jax.tree.map(_opened, body, is_leaf=_is_jaxpr) for key, body in bodies.items()}
    return equation.replace(params={**params, **changed})


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _opened(jaxpr: Any) -> Any:
    """A body made plain, closed where it was."""
    plain = opened(_closed(jaxpr), _plain)
    return plain if isinstance(jaxpr, ClosedJaxpr) else plain.jaxpr
