"""Any Linen module as a `Model`: its linear maps are found by looking at it run, and their kernels taken for matrices.

A site is what runs: `nn.Dense`, `nn.DenseGeneral` (so attention's projections) and `nn.Einsum`, inside `nn.scan`,
`nn.remat` and shared modules as anywhere. Which axes of a kernel are inputs and which outputs is asked of the module
that owns it while it is traced, never of a shape. Where there are several, the parameters of the model hold the kernel
as `jaxpeft.quant.Folded`, while an adapter reads it; merging gives the module's own shapes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxpeft import sites, tree
from jaxpeft.errors import InputError
from jaxpeft.linear import KINDS, Linear, axes
from jaxpeft.model import Batch, Model, opaque
from jaxpeft.quant import Folded, fold, unfolded_all


def from_linen(
    module: nn.Module,
    example: Batch,
    method: Callable | str | None = None,
    collections: Mapping[str, Any] | None = None,
) -> Model:
    """A Model of any Linen module called as `module(**batch)`.

    Site methods (LoRA and its family) attach to its linear maps by path; methods on the stack do not apply. Parameters
    in boxes (`nn.with_partitioning`, `nn.with_logical_partitioning`) are opened.

    Args:
      module: the module; a dropout key is passed as the rng "dropout".
      example: a batch, to initialise with, and to see the module run.
      method: what to call instead of `__call__`.
      collections: variables besides "params" (batch statistics), which are read and never changed.
    """
    rest = nn.meta.unbox(dict(collections or {}))
    seen = _look(module, example, method)

    def adopt(params):
        flat = tree.flatten(nn.meta.unbox(params))
        return tree.unflatten({path: _folded(path, leaf, seen) for path, leaf in flat.items()})

    def init(key, params):
        return adopt(params if params else module.init(key, **example, method=method)["params"])

    def apply(params, batch, key):
        rngs = {} if key is None else {"dropout": key}
        with sites.intercepted():
            return module.apply({"params": own_shapes(params), **rest}, **batch, rngs=rngs, method=method)

    return Model(init, opaque(apply), adopt=adopt)


def own_shapes(params: Mapping[str, Any]) -> tree.Params:
    """Nested parameters with every kernel as its module has it, but for packed ones, which `sites` computes with."""
    return tree.unflatten(unfolded_all(tree.flatten(params)))


def _look(module: nn.Module, example: Batch, method: Any) -> dict[str, Linear]:
    """{path: what was seen} of the linear maps that run; nothing is computed."""
    seen: dict[str, Linear] = {}

    def intercept(call, args, kwargs, context):
        y = call(*args, **kwargs)
        owner = context.module
        if isinstance(owner, KINDS) and context.method_name == "__call__":
            kernel = nn.meta.unbox(owner.get_variable("params", "kernel"))
            seen["/".join(owner.path)] = axes(owner, kernel, args, kwargs)
        return y

    def run(key, batch):
        with nn.intercept_methods(intercept):
            return module.init(key, **batch, method=method)

    jax.eval_shape(run, jax.random.key(0), dict(example))
    return seen


def _folded(path: str, leaf: Any, seen: Mapping[str, Linear]) -> Any:
    """A leaf as the model keeps it."""
    if path.rpartition("/")[2] != "kernel" or isinstance(leaf, Folded) or not hasattr(leaf, "ndim"):
        return leaf
    linear = seen.get(path.removesuffix("kernel").rstrip("/"), Linear(0, 0, leaf.ndim))
    if leaf.ndim < linear.ndim:
        raise InputError(f"{path} has shape {leaf.shape}; its module has {linear.ndim} axes")
    return fold(leaf, linear.inputs, linear.outputs)
