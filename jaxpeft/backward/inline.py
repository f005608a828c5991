"""A traced function run again: its calls opened, its equations changed, its products named.

A plan acts on names (`jax.ad_checkpoint.checkpoint_name`) that stand in the layer itself. In a layer of the user's own
they may stand in what it calls (`jax.jit`, `jax.checkpoint`), or nowhere: then each matrix product is named by the
modules that it runs in, or by the line of code that makes it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Literal

from jaxpeft import source
from jaxpeft.backward.flops import equation_flops
from jaxpeft.backward.programs import name_of

Change = Callable[[Any, list[Any]], Any]

_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
_MODULE = re.compile(r"[A-Za-z_]\w*")  # in a name stack; other words say how something is computed
_ALIKE = ("add", "add_any", "convert_element_type", "copy", "expand_dims", "reshape", "squeeze", "sub", "transpose")
_OURS = tuple(f"{Path(__file__).parents[2] / package}{os.sep}" for package in ("jaxpeft", "pallas_kernels"))


def evaluate(closed: ClosedJaxpr, inputs: Sequence[Any], change: Change = lambda equation, inputs: None) -> list[Any]:
    """The traced function of these inputs, with its calls opened: a plan in it takes the place of `jax.checkpoint`.

    Args:
      closed: the function.
      inputs: one of each of its variables.
      change: (equation, its inputs) -> what it gives in place of its own results, as a list, or the equation that
        takes its place; None leaves it as it is.
    """
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))
    for equation in jaxpr.eqns:
        known = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        results = change(equation, known)
        if results is not None and not isinstance(results, list):
            results = _alone(jaxpr, results, known)
        if results is None:
            called = _called(equation)
            if called is None:
                results = _alone(jaxpr, equation, known)
            else:
                scope = str(equation.source_info.name_stack)
                with jax.named_scope(scope) if scope else contextlib.nullcontext():
                    results = evaluate(called, known, change)
        values.update(zip(equation.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def _called(equation: Any) -> ClosedJaxpr | None:
    """What an equation calls, if it does nothing else; under `jax_remat3` `jax.checkpoint` applies an object."""
    if equation.primitive.name == "call_hi_primitive" and type(equation.params["_prim"]).__name__ == "RematTraced":
        called = equation.params["_prim"].params["jaxpr"]
    elif equation.primitive.name in _CALLS:
        called = equation.params["jaxpr"]
    else:
        return None
    return called if isinstance(called, ClosedJaxpr) else ClosedJaxpr(called, ())


def _alone(jaxpr: Any, equation: Any, known: list[Any]) -> list[Any]:
    """What an equation gives, at its place in the name stack and in the code."""
    inputs = {v: x for v, x in zip(equation.invars, known, strict=True) if not isinstance(v, Literal)}
    one = jaxpr.replace(
        constvars=[],
        invars=[*inputs],
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return core.eval_jaxpr(one, (), *inputs.values())


def opened(closed: ClosedJaxpr, change: Change = lambda equation, inputs: None) -> ClosedJaxpr:
    """The traced function with its calls opened, changed as in `evaluate`."""
    return jax.make_jaxpr(lambda *inputs: evaluate(closed, inputs, change))(*shapes(closed))


def shapes(closed: ClosedJaxpr) -> list[jax.ShapeDtypeStruct]:
    """Those of a traced function's inputs."""
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in closed.in_avals]


def name_products(closed: ClosedJaxpr) -> tuple[ClosedJaxpr, str]:
    """(the function, opened, with a name on every matrix product that has none; the modules that all of them run in).

    A product is called as the modules that it runs in, without those that all of the function's products run in
    ("attention/query"); where none are known, as the nearest line of the user's code ("train.py:41 block"). One has a
    name if its result, or its sum with something, is given one.
    """
    flat = opened(closed)
    found = {i: _scope(equation) for i, equation in enumerate(flat.jaxpr.eqns) if equation_flops(equation) > 0}
    apart = zip(*(scope[:-1] for scope in found.values() if scope), strict=False)
    prefix = [words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, apart)]
    named = _with_names(flat.jaxpr.eqns)
    numbers = iter(range(len(flat.jaxpr.eqns)))

    def change(equation, inputs):
        number = next(numbers)
        if number not in found:
            return None
        name = "/".join(found[number][len(prefix) :]) or line_of(equation) or "product"
        return [
            checkpoint_name(x, name) if jnp.issubdtype(x.dtype, jnp.floating) and v not in named else x
            for v, x in zip(equation.outvars, _alone(flat.jaxpr, equation, inputs), strict=True)
        ]

    return opened(flat, change), "/".join(prefix)


def names_in(closed: ClosedJaxpr) -> list[str]:
    """The names that a plan may speak of in a function, with those that `name_products` gives."""
    return [name for equation in name_products(closed)[0].jaxpr.eqns if (name := name_of(equation)) is not None]


def _scope(equation: Any) -> list[str]:
    return [word for word in str(equation.source_info.name_stack).split("/") if _MODULE.fullmatch(word)]


def line_of(equation: Any) -> str:
    """The nearest line of the user's code, as a word of a plan; "" if none is known."""
    frames = [
        source.Frame(frame.file_name, frame.function_name, frame.line_num)
        for frame in equation.source_info.traceback.frames
        if not frame.file_name.startswith(_OURS)
    ]
    return re.sub(r"[,=]", "_", str(source.nearest(frames) or ""))


def _with_names(equations: Iterable[Any]) -> set[Any]:
    """The variables that are given a name, or whose sum with something is, whatever its shape or type."""
    named: set[Any] = set()
    for equation in reversed([*equations]):
        if name_of(equation) or (equation.primitive.name in _ALIKE and named.intersection(equation.outvars)):
            named.update(v for v in equation.invars if not isinstance(v, Literal))
    return named
