"""The memory of any function that JAX can compile: `jaxpeft.profile` and `jaxpeft.plan`.

    print(jaxpeft.profile(step, state, batch, target="h200", donate_argnums=0))

Arguments are shapes (or arrays, of which the shapes are taken); nothing is allocated or run.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpeft.backward.flops import count_flops
from jaxpeft.files import check_empty
from jaxpeft.memory import aot, foreign, hlo, targets
from jaxpeft.memory import profile as profiles
from jaxpeft.memory.owners import Owner, Owners
from jaxpeft.memory.profile import Profile
from jaxpeft.memory.traffic import traffic as traffic_of
from pallas_kernels.platform import tracing_for


def profile(
    function: Callable[..., Any],
    *args: Any,
    target: str = "cpu",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    categories: Callable[[str], str | None] | None = None,
    dump: str | os.PathLike[str] | None = None,
    traffic: bool = False,
) -> Profile:
    """Who owns the bytes at the peak of any function, as a target's compiler lays them out.

    Args:
      function: as for `jax.jit`; one that is jitted already keeps its own donated and static arguments.
      *args: pytrees of `ShapeDtypeStruct`s or arrays.
      target: a name of `jaxpeft plan --target`.
      donate_argnums: as for `jax.jit`.
      static_argnums: likewise.
      categories: an argument's path ("params/dense/kernel": the argument's name, then the keys) -> one of
        `jaxpeft.memory.profile.CATEGORIES`, or None to have it guessed. Without it all are guessed: `foreign.guess`.
      dump: a folder for XLA's files, new or empty: what else lies there might be taken for the function's.
      traffic: whether to say what the function moves through memory, too. Its products are those of the compiled
        program; of kernels those count that say their FLOPs, and how many do not is said.

    Returns:
      The profile; `print` shows its table, `to_json`, `write_html` and `write_png` give the rest. A result is of the
      category of the argument that it resembles, or a gradient, else of "outputs"; in a donated argument's buffer it
      is that argument.

    Raises:
      InputError: for a target that is not known or whose compiler is not installed, a category that is not known, or
        a dump folder that is not empty. What the function itself raises for such shapes passes through.
    """
    where = targets.target(target)
    if dump is not None:
        check_empty("dump", Path(dump))
    args, traced = _traced(where, function, args, donate_argnums, static_argnums)
    owners = _owners(function, args, traced, static_argnums, categories)
    with tempfile.TemporaryDirectory(prefix="jaxpeft-profile-") as scratch:
        folder = Path(dump or scratch)
        aot.compile_lowered(where, traced.lower(), folder)
        program = hlo.read(folder)
    found = profiles.profile(program, owners, foreign.ForeignAttribution)
    if traffic:
        found = found._replace(traffic=traffic_of(program, owners, foreign.ForeignAttribution, where))
    return found._replace(title=f"{getattr(function, '__name__', 'function')} on {where.name}")


def plan(
    function: Callable[..., Any],
    *args: Any,
    target: str = "cpu",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
) -> dict[str, Any]:
    """What any function needs on a target; nothing is allocated or run.

    Args: as those of `profile`.

    Returns:
      {"target", "arguments", "outputs", "aliases", "temporaries", "total", "host", "device_bytes", "fits", "flops",
      "jax"}: bytes of one device, with total = arguments + outputs - aliases + temporaries; host are those in the
      host's memory, device_bytes what a run may take of the device's; flops those of matrix products.

    Raises:
      InputError: as `profile` does.
    """
    where = targets.target(target)
    _, traced = _traced(where, function, args, donate_argnums, static_argnums)
    compiled = aot.compile_lowered(where, traced.lower())
    memory = compiled.memory
    return {
        "target": where.name,
        **{name: getattr(memory, name) for name in ("arguments", "outputs", "aliases", "temporaries", "total", "host")},
        "device_bytes": where.usable_bytes,
        "fits": compiled.fits,
        "flops": count_flops(traced.jaxpr),
        "jax": jax.__version__,
    }


def _numbers(argnums: int | Sequence[int]) -> tuple[int, ...]:
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def _traced(where: targets.Target, function: Any, args: tuple[Any, ...], donate: Any, static: Any) -> tuple[Any, Any]:
    """(the arguments as shapes on the target, the function's trace with them)."""
    default = jax.sharding.SingleDeviceSharding(targets.devices(where)[0])
    fixed = _numbers(static)
    shapes = [x if n in fixed else aot.abstract(x, default) for n, x in enumerate(args)]
    jitted = function
    if not hasattr(function, "trace") or _numbers(donate) or fixed:
        jitted = jax.jit(function, donate_argnums=donate, static_argnums=static)
    with tracing_for(where.platform, targets.devices(where)[0]):
        return shapes, jitted.trace(*shapes)


def _owners(function: Any, args: Any, traced: Any, static: Any, categories: Any) -> Owners:
    names, arguments, labels = _argument_names(function, len(args)), [], []
    for number, (name, argument) in enumerate(zip(names, args, strict=True)):
        if number in _numbers(static):
            continue
        for path, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]:
            labels.append(name + jax.tree_util.keystr(path))
            own = foreign.path_of(name).replace("args/", "", 1) + "/" + foreign.path_of(jax.tree_util.keystr(path))
            own = own.strip("/")
            arguments.append((Owner(foreign.category(own, categories), own), tuple(leaf.shape)))
    results = [
        ("/".join(filter(None, ["output", foreign.path_of(jax.tree_util.keystr(path))])), tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_flatten_with_path(traced.out_info)[0]
    ]
    return Owners([owner for owner, _ in arguments], foreign.output_owners(results, arguments), labels)


def _argument_names(function: Any, count: int) -> list[str]:
    """The names of positional arguments, as JAX calls them: those of the signature, args[0] without one."""
    try:
        bound = inspect.signature(function).bind(*range(count)).arguments
    except (TypeError, ValueError):
        return [f"args[{n}]" for n in range(count)]
    names = []
    for name, value in bound.items():
        names += [f"{name}[{n}]" for n in range(len(value))] if isinstance(value, tuple) else [name]
    return names
