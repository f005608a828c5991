"""One layer as two programs: forward, with its named activations; backward, with some of them given."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal
from jax.interpreters import partial_eval

from jaxpeft import tree
from jaxpeft.backward.flops import equation_bytes, equation_flops
from jaxpeft.backward.plan import INPUT, Plan, action_of, codes_of, without_codes
from jaxpeft.errors import InputError
from pallas_kernels.platform import part_of, tracing_parts

Kept = tuple[str, int]  # a name, and which of the activations with that name
Price = Callable[[float, float], float]  # of a product's (FLOPs, bytes that it reads and writes)


def _flops(flops: float, size: float) -> float:
    return flops


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """A block, traced.

    forward: (*inputs) -> (*y, *values of `names`), y one array or several.
    vjp: (*inputs, *d y) -> cotangents of the perturbed inputs, computing the block again.
    names: the named activations, in order.
    shapes: of these.
    whole: the same block without tiles (tiles.py), whose activations all have names; None: it has none.
    """

    forward: ClosedJaxpr
    vjp: ClosedJaxpr
    names: tuple[Kept, ...]
    shapes: tuple[Any, ...]
    whole: Programs | None = None

    def backward(self, given: Iterable[Kept]) -> tuple[ClosedJaxpr, list[bool], list[Kept]]:
        """(jaxpr, which inputs it reads, which of `given` it reads).

        The jaxpr maps (the inputs that it reads, *d y, the given values that it reads) to the cotangents.
        """
        wanted = set(given)
        names = [name for name in self.names if name in wanted]
        jaxpr = self.vjp.jaxpr
        named = self._places
        values = [jaxpr.eqns[named[name]].outvars[0] for name in names]
        skip = {named[name] for name in names}
        opened = jaxpr.replace(
            invars=[*jaxpr.invars, *values],
            eqns=[eqn for i, eqn in enumerate(jaxpr.eqns) if i not in skip],
            debug_info=jaxpr.debug_info.with_unknown_names(),
        )
        inputs = len(self.forward.jaxpr.invars)
        always = [inputs <= i < len(jaxpr.invars) for i in range(len(opened.invars))]
        pruned, used = partial_eval.dce_jaxpr(opened, [True] * len(jaxpr.outvars), instantiate=always)
        read = [name for name, use in zip(names, used[len(jaxpr.invars) :], strict=True) if use]
        return ClosedJaxpr(pruned, self.vjp.consts), used[:inputs], read

    @functools.cached_property
    def _places(self) -> dict[Kept, int]:
        """Where the backward program has `names`; what only a rule of differentiation names (`custom_vjp`) is none."""
        return {name: i for name, i in _named(self.vjp.jaxpr).items() if name in self.names}

    @functools.cached_property
    def _graph(self):
        """(nodes that each node reads from, (FLOPs, bytes) of each, those that yield the cotangents, named ones).

        A node is an equation. One of whose outputs some may be computed for less (`pallas_kernels.platform.PARTS`) is
        two: that part, numbered after all equations, and the rest, which reads it.
        """
        jaxpr = self.vjp.jaxpr
        made = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
        parts = [(i, part_of(eqn)) for i, eqn in enumerate(jaxpr.eqns)]
        parts = [(i, part) for i, part in parts if part is not None]
        for node, (_, part) in enumerate(parts, len(jaxpr.eqns)):
            made |= dict.fromkeys(part.outvars, node)

        def makers(variables):
            return [made[v] for v in variables if not isinstance(v, Literal) and v in made]

        reads = [makers(eqn.invars) for eqn in jaxpr.eqns] + [makers(part.invars) for _, part in parts]
        work = [(equation_flops(eqn), equation_bytes(eqn)) for eqn in (*jaxpr.eqns, *(part for _, part in parts))]
        for node, (i, _) in enumerate(parts, len(jaxpr.eqns)):
            reads[i].append(node)
            work[i] = (work[i][0] - work[node][0], work[i][1] - work[node][1])
        return reads, work, makers(jaxpr.outvars), self._places

    def work(self, given: Iterable[Kept], price: Price = _flops) -> tuple[float, list[Kept]]:
        """(FLOPs of matrix products of `backward(given)`, those of `given` that it reads), without making it.

        price: of a product's FLOPs and bytes, what is summed in place of the FLOPs.
        """
        reads, work, ends, named = self._graph
        at = {named[name]: name for name in given}
        seen: set[int] = set()
        todo = list(ends)
        while todo:
            i = todo.pop()
            if i not in seen:
                seen.add(i)
                if i not in at:
                    todo += reads[i]
        own = sum(price(*work[i]) for i in seen if i not in at and work[i][0])
        return own, [name for i, name in at.items() if i in seen]

    def recompute_flops(self, given: Iterable[Kept], price: Price = _flops) -> float:
        """FLOPs (or their price) of matrix products of `backward(given)` that `backward` of all names does without."""
        least = self.whole or self
        return self.work(given, price)[0] - least.work(least.names, price)[0]


def name_of(eqn: Any) -> str | None:
    """The name that an equation gives to its one result (`jax.ad_checkpoint.checkpoint_name`), None if it gives none.

    JAX has two forms of it, either with one input and one output: a primitive of its own and, under `jax_remat3`, an
    object of one of two classes, applied by the primitive that applies all such objects.
    """
    if eqn.primitive.name == "name":
        return eqn.params["name"]
    # Known by their classes' names: importable only from JAX's internals, and other classes have parameters "name" too.
    applied: Any = eqn.params["_prim"] if eqn.primitive.name == "call_hi_primitive" else None
    return applied.params["name"] if type(applied).__name__ in ("CheckpointName", "CheckpointNameFwd") else None


def _named(jaxpr) -> dict[Kept, int]:
    """(name, occurrence) -> index of its equation."""
    found: dict[Kept, int] = {}
    count: dict[str, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        name = name_of(eqn)
        if name not in (None, INPUT):
            found[name, count.setdefault(name, 0)] = i
            count[name] += 1
    return found


def _count(names: Iterable[Kept], name: str) -> int:
    return sum(other == name for other, _ in names)


def trace(function: Callable[..., Any], inputs: list[Any], perturbed: list[bool]) -> Programs:
    """The programs of function(*inputs), one array or a tree of them, for inputs of these shapes.

    Args:
      function: to be traced.
      inputs: arrays, or their shapes.
      perturbed: per input, whether the backward program differentiates it.
    """

    def flat(*inputs):
        return jax.tree.leaves(function(*inputs))

    with tracing_parts():  # the forward loop reads a step's part of the stream; the backward one what is made again
        forward = jax.make_jaxpr(flat)(*inputs)
    ys = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in forward.out_avals]

    def pull(*args):
        leaves, d_y = args[: len(inputs)], list(args[len(inputs) :])

        def of(*moved):
            rest = iter(moved)
            return flat(*[next(rest) if use else leaf for leaf, use in zip(leaves, perturbed, strict=True)])

        moved = [leaf for leaf, use in zip(leaves, perturbed, strict=True) if use]
        return jax.vjp(of, *moved)[1](d_y)

    vjp = jax.make_jaxpr(pull)(*inputs, *ys)
    named = _named(forward.jaxpr)
    known = {name for name, _ in named}
    again = [name for name in _named(vjp.jaxpr) if name[0] in known]
    if list(named) != again:
        other = next((name for name, _ in named if _count(named, name) != _count(again, name)), next(iter(known)))
        raise InputError(
            f"{other!r} is the name of {_count(named, other)} activations of a layer, of {_count(again, other)} where "
            "it is differentiated; give what a custom_vjp or custom_jvp names inside another name"
        )
    values = [forward.jaxpr.eqns[i].outvars[0] for i in named.values()]
    opened = forward.jaxpr.replace(
        outvars=[*forward.jaxpr.outvars, *values], debug_info=forward.jaxpr.debug_info.with_unknown_names()
    )
    return Programs(
        ClosedJaxpr(opened, forward.consts),
        vjp,
        tuple(named),
        tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in values),
    )


def check_names(plan: Plan, names: Iterable[str]) -> None:
    """Refuses a plan that speaks of an activation that is none of these, or that would compress and finds none to.

    Raises:
      InputError: with the nearest.
    """
    known = list(dict.fromkeys(names))
    if without_codes(plan, known):
        raise InputError(
            f"--save {plan}: {plan.preset} makes codes of projections by the names of this library's models (q_proj, "
            f"...), and nothing is called so here; write NAME={codes_of(plan.preset)}; "
            f"known: {', '.join(known)}"
        )
    for name, _ in plan.actions:
        if name not in (*known, INPUT):
            raise InputError(
                f"--save {plan}: no activation is called {name!r}; nearest: {tree.nearest(name, known)}; "
                f"known: {', '.join((INPUT, *known))}"
            )


def decide(plan: Plan, programs: Programs) -> dict[Kept, str]:
    """What happens to each named activation that is kept, {(name, occurrence): action}; the rest is recomputed.

    Raises:
      InputError: for a name in the plan that no activation has.
    """
    check_names(plan, (name for name, _ in programs.names))
    table = dict(plan.actions)
    fixed = {name for name in programs.names if table.get(name[0], "recompute") != "recompute"}
    free = [name for name in programs.names if name[0] not in table and action_of(plan.preset, name[0]) != "recompute"]
    free = [] if plan.preset == "blocks" else free
    _, read = programs.work([*fixed, *matmuls(programs, fixed, free)])
    read = [name for name in programs.names if name in read]
    return {name: table.get(name[0]) or action_of(plan.preset, name[0]) for name in read}


def matmuls(programs: Programs, fixed: Iterable[Kept], free: Iterable[Kept]) -> list[Kept]:
    """Of the names in `free`, the smallest set that, with `fixed`, spares every matrix product that they all spare.

    Names are left out one by one, large ones first, as long as no product has to be computed again.
    """
    fixed, kept = list(fixed), list(free)
    if not kept:
        return []
    size = dict(zip(programs.names, programs.shapes, strict=True))
    least, _ = programs.work([*fixed, *kept])
    # Of names of one size the last is tried first: the first is nearest to the product that made it.
    order = sorted(enumerate(kept), key=lambda item: (-tree.num_bytes(size[item[1]]), -item[0]))
    for _, name in order:
        without = [other for other in kept if other != name]
        if programs.work([*fixed, *without])[0] <= least:
            kept = without
    return kept
