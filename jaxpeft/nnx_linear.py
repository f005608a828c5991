"""A linear NNX module as the product of a matrix, and with adapters around that product.

NNX has no interceptors. A linear module that has adapters becomes one of a subclass of its class, whose call puts them
around the product; their parameters lie in the module (`hidden/lora/a`), so transformations that split and merge it
take them along.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxpeft import sites, tree
from jaxpeft.errors import InputError
from jaxpeft.linear import (
    Linear,
    Product,
    kind_of_module,
    leaf_of,
    letters,
    no_plain_convolution,
    parts_of,
    product_of_convolution,
    product_of_equation,
    product_of_table,
    product_over_axes,
)
from jaxpeft.model import Context
from jaxpeft.quant import Folded, unfolded

KINDS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.Embed)
_ADAPTERS, _KEYS = "site_adapters", "site_keys"  # attributes of a module with adapters


def axes(module: Any) -> Linear:
    """The axes of a linear module's kernel, by its own attributes; 0 and 0 where no matrix is what it computes with."""
    kind, given, other = type(module).__name__, kernel_of(module).get_value().shape, kind_of_module(module)
    shape: tuple[int, ...]
    why, plain = "", True
    if isinstance(module, nnx.Embed):
        inputs, outputs, shape = 1, 1, (module.num_embeddings, module.features)
    elif isinstance(module, nnx.Conv):
        inputs, outputs, shape = len(module.kernel_shape) - 1, 1, tuple(module.kernel_shape)
        why = no_plain_convolution(module)
    elif isinstance(module, nnx.Linear):
        inputs, outputs, shape = 1, 1, (module.in_features, module.out_features)
        plain = module.dot_general is jax.lax.dot_general
    elif isinstance(module, nnx.LinearGeneral):
        inputs, outputs = len(module.in_features), len(module.out_features)
        shape = (*(size for _, size in sorted(module.batch_axis.items())), *module.in_features, *module.out_features)
        plain = module.dot_general is None and module.dot_general_cls is None
        if module.batch_axis:
            why = f"its {kind} has batch_axis {dict(module.batch_axis)}, a matrix for each index of them"
    else:
        inputs, outputs = letters(parts_of(module.einsum_str))
        shape, plain = tuple(module.kernel_shape), module.einsum_op is jnp.einsum
    if type(module).__call__ not in [known.__call__ for known in KINDS]:
        why = f"{kind} has a __call__ of its own"
    elif isinstance(module, nnx.Embed) and type(module).attend is not nnx.Embed.attend:
        why = f"{kind} has an attend of its own"
    elif not plain:
        why = f"its {kind} has a product of its own"
    elif given[len(given) - len(shape) :] != shape:
        why = f"its kernel of {given} is {shape} of {kind} with layers that are not on axis 0, where an adapter's are"
    if why or not inputs:
        return Linear(0, 0, len(given), why, other)
    return Linear(inputs, outputs, len(shape), kind=other)


def kernel_of(module: Any) -> nnx.Param:
    """The parameter that is the matrix of one of `KINDS`."""
    return getattr(module, leaf_of(module))


# Modules with adapters.


