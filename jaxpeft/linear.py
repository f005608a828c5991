"""A call of a linear module as the product of a matrix.

Which axes of its kernel are inputs and which outputs is asked of the module that owns the kernel, never of a shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.quant import is_packed, matrix

KINDS = (nn.Dense, nn.DenseGeneral, nn.Einsum)


class Linear(NamedTuple):
    """A linear map that was seen: how many axes of its kernel are inputs and outputs, and how many there are in all.

    Both are 0 for what no matrix stands for; `why` not, in a few words, where targets that choose it are a mistake.
    """

    inputs: int
    outputs: int
    ndim: int
    why: str = ""


class Product(NamedTuple):
    """A call of a linear module as the product of a matrix: `back((x @ kernel.reshape(n, m)) + bias.reshape(m))`.

    x: (..., n).  kernel: (n, m).  bias: (m,), or None.  back: (..., m) -> what the module gives.
    """

    x: jax.Array
    kernel: Any
    bias: jax.Array | None
    back: Callable[[jax.Array], jax.Array]


def axes(module: nn.Module, kernel: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Linear:
    """Which axes of a linear module's kernel are inputs and outputs, of a call with these arguments."""
    if why := _not_plain(module):
        return Linear(0, 0, kernel.ndim, why)
    if isinstance(module, nn.Dense):
        return Linear(1, 1, 2)
    if isinstance(module, nn.DenseGeneral):
        return Linear(len(_several(module.axis)), len(_several(module.features)), kernel.ndim)
    return Linear(*letters(_equation(module, args, kwargs)), kernel.ndim)


def _not_plain(module: nn.Module) -> str:
    """Why a linear module computes something else than the product of its kernel; empty where it does that."""
    kind = type(module).__name__
    if type(module).__call__ not in [known.__call__ for known in KINDS]:
        return f"{kind} has a __call__ of its own"
    products = (getattr(module, "dot_general", None), getattr(module, "dot_general_cls", None))
    if any(product not in (None, jax.lax.dot_general) for product in products):
        return f"its {kind} has a dot_general of its own"
    batch = _several(getattr(module, "batch_dims", ()))
    return f"its {kind} has batch_dims {batch}, a matrix for each index of them" if batch else ""


def product(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product:
    """What a linear module's call computes, as the product of a matrix; in the type in which the module computes."""
    x, kernel = args[0], module.get_variable("params", "kernel")
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x = x.astype(module.dtype or jnp.promote_types(x.dtype, kernel.dtype))
    if isinstance(module, nn.Dense):
        return Product(x, kernel, bias, lambda y: y)
    if isinstance(module, nn.DenseGeneral):
        return product_over_axes(x, kernel, bias, _several(module.axis), _several(module.features))
    return product_of_equation(x, kernel, bias, _equation(module, args, kwargs), tuple(module.shape))


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
