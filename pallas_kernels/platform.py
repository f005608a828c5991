"""One operation, several implementations: which one runs is decided where the program is lowered, by its platform.

A Python `if` on the attached backend decides too early: a step that is compiled on a CPU host for a described TPU would
get the CPU's implementation. Here an operation is a primitive of its own; its lowering rules know the platform, the
shapes and the number of devices, and only the chosen implementation is ever traced for lowering.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


class Implementation(NamedTuple):
    """One way to compute an operation.

    function: (*args, **static) -> arrays, of the shapes and dtypes of the default implementation.
    supports: (*args as ShapeDtypeStructs, **static) -> bool.
    partitions: whether the compiler can partition it over the devices of a mesh.
    """

    function: Callable[..., Any]
    supports: Callable[..., bool]
    partitions: bool = False


# operation's name -> its FLOPs as a function of its (args as ShapeDtypeStructs, **static); see `operation`.
FLOPS: dict[str, Callable[..., float]] = {}


def operation(
    name: str, default: Callable[..., Any], flops: Callable[..., float] | None = None, **platforms: Implementation
) -> Callable[..., Any]:
    """A function whose implementation is chosen by the platform that it is lowered for.

    Args:
      name: of the primitive.
      default: (*args, **static) -> arrays; plain JAX, any shapes. It also says what comes out.
      flops: what the operation costs, by the same arguments as shapes.
      **platforms: "tpu" or "cuda" -> Implementation, used where it supports the arguments.

    Returns:
      function(*args, **static): args are pytrees of arrays, static arguments hashable. It has no derivative: wrap it
      in a `custom_vjp`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    if flops is not None:
        FLOPS[name] = flops

    def shapes(leaves, treedef):
        return treedef.unflatten([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves])

    def outputs(leaves, treedef, static):
        return jax.eval_shape(functools.partial(default, **dict(static)), *shapes(leaves, treedef))

    def call(*args, **static):
        leaves, treedef = jax.tree.flatten(args)
        items = tuple(sorted(static.items()))
        found = primitive.bind(*leaves, treedef=treedef, static=items)
        return jax.tree.unflatten(jax.tree.structure(outputs(leaves, treedef, items)), found)

    def lowering(chosen: Implementation | None):
        def rule(ctx, *operands, treedef, static):
            function = default
            if chosen is not None and chosen.supports(*shapes(ctx.avals_in, treedef), **dict(static)):
                if chosen.partitions or getattr(ctx.module_context.axis_context, "num_devices", 1) == 1:
                    function = chosen.function

            def flat(*leaves):
                return jax.tree.leaves(function(*treedef.unflatten(leaves), **dict(static)))

            return mlir.lower_fun(flat, multiple_results=True)(ctx, *operands)

        return rule

    def mapped(args, axes, *, treedef, static):
        """vmap: one after the other."""
        size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)

        def one(i):
            taken = [
                x if axis is None else jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)
                for x, axis in zip(args, axes, strict=True)
            ]
            return primitive.bind(*taken, treedef=treedef, static=static)

        found = jax.lax.map(one, np.arange(size))
        return found, [0] * len(found)

    @primitive.def_abstract_eval
    def _(*avals, treedef, static):
        kind = type(avals[0])
        return [kind(out.shape, out.dtype) for out in jax.tree.leaves(outputs(avals, treedef, static))]

    @primitive.def_impl
    def _(*leaves, treedef, static):
        return jax.jit(functools.partial(primitive.bind, treedef=treedef, static=static))(*leaves)

    batching.primitive_batchers[primitive] = mapped
    mlir.register_lowering(primitive, lowering(None))
    for platform, implementation in platforms.items():
        mlir.register_lowering(primitive, lowering(implementation), platform=platform)
    return call
