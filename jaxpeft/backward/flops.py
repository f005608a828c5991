"""Floating-point operations of a program's matrix products, counted on its jaxpr.

A compiler's own count takes the body of a scan once, and knows nothing of kernels; here a scan counts as often as it
runs, and operations of `pallas_kernels` by their own formula. Elementwise work is left out, as is customary.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxpeft import tree
from pallas_kernels.platform import FLOPS
from pallas_kernels.stacked import Stacked


def count_flops(jaxpr: Any) -> float:
    """2 per multiply-add of every `dot_general` and convolution, and of what lies inside loops and calls.

    The body of a `while` counts once: its length is not known. Of the branches of a `cond` the dearest counts.
    """
    return sum(equation_flops(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def flops_by_name(jaxpr: Any, around: str = "", times: int = 1) -> dict[str, float]:
    """The same by JAX's name stack of each product: "jvp(Block)/mlp/gate_proj/dot_general"; their sum is the count."""
    found: dict[str, float] = {}
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = f"{around}{eqn.source_info.name_stack}/" if str(eqn.source_info.name_stack) else around
        inner = [x for x in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(x)]
        if eqn.primitive.name in FLOPS or not inner:
            own = {f"{name}{eqn.primitive.name}": times * equation_flops(eqn)}
        elif eqn.primitive.name == "cond":
            branches = [flops_by_name(branch, name, times) for branch in eqn.params["branches"]]
            own = max(branches, key=lambda branch: sum(branch.values()))
        else:
            length = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            own = {}
            for x in inner:
                _add(own, flops_by_name(x, name, times * length))
        _add(found, own)
    return {name: count for name, count in found.items() if count}


def _add(total: dict[str, float], more: dict[str, float]) -> None:
    for name, count in more.items():
        total[name] = total.get(name, 0.0) + count


def equation_flops(eqn: Any) -> float:
    """The same of one equation."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
        features = params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(out) * math.prod(kernel) / kernel[features]
    if name in FLOPS:
        leaves = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        return FLOPS[name](*params["treedef"].unflatten(leaves), **dict(params["static"]))
    if name == "cond":
        return max(count_flops(branch) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    inner = [x for x in jax.tree.leaves(params, is_leaf=_is_jaxpr) if _is_jaxpr(x)]
    return times * sum(count_flops(x) for x in inner)


def equation_bytes(eqn: Any) -> int:
    """Bytes of the arrays of numbers that an equation reads and writes, each once; of a stack of kernels one layer."""
    given: Any = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars if _of_numbers(v.aval)]
    if eqn.primitive.name in FLOPS:
        given = eqn.params["treedef"].unflatten(given)
    arrays = [*jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, Stacked))]
    arrays += [v.aval for v in eqn.outvars if _of_numbers(v.aval)]
    layers = [(x.stack, x.stack.shape[0]) if isinstance(x, Stacked) else (x, 1) for x in arrays]
    return sum(tree.num_bytes(x) // count for x, count in layers)


def _of_numbers(aval: Any) -> bool:
    return hasattr(aval, "shape") and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")
