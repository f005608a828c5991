"""Any Linen module as a `Model`: its linear maps are found by looking at it run, and their kernels taken for matrices.

A site is what runs: `nn.Dense`, `nn.DenseGeneral` (so attention's projections) and `nn.Einsum`, and where targets name
them `nn.Conv` and `nn.Embed`, inside `nn.scan`, `nn.vmap`, `nn.remat` and shared modules as anywhere. Which axes of a
kernel are inputs and which outputs is asked of the module that owns it while it is traced, never of a shape, and so is
where layers lie. Where there are several, the parameters of the model hold the kernel as `jaxpeft.quant.Folded`, while
an adapter reads it; merging gives the module's own shapes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.interpreters import partial_eval

from jaxpeft import sites, tree
from jaxpeft.errors import InputError
from jaxpeft.linear import Linear, leaf_of, runs
from jaxpeft.linear import axes as axes_of
from jaxpeft.model import Batch, Model, opaque
from jaxpeft.quant import EMBEDDING, Folded, fold, unfolded_all


def from_linen(
    module: nn.Module,
    example: Batch,
    method: Callable | str | None = None,
    collections: Mapping[str, Any] | None = None,
) -> Model:
    """A Model of any Linen module called as `module(**batch)`.

    Site methods (LoRA and its family) attach to its linear maps by path; methods on the stack do not apply. Parameters
    in boxes (`nn.with_partitioning`, `nn.with_logical_partitioning`) are opened; the model's `axes` keeps their names.

    Args:
      module: the module; a dropout key is passed as the rng "dropout".
      example: a batch, to initialise with, and to see the module run.
      method: what to call instead of `__call__`.
      collections: variables besides "params" (batch statistics), which are read and never changed.
    """
    rest = nn.meta.unbox(dict(collections or {}))
    seen = _look(module, example, method)
    tables = [site for site, linear in seen.items() if linear.kind == EMBEDDING]
    for site in _read_otherwise(module, example, method, rest) if tables else ():
        why = "the model reads its table by itself, too, where no adapter acts: call it, or its attend"
        seen[site] = seen[site]._replace(inputs=0, outputs=0, why=why)

    def adopt(params):
        flat = tree.flatten(nn.meta.unbox(params))
        return tree.unflatten({path: _folded(path, leaf, seen) for path, leaf in flat.items()})

    def init(key, params):
        return adopt(params if params else module.init(key, **example, method=method)["params"])

    def apply(params, batch, key):
        rngs = {} if key is None else {"dropout": key}
        with sites.intercepted():
            return module.apply({"params": own_shapes(params), **rest}, **batch, rngs=rngs, method=method)

    def made():
        run = lambda key, batch: module.init(key, **batch, method=method).get("params", {})
        return jax.eval_shape(run, jax.random.key(0), dict(example))

    def shapes():
        return tree.flatten(nn.meta.unbox(made()))

    def axes():
        return {path: names for path, names in tree.flatten(nn.get_partition_spec(made())).items() if any(names)}

    return Model(init, opaque(apply), adopt=adopt, shapes=shapes, axes=axes)


def own_shapes(params: Mapping[str, Any]) -> tree.Params:
    """Nested parameters with every kernel as its module has it, but for packed ones, which `sites` computes with."""
    return tree.unflatten(unfolded_all(tree.flatten(params)))


def _look(module: nn.Module, example: Batch, method: Any) -> dict[str, Linear]:
    """{path: what was seen} of the linear maps that run; nothing is computed.

    Of kernels that are stacked a second run tells on which axes of theirs the layers lie.
    """
    seen: dict[str, Linear] = {}
    stacks: set[str] = set()

    def intercept(call, args, kwargs, context):
        y = call(*args, **kwargs)
        owner = context.module
        if runs(owner, context.method_name):
            kernel = nn.meta.unbox(owner.get_variable("params", leaf_of(owner)))
            path = "/".join(owner.path)
            seen[path] = axes_of(owner, kernel, args, kwargs)
            if path in stacks:
                owner.put_variable("params", leaf_of(owner), _Stack(kernel, ()))
        return y

    def kernels():
        def run(key, batch):  # a new function each time, as traces are kept
            with nn.intercept_methods(intercept):
                return module.init(key, **batch, method=method)

        made = tree.flatten(jax.eval_shape(run, jax.random.key(0), dict(example)).get("params", {}))
        return {_site(path): leaf for path, leaf in made.items() if _site(path) in seen and _is_kernel(path)}

    stacks |= {site for site, leaf in kernels().items() if nn.meta.unbox(leaf).ndim > seen[site].ndim}
    if stacks:
        for site, leaf in kernels().items():
            if site in stacks and leaf.behind:
                why = (
                    f"its layers are stacked on axis {leaf.behind[0]} (variable_axes), where an adapter's are on axis 0"
                )
                seen[site] = seen[site]._replace(inputs=0, outputs=0, why=why)
    return seen


def _read_otherwise(module: nn.Module, example: Batch, method: Any, rest: Mapping[str, Any]) -> list[str]:
    """The embeddings whose table the outputs depend on without their calls, by the dependences of the trace."""

    def intercept(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Embed) and runs(context.module, context.method_name):
            tables.add("/".join(context.module.path))
            return jnp.zeros_like(y)
        return y

    def run(leaves, batch, key):
        with nn.intercept_methods(intercept):
            variables = {**rest, "params": tree.unflatten(leaves)}
            rngs = {"params": key, "dropout": key}
            return module.apply(variables, **batch, method=method, rngs=rngs, mutable=True)[0]

    tables: set[str] = set()
    key, batch = jax.random.key(0), dict(example)
    made = jax.eval_shape(lambda key, batch: module.init(key, **batch, method=method), key, batch)
    leaves = tree.flatten(nn.meta.unbox(made["params"]))
    jaxpr = jax.make_jaxpr(run)(leaves, batch, key).jaxpr
    used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]
    read = {path for path, use in zip(sorted(leaves), used, strict=False) if use}
    return sorted(site for site in tables if f"{site}/embedding" in read)


class _Stack(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """A kernel, and on which axis each transformation has stacked it, from the inside out."""

    value: Any
    layers: tuple[int, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> _Stack:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> _Stack:
        del params
        return self.replace(layers=(*self.layers, index % self.value.ndim))

    def remove_axis(self, index: int, params: Any) -> _Stack:
        del index, params
        return self.replace(layers=self.layers[:-1])

    @property
    def behind(self) -> list[int]:
        """The axes of layers that do not lie in front of the kernel's own."""
        return [axis for before, axis in enumerate(self.layers) if axis > before]


def _site(path: str) -> str:
    return path.rpartition("/")[0]


def _is_kernel(path: str) -> bool:
    return path.rpartition("/")[2] in ("kernel", "embedding")


def _folded(path: str, leaf: Any, seen: Mapping[str, Linear]) -> Any:
    """A leaf as the model keeps it."""
    if not _is_kernel(path) or isinstance(leaf, Folded) or not hasattr(leaf, "ndim"):
        return leaf
    if path.endswith("embedding") and _site(path) not in seen:
        return leaf
    linear = seen.get(_site(path), Linear(0, 0, leaf.ndim))
    if leaf.ndim < linear.ndim:
        raise InputError(f"{path} has shape {leaf.shape}; its module has {linear.ndim} axes")
    return fold(leaf, linear.inputs, linear.outputs, linear.why, linear.kind)
