"""The scans over stacked parameters that a function runs (`nn.scan`, `nnx.scan`, `lax.scan`), run under a memory plan.

They are found on the trace. Of what a scan's body carries and collects,

    streams    what layers change: made of floats that differ from layer to layer. They go through the loop that the
               plan governs (passes.py)
    others     what changes without them (counters, keys): a scan of its own; the loop gets their values as it gets the
               layers' parameters
    fixed      what comes out as it goes in: all layers share it

and what it collects of the streams becomes a stream itself, an array of all layers into which each writes its part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.interpreters import partial_eval

from jaxpeft.backward.inline import evaluate, line_of, names_in, opened
from jaxpeft.backward.loop import join, loop_over
from jaxpeft.backward.passes import run_loop
from jaxpeft.backward.places import empty
from jaxpeft.backward.plan import INPUT, Plan, without_codes
from jaxpeft.backward.planned import named
from jaxpeft.backward.programs import check_names
from jaxpeft.errors import InputError
from jaxpeft.model import Context


def in_scans(function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """A function of parameters and more, (params, *more), whose scans over stacked parameters run under a plan.

    A scan is of interest if it runs over something that is made of parameters alone. Calls around it are opened, so
    `jax.checkpoint` of the whole does nothing more.

    Raises:
      InputError: for `tokens=` and `tile=`. When it is called: if there is no such scan, or one that cannot be run so.
    """
    if plan.tokens != Plan().tokens:
        raise InputError(
            f"--save {plan}: tokens={plan.tokens} means nothing: the scans of a module do not say which arrays have "
            "rows; leave it out"
        )

    if plan.tile is not None:
        raise InputError(
            f"--save {plan}: tile={plan.tile} means nothing: the scans of a module do not say which part of a layer "
            "takes tokens one by one; leave it out"
        )

    def run(params, *more):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(params, *more)
        flat = _pruned(opened(closed))
        leaves = jax.tree.leaves((params, *more))
        origins = _origins(flat.jaxpr, len(jax.tree.leaves(params)))
        found: list[str] = []
        stacks = [equation for equation in flat.jaxpr.eqns if _is_stack(equation, origins)]
        names = {id(equation): names_in(equation.params["jaxpr"]) for equation in stacks}
        check_names(plan, [name for own in names.values() for name in own])

        def change(equation, inputs):
            if id(equation) not in names:
                return None
            known = (INPUT, *names[id(equation)])
            own = plan._replace(actions=tuple(action for action in plan.actions if action[0] in known))
            own = own._replace(preset="matmuls") if without_codes(own, known) else own
            results, name = _replaced(equation, inputs, own, found)
            found.append(name)
            return results

        results = evaluate(flat, leaves, change)
        if not found:
            raise InputError(
                f"--save {plan}: this model runs no scan over stacked parameters (nn.scan, nnx.scan, lax.scan); stack "
                "its layers and use planned_scan, or give jp.checkpoint_policy to jax.checkpoint, nn.remat or nnx.remat"
            )
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return run


def _pruned(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Without what nothing reads."""
    count = len(closed.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * count, instantiate=True)
    return ClosedJaxpr(jaxpr, closed.consts)


def _origins(jaxpr: Any, params: int) -> dict[Any, frozenset[str]]:
    """Of every variable, what it is made of: "params" (the first inputs), "more", both or nothing."""
    return _spread(jaxpr, {v: frozenset(["params" if i < params else "more"]) for i, v in enumerate(jaxpr.invars)})


def _spread(jaxpr: Any, found: dict[Any, frozenset[Any]]) -> dict[Any, frozenset[Any]]:
    """What every variable is made of, by what the first ones are."""
    found = dict(found)
    for equation in jaxpr.eqns:
        of = [found.get(v, frozenset()) for v in equation.invars if not isinstance(v, Literal)]
        found.update(dict.fromkeys(equation.outvars, frozenset().union(*of)))
    return found


def _is_stack(equation: Any, origins: dict[Any, frozenset[str]]) -> bool:
    if equation.primitive.name != "scan" or equation.params["reverse"] or not equation.params["length"]:
        return False
    over = [v for v in equation.invars[sum(_counts(equation)) :] if not isinstance(v, Literal)]
    return any(origins.get(v) == {"params"} for v in over)


def _counts(equation: Any) -> tuple[int, int]:
    """How many constants a scan reads, and how many values it carries."""
    if "num_consts" in equation.params:  # until JAX 0.11
        return equation.params["num_consts"], equation.params["num_carry"]
    consts, carries, _ = equation.params["ft_in"].unpack()
    return len([*consts]), len([*carries])


class _Scan(NamedTuple):
    """What a scan's body does with what it carries.

    body: (*consts, *carries, *xs) -> (*carries, *ys), opened.
    consts, carries: how many.
    streams: the carries that layers change.
    others: the carries that change without them (counters).
    inside: of which carries each variable is made.
    """

    body: ClosedJaxpr
    consts: int
    carries: int
    streams: list[int]
    others: list[int]
    inside: dict[Any, frozenset[Any]]

    @property
    def outputs(self) -> list[Any]:
        return self.body.jaxpr.outvars

    def depends(self, output: int, carries: Sequence[int]) -> bool:
        """Whether an output is made of one of these carries, in the same step."""
        v = self.outputs[output]
        return not isinstance(v, Literal) and bool(self.inside.get(v, frozenset()).intersection(carries))


