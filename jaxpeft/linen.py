"""Any Linen module as a `Model`: its linear maps are found by looking at it run, and their kernels taken for matrices.

A site is what runs: `nn.Dense`, `nn.DenseGeneral` (so attention's projections) and `nn.Einsum`, inside `nn.scan`,
`nn.remat` and shared modules as anywhere. Which axes of a kernel are inputs and which outputs is asked of the module
that owns it while it is traced, never of a shape. Where there are several, the parameters of the model hold the kernel
as `jaxpeft.quant.Folded`, while an adapter reads it; merging gives the module's own shapes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Model, opaque
from jaxpeft.quant import Folded, fold, is_packed, unfolded_all

_KINDS = (nn.Dense, nn.DenseGeneral, nn.Einsum)


class Linear(NamedTuple):
    """A linear map that was seen: how many axes of its kernel are inputs and outputs, and how many there are in all.

    Both are 0 for what no matrix stands for.
    """

    inputs: int
    outputs: int
    ndim: int


class Product(NamedTuple):
    """A call of a linear module as the product of a matrix: `back((x @ kernel.reshape(n, m)) + bias.reshape(m))`.

    x: (..., n).  kernel: (n, m).  bias: (m,), or None.  back: (..., m) -> what the module gives.
    """

    x: jax.Array
    kernel: Any
    bias: jax.Array | None
    back: Callable[[jax.Array], jax.Array]


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
        return module.apply({"params": own_shapes(params), **rest}, **batch, rngs=rngs, method=method)

    return Model(init, opaque(apply), adopt=adopt)


def own_shapes(params: Mapping[str, Any]) -> tree.Params:
    """Nested parameters with every kernel as its module has it."""
    return tree.unflatten(unfolded_all(tree.flatten(params)))


def _look(module: nn.Module, example: Batch, method: Any) -> dict[str, Linear]:
    """{path: what was seen} of the linear maps that run; nothing is computed."""
    seen: dict[str, Linear] = {}

    def intercept(call, args, kwargs, context):
        y = call(*args, **kwargs)
        owner = context.module
        if isinstance(owner, _KINDS) and context.method_name == "__call__":
            kernel = nn.meta.unbox(owner.get_variable("params", "kernel"))
            seen["/".join(owner.path)] = _axes(owner, kernel, args, kwargs)
        return y

    def run(key, batch):
        with nn.intercept_methods(intercept):
            return module.init(key, **batch, method=method)

    jax.eval_shape(run, jax.random.key(0), dict(example))
    return seen


def _axes(module: nn.Module, kernel: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Linear:
    if isinstance(module, nn.Dense):
        return Linear(1, 1, 2)
    if isinstance(module, nn.DenseGeneral):
        outputs = len(_several(module.features))
        inputs = len(_several(module.axis))
        matrix = not _several(module.batch_dims)
    else:
        inputs, outputs = letters(_equation(module, args, kwargs))
        matrix = bool(inputs)
    return Linear(inputs, outputs, kernel.ndim) if matrix else Linear(0, 0, kernel.ndim)


def _folded(path: str, leaf: Any, seen: Mapping[str, Linear]) -> Any:
    """A leaf as the model keeps it."""
    if path.rpartition("/")[2] != "kernel" or isinstance(leaf, Folded) or not hasattr(leaf, "ndim"):
        return leaf
    linear = seen.get(path.removesuffix("kernel").rstrip("/"), Linear(0, 0, leaf.ndim))
    if leaf.ndim < linear.ndim:
        raise InputError(f"{path} has shape {leaf.shape}; its module has {linear.ndim} axes")
    return fold(leaf, linear.inputs, linear.outputs)


# A call as a product.


def product(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product:
    """What a linear module's call computes, as the product of a matrix; in the type in which the module computes."""
    x, kernel = args[0], module.get_variable("params", "kernel")
    bias = module.get_variable("params", "bias") if module.use_bias else None
    if hasattr(kernel, "astype"):
        x = x.astype(module.dtype or jnp.promote_types(x.dtype, kernel.dtype))
    if isinstance(module, nn.Dense):
        return Product(x, kernel, bias, lambda y: y)
    if isinstance(module, nn.DenseGeneral):
        return product_over_axes(x, kernel, bias, _several(module.axis), _several(module.features))
    return product_of_equation(x, kernel, bias, _equation(module, args, kwargs), kernel.shape)


def product_over_axes(
    x: jax.Array, kernel: Any, bias: jax.Array | None, axis: tuple[int, ...], features: tuple[int, ...]
) -> Product:
    """The product of axes of x, in their order in x, with a kernel (inputs..., features...), or the matrix that it is.

    bias: (features...), or None.
    """
    axes = sorted(i % x.ndim for i in axis)
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    x = x.reshape(*x.shape[: x.ndim - len(axes)], -1)
    flat = None if bias is None else bias.reshape(-1)
    return Product(x, _matrix(kernel, features), flat, lambda y: y.reshape(*y.shape[:-1], *features))


def product_of_equation(
    x: jax.Array, kernel: Any, bias: jax.Array | None, equation: tuple[str, str, str], shape: tuple[int, ...]
) -> Product:
    """The product of an equation for which `letters` finds a matrix, with a kernel of this shape, or that matrix."""
    given, of_kernel, result = equation
    inputs, _ = letters(equation)
    rows = [letter for letter in result if letter not in of_kernel]
    x = jnp.einsum(f"{given}->{''.join(rows)}{of_kernel[:inputs]}", x)
    sizes = tuple(shape[inputs:])
    x = x.reshape(*x.shape[: len(rows)], -1)
    made = "".join(rows) + of_kernel[inputs:]
    back = lambda y: jnp.einsum(f"{made}->{result}", y.reshape(*y.shape[:-1], *sizes))
    return Product(x, _matrix(kernel, sizes), None if bias is None else bias.reshape(-1), back)


def _matrix(kernel: Any, features: tuple[int, ...]) -> Any:
    return kernel if is_packed(kernel) else kernel.reshape(-1, _size(features))


def _equation(module: nn.Einsum, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str, str]:
    return parts_of(module.einsum_str or kwargs.get("einsum_str") or args[1])


def parts_of(text: str) -> tuple[str, str, str]:
    """An equation's letters: of the input, of the kernel, of the result."""
    operands, _, result = text.replace(" ", "").partition("->")
    given, _, kernel = operands.partition(",")
    return given, kernel, result


def letters(equation: tuple[str, str, str]) -> tuple[int, int]:
    """(inputs, outputs) among the axes of the kernel; (0, 0) where it is no matrix from the first to the last."""
    given, kernel, result = equation
    summed = [letter for letter in kernel if letter not in result]
    made = [letter for letter in kernel if letter not in given]
    rows = [letter for letter in given if letter not in kernel]
    plain = all(map(str.isalpha, (given, kernel, result))) and len(set(kernel)) == len(kernel)
    whole = kernel == "".join(summed + made) and set(result) == {*rows, *made} and summed and made
    biased = result.endswith("".join(made))  # so that a bias lies along the last axes
    return (len(summed), len(made)) if plain and whole and biased else (0, 0)


def _several(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