@dataclasses.dataclass(eq=False)
class Acted:
    """(adapter's name, site) of what has run. It is in the module: what caches a trace by its module keeps this too."""

    sites: set[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter at its site, without its parameters."""

    name: str
    path: str
    module: linen.Module
    acted: Acted


class _Key(nnx.Param):
    """A key of an adapter's dropout; a parameter for transformations, so that it is cut where the kernel is."""


def _call(module: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """`__call__` of a linear module with adapters, which it puts around its product."""
    kind = type(module).__bases__[0]
    return _around(module, inspect.signature(kind.__call__).bind(module, *args, **kwargs).arguments)


def _attend(module: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """`attend` of a table with adapters."""
    return _around(module, inspect.signature(nnx.Embed.attend).bind(module, *args, **kwargs).arguments)


def _around(module: Any, call: Mapping[str, Any]) -> jax.Array:
    x, kernel, bias, back, through = _product(module, call)
    adapters: list[tuple[Any, str, Context]] = []
    keys, told = getattr(module, _KEYS), {entry.name: entry.ctx for entry in sites.in_force()}
    for adapter in getattr(module, _ADAPTERS):
        adapter.acted.sites.add((adapter.name, adapter.path))
        rngs = {"dropout": keys[adapter.name].get_value()} if adapter.name in keys else {}
        leaves = _values(getattr(module, adapter.name)) if hasattr(module, adapter.name) else {}
        adapters.append((sites.Bound(adapter.module, leaves, rngs), adapter.path, told.get(adapter.name, Context())))
    with jax.named_scope(adapters[0][1] if adapters else type(module).__bases__[0].__name__):
        y = sites.around(adapters, x, kernel, bias, through)
    y = back(y if bias is None else y + bias.astype(y.dtype))
    wanted = getattr(module, "preferred_element_type", None)
    y = y if wanted is None else y.astype(wanted)
    sharding = call.get("out_sharding")
    return y if sharding is None else jax.sharding.reshard(y, sharding)


@functools.cache
def _adapted(kind: type) -> type:
    """The subclass of a class of linear modules that has adapters."""
    own = {"__call__": _call, "attend": _attend} if issubclass(kind, nnx.Embed) else {"__call__": _call}
    return type(kind)(f"Adapted{kind.__name__}", (kind,), {"__doc__": kind.__doc__, **own})


def adapt(
    module: Any, adapters: list[Adapter], flat: tree.Flat, layers: tuple[int, ...], key: jax.Array | None
) -> None:
    """Puts adapters and their parameters into a linear module.

    Args:
      module: the module, which becomes one of a subclass of its class.
      adapters: of it.
      flat: {path: leaf} of all parameters; of these an adapter's are taken.
      layers: the axes in front of the kernel's own, which a dropout key has too.
      key: of dropout, or None.
    """
    kind: Any = type(module)
    module.__class__ = _adapted(kind)
    setattr(module, _ADAPTERS, nnx.static(tuple(adapters)))
    keys = {}
    for adapter in adapters:
        scope = f"{adapter.path}/{adapter.name}/"
        own = {path.removeprefix(scope): unfolded(leaf) for path, leaf in flat.items() if path.startswith(scope)}
        if own:
            setattr(module, adapter.name, _params(tree.unflatten(own)))
        if key is not None:
            fresh = jax.random.fold_in(key, zlib.crc32(scope.encode()))
            keys[adapter.name] = _Key(jax.random.split(fresh, layers) if layers else fresh)
    setattr(module, _KEYS, nnx.Dict(keys))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Held:
    """A packed kernel of several axes in its module, which may ask for its own shape, not for the matrix's."""

    kernel: Folded

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.own_shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.kernel.dtype


def held(leaf: Any) -> Any:
    """A leaf as the module's parameter holds it."""
    return _Held(leaf) if isinstance(leaf, Folded) else leaf


def _params(leaves: Mapping[str, Any]) -> nnx.Dict:
    return nnx.Dict({k: _params(v) if isinstance(v, Mapping) else nnx.Param(v) for k, v in leaves.items()})


def _values(node: Any) -> Any:
    return {name: _values(node[name]) for name in node} if isinstance(node, nnx.Dict) else node.get_value()


def _product(module: Any, call: Mapping[str, Any]) -> Product:
    """What a linear module's call computes, as the product of a matrix; in the type in which the module computes."""
    kernel = kernel_of(module).get_value()
    kernel = kernel.kernel if isinstance(kernel, _Held) else kernel
    if isinstance(module, nnx.Embed):
        method = "attend" if "query" in call else "__call__"
        return product_of_table(call.get("query", call.get("inputs")), kernel, module.dtype, method)
    x = call["inputs"]
    bias = None if module.bias is None else module.bias.get_value()
    x = x.astype(module.dtype or jnp.promote_types(x.dtype, kernel.dtype))
    if isinstance(module, nnx.Conv):
        return product_of_convolution(module, x, kernel, bias)
    if isinstance(module, nnx.Linear):
        return Product(x, kernel, bias, lambda y: y)
    if isinstance(module, nnx.LinearGeneral):
        return product_over_axes(x, kernel, bias, module.axis, module.out_features)
    equation = parts_of(call.get("einsum_str") or module.einsum_str)
    if letters(equation) != letters(parts_of(module.einsum_str)):
        raise InputError(f"the equation {call['einsum_str']} reads the kernel otherwise than {module.einsum_str}")
    return product_of_equation(x, kernel, bias, equation, module.kernel_shape)