def _look(equation: Any) -> _Scan:
    body = opened(equation.params["jaxpr"])
    consts, carries = _counts(equation)
    before = body.jaxpr.invars[consts : consts + carries]
    after = body.jaxpr.outvars[:carries]
    inside = _spread(body.jaxpr, {v: frozenset([i]) for i, v in enumerate(before)})
    moving = [i for i in range(carries) if after[i] is not before[i]]
    # Floats made of what differs from layer to layer, and what is made of those.
    layered = _spread(body.jaxpr, {v: frozenset(["layer"]) for v in body.jaxpr.invars[consts + carries :]})
    floats = [i for i in moving if jnp.issubdtype(after[i].aval.dtype, jnp.floating)]
    streams = [i for i in floats if not isinstance(after[i], Literal) and layered.get(after[i])]
    scan = _Scan(body, consts, carries, streams, [i for i in moving if i not in streams], inside)
    while more := [i for i in scan.others if scan.depends(i, scan.streams)]:
        streams = sorted([*scan.streams, *more])
        scan = scan._replace(streams=streams, others=[i for i in moving if i not in streams])
    return scan


def _part(scan: _Scan, outputs: Sequence[int]) -> Callable[..., list[Any]]:
    """The body's function of all its inputs, of which only what these outputs need is read."""
    jaxpr = scan.body.jaxpr
    wanted = [i in outputs for i in range(len(jaxpr.outvars))]
    if not any(i in scan.streams for i in outputs):  # what only has effects runs with the streams, once
        equations = [equation for equation in jaxpr.eqns if equation.outvars or not equation.effects]
        effects = frozenset().union(*(equation.effects for equation in equations))
        jaxpr = jaxpr.replace(eqns=equations, effects=effects)
    pruned, used = partial_eval.dce_jaxpr(jaxpr, wanted)
    compute = jaxpr_as_fun(ClosedJaxpr(pruned, scan.body.consts))
    return lambda inputs: compute(*[x for x, use in zip(inputs, used, strict=True) if use])


def _replaced(equation: Any, inputs: list[Any], plan: Plan, taken: Sequence[str]) -> tuple[list[Any], str]:
    """(what a scan gives, its name).

    Raises:
      InputError: for one that carries or collects something made of streams that is no float.
    """
    scan, length = _look(equation), equation.params["length"]
    jaxpr, first = scan.body.jaxpr, scan.consts + scan.carries
    inputs = [jnp.asarray(x) for x in inputs]
    consts, start, xs = inputs[: scan.consts], inputs[scan.consts : first], inputs[first:]
    collected = range(scan.carries, len(jaxpr.outvars))
    of = {v: i for i, v in enumerate(jaxpr.invars[first:])}
    passed = {
        n: of[v] for n, v in enumerate(jaxpr.outvars) if n in collected and not isinstance(v, Literal) and v in of
    }
    made = [n for n in collected if n not in passed and scan.depends(n, scan.streams)]
    aside = [n for n in collected if n not in passed and n not in made]
    for n in [*scan.streams, *made]:
        aval = scan.outputs[n].aval
        if not jnp.issubdtype(aval.dtype, jnp.floating):
            where = f" at {line}" if (line := line_of(equation)) else ""
            raise InputError(
                f"--save {plan}: the scan{where} {'collects' if n in made else 'carries'} {aval.dtype}{[*aval.shape]} "
                "made of floats that it carries; under a plan only floats are; use everything"
            )

    rest = _part(scan, [*scan.others, *aside])

    def count(others, part):
        flowing = {**dict(enumerate(start)), **dict(zip(scan.others, others, strict=True))}
        results = rest([*consts, *flowing.values(), *part])
        return results[: len(others)], (others, results[len(others) :])

    others, (before, apart) = jax.lax.scan(count, [start[i] for i in scan.others], xs, length=length)
    compute = _part(scan, [*scan.streams, *made])
    fixed = {i: x for i, x in enumerate(start) if i not in scan.streams and i not in scan.others}

    def block(layer, x, ctx):
        part, counted = layer
        streams, whole = x
        flowing = {
            **ctx.shared["fixed"],
            **dict(zip(scan.others, counted, strict=True)),
            **dict(zip(scan.streams, streams, strict=True)),
        }
        results = compute([*ctx.shared["consts"], *[flowing[i] for i in range(scan.carries)], *part])
        parts = zip(whole, results[len(streams) :], strict=True)
        written = [jax.lax.dynamic_update_index_in_dim(all, y, ctx.layer, 0) for all, y in parts]
        return (results[: len(streams)], written), None

    avals = [scan.outputs[n].aval for n in made]
    all_layers = [empty((length, *aval.shape), aval.dtype) for aval in avals]
    x, told = ([start[i] for i in scan.streams], all_layers), Context(shared={"consts": consts, "fixed": fixed})
    loop, leaves = loop_over(block, "layers", range(length), (xs, before), x, told, False)
    loop, leaves, prefix = named(loop, leaves, None)
    name = _unique(prefix.rpartition("/")[2] or "layers", taken)
    ends = [join(end) for end in run_loop(loop._replace(name=name), plan, leaves, None)]
    last = {**fixed, **dict(zip([*scan.others, *scan.streams, *made, *aside], [*others, *ends, *apart], strict=True))}
    last |= {n: xs[i] for n, i in passed.items()}
    return [last[i] for i in range(len(jaxpr.outvars))], name


def _unique(name: str, taken: Sequence[str]) -> str:
    return next(found for found in (name, *(f"{name}_{n}" for n in range(1, len(taken) + 1))) if found not in taken)
