"""Derivatives forwards, through what has a rule of its own for the backward pass alone.

    f(x), f'(x) v        by one pass, which carries the tangent of every array beside it and keeps nothing

Loops over layers, the loss and the kernels have backward rules (`jax.custom_vjp`), or no derivative at all
(`pallas_kernels.platform.operation`), and JAX takes neither forwards. What they compute is plain JAX all the same. So
the function is traced, and differentiated as what it computes: a rule's function in the place of the rule, an
operation's plain implementation in the place of its kernel. `jax.custom_jvp` stays, as it is a rule for this.

What only changes a gradient, as `stop_gradient` and straight-through estimates, is no part of what is computed: the
derivative is that of the function, as finite differences find it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxpeft.backward.inline import evaluate, opened
from pallas_kernels.platform import PLAINLY

_traced = jax.make_user_context(default_value=False)  # a part of what JAX knows kept traces by
_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}


def taken() -> bool:
    """Whether what is traced now is differentiated forwards."""
    return _traced.value


def derivative(function: Callable[[Any], tuple[Any, Any]], at: Any, tangent: Any) -> tuple[Any, Any, Any]:
    """(f(at), f'(at) tangent, auxiliary outputs of f).

    Args:
      function: f(x) -> (result, auxiliary outputs), pytrees of arrays.
      at: x.
      tangent: like x.
    """
    leaves, treedef = jax.tree.flatten(at)
    with _traced(True):
        traced, shapes = jax.make_jaxpr(lambda *leaves: function(treedef.unflatten(leaves)), return_shape=True)(*leaves)
    structure = jax.tree.structure(shapes)

    def plain(x):
        return jax.tree.unflatten(structure, evaluate(traced, jax.tree.leaves(x), _plain))

    return jax.jvp(plain, (at,), (tangent,), has_aux=True)


def _plain(equation: Any, inputs: list[Any]) -> list[Any] | None:
    """What an equation gives in plain JAX, None where it does."""
    name, params = equation.primitive.name, equation.params
    if name == "custom_vjp_call":
        return evaluate(params["call_jaxpr"], inputs, _plain)
    if name == "stop_gradient":
        return inputs
    if name in PLAINLY:
        return PLAINLY[name](inputs, **params)
    if name in _BODIES and any(_changes(body) for field in _BODIES[name] for body in jax.tree.leaves(params[field])):
        bodies = {field: jax.tree.map(lambda body: opened(body, _plain), params[field]) for field in _BODIES[name]}
        return equation.primitive.bind(*inputs, **{**params, **bodies})
    return None


def _changes(program: Any) -> bool:
    """Whether a program, or one that it calls, has an equation that `_plain` changes."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    if not isinstance(jaxpr, Jaxpr):
        return False
    return any(
        equation.primitive.name in ("custom_vjp_call", "stop_gradient")
        or equation.primitive.name in PLAINLY
        or any(_changes(value) for value in jax.tree.leaves([*equation.params.values()]))
        for equation in jaxpr.eqns
    )
