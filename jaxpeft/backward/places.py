"""Arrays that a loop writes part by part, and how what makes a part writes it there.

A loop over layers keeps some of a layer's values, those of step s at kept[s] of an array (steps, ...). XLA fuses that
write into what it compiles itself. A kernel's result it would copy there; so where a value that is kept is what an
operation of ours makes, seen in another shape or under a name at most, the operation that writes into a stack
(`pallas_kernels.platform.INTO`) takes its place, and whoever reads the value reads it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jaxpeft import constraints
from jaxpeft.backward.inline import evaluate
from jaxpeft.backward.programs import name_of
from pallas_kernels.platform import INTO
from pallas_kernels.stacked import Stacked


def empty(shape: Sequence[int], dtype: Any) -> jax.Array:
    """An array of which every element is written before it is read: GPUs and TPUs do not fill it, CPUs do.

    It is zeros under `jax_debug_nans` and `jax_debug_infs`, which look at what is between two operations, and on a
    mesh, of whose GPUs each would have the whole of an array that is not filled.

    Args:
      shape: of the array.
      dtype: any.
    """
    if jax.config.jax_debug_nans or jax.config.jax_debug_infs or constraints.divides():
        return jnp.zeros(shape, dtype)
    return jax.lax.empty(tuple(shape), dtype)


def makers(closed: ClosedJaxpr, outputs: Sequence[int]) -> dict[int, Any]:
    """{output: the equation that makes it, and can write it into a stack}, of those of `outputs` that have one.

    Args:
      closed: a traced function.
      outputs: numbers of its outputs.
    """
    jaxpr = closed.jaxpr
    made = {v: equation for equation in jaxpr.eqns for v in equation.outvars}
    found: dict[int, Any] = {}
    for number in outputs:
        v = jaxpr.outvars[number]
        while not isinstance(v, Literal) and (equation := made.get(v)) is not None:
            if equation.primitive.name in INTO and v is equation.outvars[0]:
                if all(equation is not other for other in found.values()):
                    found[number] = equation
                break
            v = _passed(equation, v)
            if v is None:
                break
    return found


def _passed(equation: Any, v: Any) -> Any:
    """The input of an equation that a result is, with other axes at most; None if it is none."""
    if name_of(equation) is not None or equation.primitive.name == "reshape":
        return equation.invars[0]
    if equation.primitive.name == "custom_vjp_call":  # called where nothing is differentiated
        called = equation.params["call_jaxpr"].jaxpr
        result = called.outvars[equation.outvars.index(v)]
        return equation.invars[called.invars.index(result)] if result in called.invars else None
    return None


def compute(
    closed: ClosedJaxpr,
    inputs: Sequence[Any],
    stacks: Mapping[int, jax.Array],
    step: jax.Array,
    names: Mapping[int, str],
) -> list[Any]:
    """The traced function, some of whose results are written into stacks.

    Args:
      closed: the function.
      inputs: one of each of its variables.
      stacks: {output, one of `makers`: a stack (steps, *its shape)}.
      step: () int32, the place in the stacks.
      names: {output: what the instructions that write it are called, for who reads profiles}.

    Returns:
      Its outputs; in the places of those in `stacks`, the stacks, in which they are now.
    """
    if not stacks:
        return jaxpr_as_fun(closed)(*inputs)
    wanted = {id(equation): number for number, equation in makers(closed, list(stacks)).items()}
    written: dict[int, jax.Array] = {}

    def change(equation, known):
        number = wanted.get(id(equation))
        if number is None:
            return None
        params, whole, y = equation.params, stacks[number], equation.outvars[0].aval
        out = Stacked(whole.reshape(whole.shape[0], *y.shape), step)
        scope = str(equation.source_info.name_stack)
        with jax.named_scope(f"{scope}/{names[number]}" if scope else names[number]):
            made, *results = INTO[equation.primitive.name](
                *params["treedef"].unflatten(known),
                out,
                implementation=params["implementation"],
                divided=params["divided"],
                **dict(params["static"]),
            )
        written[number] = made.reshape(whole.shape)
        return results

    results = evaluate(closed, inputs, change)
    return [written.get(number, result) for number, result in enumerate(results)]
