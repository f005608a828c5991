"""A call of a module as the product of a matrix, or as what it computes with one: of a linear map, table, convolution.

Which axes of its kernel are inputs and which outputs is asked of the module that owns the kernel, never of a shape.

A table (V, d) is a matrix whose rows a lookup takes, and by which `attend` multiplies from the other side. A
convolution's kernel (sizes..., n, m) is a matrix of all that it reads at once. With a low-rank matrix A B in its place

    lookup        A[x] B
    attend        (x B^T) A^T
    convolution   (x * A) B         A as a kernel (sizes..., n, r), B one of size 1
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft.quant import CONVOLUTION, EMBEDDING, is_packed, matrix

KINDS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.Embed)
Through = Callable[..., jax.Array]  # (x, *factors): what a module computes with the product of these matrices


class Linear(NamedTuple):
    """A linear map that was seen: how many axes of its kernel are inputs and outputs, and how many there are in all.

    Both are 0 for what no matrix stands for; `why` not, in a few words, where targets that choose it are a mistake.
    `kind` is EMBEDDING or CONVOLUTION where that is what the module is.
    """

    inputs: int
    outputs: int
    ndim: int
    why: str = ""
    kind: str = ""


class Product(NamedTuple):
    """A call of a linear module as the product of a matrix: `back((x @ kernel.reshape(n, m)) + bias.reshape(m))`.

    x: (..., n).  kernel: (n, m).  bias: (m,), or None.  back: (..., m) -> what the module gives.
    through: `through(x, kernel)` in place of `x @ kernel`, where x is something else than (..., n).
    """

    x: jax.Array
    kernel: Any
    bias: jax.Array | None
    back: Callable[[jax.Array], jax.Array]
    through: Through | None = None


def axes(module: nn.Module, kernel: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Linear:
    """Which axes of a linear module's kernel are inputs and outputs, of a call with these arguments."""
    kind = kind_of_module(module)
    if why := _not_plain(module):
        return Linear(0, 0, kernel.ndim, why, kind)
    if kind:
        return Linear(kernel.ndim - 1, 1, kernel.ndim, kind=kind)
    if isinstance(module, nn.Dense):
        return Linear(1, 1, 2)
    if isinstance(module, nn.DenseGeneral):
        return Linear(len(_several(module.axis)), len(_several(module.features)), kernel.ndim)
    return Linear(*letters(_equation(module, args, kwargs)), kernel.ndim)


def kind_of_module(module: Any) -> str:
    """EMBEDDING or CONVOLUTION, of a module of Linen's or NNX's; empty for a linear one."""
    if isinstance(module, (nn.Embed, nnx.Embed)):
        return EMBEDDING
    return CONVOLUTION if isinstance(module, (nn.Conv, nnx.Conv)) else ""


def leaf_of(module: Any) -> str:
    """The name of the parameter that is a module's matrix."""
    return "embedding" if kind_of_module(module) == EMBEDDING else "kernel"


def runs(module: nn.Module, method: str) -> bool:
    """Whether a method of a Linen module computes with its matrix."""
    return isinstance(module, KINDS) and (method == "__call__" or (isinstance(module, nn.Embed) and method == "attend"))


def no_plain_convolution(module: Any) -> str:
    """Why a convolution computes something else than that of its kernel with its input; empty where it does that."""
    kind = type(module).__name__
    if module.feature_group_count != 1:
        return f"its {kind} has feature_group_count {module.feature_group_count}, a matrix for each group"
    if module.mask is not None:
        return f"its {kind} has a mask"
    functions = (module.conv_general_dilated, getattr(module, "conv_general_dilated_cls", None))
    own = any(function not in (None, jax.lax.conv_general_dilated) for function in functions)
    return f"its {kind} has a convolution of its own" if own else ""


def _not_plain(module: nn.Module) -> str:
    """Why a linear module computes something else than the product of its kernel; empty where it does that."""
    kind = type(module).__name__
    if type(module).__call__ not in [known.__call__ for known in KINDS]:
        return f"{kind} has a __call__ of its own"
    if isinstance(module, nn.Embed):
        return "" if type(module).attend is nn.Embed.attend else f"{kind} has an attend of its own"
    if isinstance(module, nn.Conv):
        return no_plain_convolution(module)
    products = (getattr(module, "dot_general", None), getattr(module, "dot_general_cls", None))
    if any(product not in (None, jax.lax.dot_general) for product in products):
        return f"its {kind} has a dot_general of its own"
    batch = _several(getattr(module, "batch_dims", ()))
    return f"its {kind} has batch_dims {batch}, a matrix for each index of them" if batch else ""


def product(module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product:
    """What a linear module's call computes, as the product of a matrix; in the type in which the module computes."""
    x, kernel = args[0] if args else next(iter(kwargs.values())), module.get_variable("params", leaf_of(module))
    if isinstance(module, nn.Embed):
        return product_of_table(x, kernel, module.dtype, method)
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x = x.astype(module.dtype or jnp.promote_types(x.dtype, kernel.dtype))
    if isinstance(module, nn.Conv):
        return product_of_convolution(module, x, kernel, bias)
    if isinstance(module, nn.Dense):
        return Product(x, kernel, bias, lambda y: y)
    if isinstance(module, nn.DenseGeneral):
        return product_over_axes(x, kernel, bias, _several(module.axis), _several(module.features))
    return product_of_equation(x, kernel, bias, _equation(module, args, kwargs), tuple(module.shape))


def product_of_table(x: jax.Array, table: jax.Array, dtype: Any, method: str) -> Product:
    """A lookup of the rows x (...) of a table (V, d), or `attend`: the product of x (..., d) with its transpose."""
    if method == "attend":
        x = x.astype(dtype or jnp.promote_types(x.dtype, table.dtype))
        return Product(x, table, None, lambda y: y, _attend)
    if table.shape[0] == 1:  # of which Flax gives the row for every x
        x = jnp.zeros_like(x)
    return Product(x, table, None, lambda y: y, functools.partial(_lookup, dtype or table.dtype))


def _attend(x: jax.Array, *factors: jax.Array) -> jax.Array:
    for factor in reversed(factors):
        x = x @ factor.T.astype(x.dtype)
    return x


def _lookup(dtype: Any, x: jax.Array, table: jax.Array, *factors: jax.Array) -> jax.Array:
    return _times(jnp.take(table, x, axis=0).astype(dtype), factors)


def _times(x: jax.Array, factors: Iterable[jax.Array]) -> jax.Array:
    for factor in factors:
        x = x @ factor.astype(x.dtype)
    return x


def product_of_convolution(module: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> Product:
    """The convolution that a module of Linen's or NNX's makes of x (..., sizes..., n), of any kernel of its sizes."""
    names = ("kernel_size", "strides", "padding", "input_dilation", "kernel_dilation", "precision")
    options = {name: getattr(module, name) for name in names}
    sizes = kernel.shape[:-2]

    def through(x, first, *rest):
        own = nn.Conv(first.shape[-1], use_bias=False, parent=None, **options)
        first = first.astype(x.dtype).reshape(*sizes, -1, first.shape[-1])
        return _times(own.apply({"params": {"kernel": first}}, x), rest)

    return Product(x, kernel.reshape(-1, kernel.shape[-1]), bias, lambda y: y, through)


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


def _matrix(kernel: Any, outputs: tuple[int, ...]) -> Any:
    """(n, m); a packed kernel is kept as one."""
    return matrix(kernel) if is_packed(kernel) else kernel.reshape(-1, math.prod(outputs))


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
