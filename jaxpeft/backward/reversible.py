"""Layers that are run backwards: their inputs are rebuilt from their outputs instead of being kept.

    y1 = lam x1 + F(x2)         x2 = (y2 - G(y1)) / beta
    y2 = beta x2 + G(y1)        x1 = (y1 - F(x2)) / lam

with the two streams swapped after each layer or not, and with d1, d2 the gradients,

    d1 <- d1 + vjp of G at y1 applied to d2;    d2 <- beta d2 + vjp of F at x2 applied to d1;    d1 <- lam d1

In floating point each division by lam multiplies the rounding error of the streams by 1 / lam. In fixed point (see
`jaxpeft.backward.streams`) nothing is lost: the bits that a division shifts out are kept, log2(1 / lam) for each
element of the stream and layer, and the backward pass sees the forward pass's streams bit for bit.

This rests on F and G giving the same bits in both passes: each is one traced program, called in a branch, which a
compiler translates by itself and alike in both loops. That program also yields what the derivative needs besides the
inputs (the smallest set of named activations that spares every matrix product): the forward pass drops it, the backward
pass uses it, so that the backward pass evaluates F and G once. (`twice`: once to rebuild, and once more for the
derivative.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from jaxpeft import tree
from jaxpeft.backward.flops import count_flops
from jaxpeft.backward.loop import Loop, Static, divide, join, loop_over
from jaxpeft.backward.places import empty
from jaxpeft.backward.plan import Plan
from jaxpeft.backward.programs import decide, trace
from jaxpeft.backward.segments import record
from jaxpeft.backward.streams import Fixed, Float
from jaxpeft.errors import InputError
from jaxpeft.model import Context

Function = Callable[[tree.Params, jax.Array, Context], jax.Array]  # (layer, x, ctx) -> y


class Coupling(NamedTuple):
    """How a layer couples its two streams.

    f, g: (layer, x, ctx) -> y in x's type.
    lam, beta: their factors; with `Fixed` streams of the form n / 2^k, above 0.
    swap: whether the streams change places after a layer.
    streams: Fixed or Float.
    every: the pair is kept after every so many layers, and taken instead of the rebuilt one; 0: never.
    twice: whether the backward pass evaluates F and G once more for the derivative.
    probe: whether the layers' inputs are kept, to be compared with the rebuilt ones (see `run`).
    """

    f: Function
    g: Function
    lam: Fraction
    beta: Fraction
    swap: bool
    streams: Fixed | Float = Fixed()
    every: int = 0
    twice: bool = False
    probe: bool = False


def run(
    coupling: Coupling,
    segment: str,
    layers: range,
    params: tree.Params,
    pair: tuple[jax.Array, jax.Array],
    ctx: Context,
    key: jax.Array | None = None,
    tokens: int = Plan().tokens,
    shards: int = 1,
    probe: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The layers of a segment.

    Args:
      coupling: of every layer.
      segment: its name.  layers: its layers' numbers.
      params: stacked over layers.
      pair: x1, x2, each (B, S, d), in the type in which F and G compute.
      ctx: see `jaxpeft.model`.
      key: PRNG key for dropout, or None; layer i gets `fold_in(key, i)`, of which F and G get a part each.
      tokens: that a layer works on at a time (see `jaxpeft.backward.plan`).
      shards: devices over which the rows are divided.
      probe: (layers, 3) float32 of any value, where the coupling has one. Its gradient tells, for each layer's input
        pair, how many elements are rebuilt otherwise than they were, the sum of these errors' squares, and that of the
        elements' own.

    Returns:
      The pair after the last layer, swapped if the coupling says so, float32; NaN throughout if fixed point streams met
      something that is not finite or out of their range, which they cannot show.
    """
    loop, leaves = loop_over(coupling.f, segment, layers, params, pair[1], ctx, key is not None, tokens, shards)
    probe = jnp.zeros((len(layers), 3)) if probe is None else probe
    return tuple(join(y) for y in _run(coupling, loop, divide(pair[0], loop.groups), leaves, key, probe))


class _Half(NamedTuple):
    """F or G, traced.

    forward: (*inputs) -> (y, *values that the backward program reads), of `shapes`.
    backward: (inputs that it reads, d y, values) -> cotangents of `moved`.
    used: the inputs that `backward` reads.
    moved: leaves with a cotangent.
    flops: that the backward pass computes again.
    """

    forward: Callable[..., Any]
    shapes: list[Any]
    backward: Callable[..., Any]
    used: list[bool]
    moved: list[int]
    flops: float


def _half(function: Function, loop: Loop, leaves, dtype, key, perturbed, twice: bool, part: int) -> _Half:
    """Traces F (part 0) or G (part 1)."""

    def block(layer, x, ctx):
        own = ctx if ctx.key is None else ctx._replace(key=jax.random.fold_in(ctx.key, part))
        return function(layer, x, own), None

    loop = loop._replace(block=block)
    stream = jax.ShapeDtypeStruct(leaves[loop.x].shape, dtype)
    shapes = loop.shapes(leaves, [stream], key)
    read = partial_eval.dce_jaxpr(jax.make_jaxpr(loop.function)(*shapes).jaxpr, [True])[1]
    moved = [i == loop.x or (p and r) for i, (p, r) in enumerate(zip(perturbed, read, strict=False))]
    programs = trace(loop.function, shapes, [*moved, *[False] * (len(shapes) - len(moved))])
    kept = [] if twice else list(decide(Plan("matmuls"), programs))
    backward, used, values = programs.backward(kept)
    jaxpr = programs.forward.jaxpr
    wanted = [True, *(name in values for name in programs.names)]
    forward, _ = partial_eval.dce_jaxpr(jaxpr, wanted, instantiate=True)
    return _Half(
        jaxpr_as_fun(ClosedJaxpr(forward, programs.forward.consts)),
        [v.aval for v in forward.outvars],
        jaxpr_as_fun(backward),
        used,
        [i for i, use in enumerate(moved) if use],
        count_flops(programs.forward) + programs.recompute_flops(values),
    )


def _evaluate(half: _Half, inputs: list[Any], never: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """(y, the values that the backward program reads): the same bits wherever this stands in a program.

    A branch is compiled by itself; on CPUs and GPUs barriers alone are gone before fusion. Barriers around it keep a
    TPU's compiler from moving work into it, fixed layouts from choosing others. `never` is not true, which no compiler
    can know.
    """

    def nothing(*inputs):
        return [jnp.zeros(y.shape, y.dtype) for y in half.shapes]

    inputs = [_row_major(x) for x in jax.lax.optimization_barrier(inputs)]
    made = [_row_major(y) for y in jax.lax.cond(never, nothing, half.forward, *inputs)]
    y, *values = jax.lax.optimization_barrier(made)
    return y, values


def _row_major(x):
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2:
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _pull(half: _Half, inputs: list[Any], d_y: jax.Array, values: list[jax.Array]) -> dict[int, jax.Array]:
    """{leaf: cotangent} of one half."""
    read = [x for x, use in zip(inputs, half.used, strict=True) if use]
    return dict(zip(half.moved, half.backward(*read, d_y, *values), strict=True))


def _halves(coupling: Coupling, loop: Loop, leaves, dtype, key, perturbed) -> tuple[_Half, _Half]:
    trace_half = functools.partial(_half, loop=loop, leaves=leaves, dtype=dtype, key=key, perturbed=perturbed)
    return (
        trace_half(coupling.f, twice=coupling.twice, part=0),
        trace_half(coupling.g, twice=coupling.twice, part=1),
    )


def couple(
    coupling: Coupling,
    f: Callable[..., jax.Array],
    g: Callable[..., jax.Array],
    x1: jax.Array,
    x2: jax.Array,
    dtype: Any,
) -> tuple[tuple[jax.Array, jax.Array], list[jax.Array | None], jax.Array]:
    """One layer, on encoded streams.

    Args:
      coupling: its factors; f and g are used in the place of its own.
      f, g: x -> y, in `dtype`.
      x1, x2: encoded.

    Returns:
      (the pair for the next layer, what the two multiplications have lost, whether the sums are numbers in range).
    """
    streams = coupling.streams
    y1, lost1 = streams.multiply(x1, coupling.lam)
    y1, valid1 = streams.add(y1, f(streams.decode(x2, dtype)))
    y2, lost2 = streams.multiply(x2, coupling.beta)
    y2, valid2 = streams.add(y2, g(streams.decode(y1, dtype)))
    return (y2, y1) if coupling.swap else (y1, y2), [lost1, lost2], valid1 & valid2


def encoded(coupling: Coupling, pair: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(the pair as streams, whether its elements are numbers in range)."""
    made = [coupling.streams.add(jnp.zeros_like(coupling.streams.encode(x)), x) for x in pair]
    return tuple(s for s, _ in made), made[0][1] & made[1][1]


def decoded(coupling: Coupling, pair: tuple[jax.Array, jax.Array], valid: jax.Array) -> tuple[jax.Array, ...]:
    """Streams as float32, NaN if they are not valid."""
    return tuple(jnp.where(valid, coupling.streams.decode(y, jnp.float32), jnp.nan) for y in pair)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(coupling, loop, x1, leaves, key, probe):
    del probe
    last, *_ = _layers(coupling, loop, x1, leaves, key, [False] * len(leaves), keep=False)
    return decoded(coupling, *last)


def _layers(coupling, loop, x1, leaves, key, perturbed, keep):
    """((the last pair, if it is valid); what was lost, per step; pairs that are kept; what is never true; FLOPs)."""
    x2, dtype = leaves[loop.x], leaves[loop.x].dtype
    halves = _halves(coupling, loop, leaves, dtype, key, perturbed)
    never = jnp.isnan(x1.reshape(-1)[0])

    def body(carry, number):
        (pair, pairs, _, valid), step = carry, loop.step(number)
        inputs = loop.inputs(loop.parts(leaves, step.layer), None, step, key)
        made = []

        def evaluated(half):
            def function(x):
                y, values = _evaluate(half, [*inputs[: loop.x], x, *inputs[loop.x + 1 :]], never)
                made.append(values)
                return y

            return function

        x1, x2 = (loop.at(x, "rows", step) for x in pair)
        f, g = (evaluated(half) for half in halves)
        new, lost, fine = couple(coupling, f, g, x1, x2, dtype)
        with jax.named_scope("stream"):
            pair = tuple(loop.put(x, y, "rows", step) for x, y in zip(pair, new, strict=True))
        if coupling.every and keep:
            _, place = _checkpoint(coupling, loop, step)
            with jax.named_scope("save:pair"):
                pairs = tuple(
                    jax.lax.dynamic_update_index_in_dim(p, y, place, 0) for p, y in zip(pairs, new, strict=True)
                )
        kept = (lost, (x1, x2) if coupling.probe else None) if keep else None
        return (pair, pairs, made if keep else None, valid & fine), kept

    start, valid = encoded(coupling, (x1, x2))
    slots = (len(loop.layers) // coupling.every + 1) * loop.groups if coupling.every and keep else 0
    pairs = tuple(empty((slots, *x.shape[1:]), x.dtype) for x in start) if slots else ()
    # The values of one step are carried, and one of each is read at the end: else the branches of this loop would be
    # relieved of them, and be other programs than those of the backward loop.
    made = [[jnp.zeros(v.shape, v.dtype) for v in half.shapes[1:]] for half in halves] if keep else None
    (pair, pairs, made, valid), lost = jax.lax.scan(body, (start, pairs, made, valid), loop.steps)
    for value in jax.tree.leaves(made):
        never = never | jnp.isnan(value.reshape(-1)[0])
    return (pair, valid), lost, pairs, never, len(loop.steps) * sum(half.flops for half in halves)


def _checkpoint(coupling, loop, step):
    """(whether the pair after this step is kept, where; the first places take those that are not)."""
    done = step.layer + 1
    kept = done % coupling.every == 0
    return kept, jnp.where(kept, done // coupling.every, 0) * loop.groups + step.group


def _forward(coupling, loop, x1, leaves, key, probe):
    del probe
    perturbed = [leaf.perturbed for leaf in leaves]
    moved = x1.perturbed
    x1, leaves, key = x1.value, [leaf.value for leaf in leaves], None if key is None else key.value
    (pair, valid), lost, pairs, never, flops = _layers(coupling, loop, x1, leaves, key, perturbed, keep=True)
    rest = [None if i == loop.x else leaf for i, leaf in enumerate(leaves)]
    like = jnp.zeros((0,), leaves[loop.x].dtype)
    sizes = {"stream": tree.num_bytes(pair), "remainder": tree.num_bytes(lost[0]), "pair": tree.num_bytes(pairs)}
    record(loop.name, Reversible(sizes, flops))
    return decoded(coupling, pair, valid), (Static([moved, *perturbed]), rest, key, pair, lost, pairs, never, like)


def _backward(coupling, loop, saved, d_pair):
    (moved, *perturbed), leaves, key, pair, lost, pairs, never, like = saved
    if all(isinstance(d, SymbolicZero) for d in d_pair):
        return None, [None] * len(leaves), None, None
    dtype = like.dtype
    d_pair = tuple(jnp.zeros(d.shape, dtype) if isinstance(d, SymbolicZero) else d.astype(dtype) for d in d_pair)
    leaves = [jax.ShapeDtypeStruct(pair[0].shape, dtype) if leaf is None else leaf for leaf in leaves]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaves)
    f, g = _halves(coupling, loop, shapes, dtype, key, perturbed)
    leaves[loop.x] = None
    streams, lam, beta = coupling.streams, coupling.lam, coupling.beta
    trained = sorted({*f.moved, *g.moved} - {loop.x})

    def swapped(pair):
        return pair[::-1] if coupling.swap else pair

    def body(carry, inputs):
        pair, d_pair, totals, errors = carry
        number, ((lost1, lost2), seen) = inputs
        step = loop.step(number)
        own = tuple(loop.at(y, "rows", step) for y in pair)
        if coupling.every:
            kept, place = _checkpoint(coupling, loop, step)
            with jax.named_scope("read:pair"):
                own = tuple(
                    jnp.where(kept, jax.lax.dynamic_index_in_dim(p, place, keepdims=False), y)
                    for p, y in zip(pairs, own, strict=True)
                )
        y1, y2 = swapped(own)
        d1, d2 = swapped(tuple(loop.at(d, "rows", step) for d in d_pair))
        inputs = loop.inputs(loop.parts(leaves, step.layer), None, step, key)

        def both(half, stream, inputs):
            inputs = [*inputs[: loop.x], streams.decode(stream, dtype), *inputs[loop.x + 1 :]]
            y, values = _evaluate(half, inputs, never)
            return streams.encode(y), lambda d_y: _pull(half, inputs, d_y, values)

        of_y1, pull_g = both(g, y1, inputs)
        with jax.named_scope("read:remainder"):
            x2 = streams.divide(y2 - of_y1, beta, lost2)
        of_x2, pull_f = both(f, x2, inputs)
        with jax.named_scope("read:remainder"):
            x1 = streams.divide(y1 - of_x2, lam, lost1)
        from_g = pull_g(d2)
        d1 = d1 + from_g.pop(loop.x)
        from_f = pull_f(d1)
        d2 = _times(d2, beta) + from_f.pop(loop.x)
        d1 = _times(d1, lam)
        with jax.named_scope("stream"):
            pair = tuple(loop.put(y, x, "rows", step) for y, x in zip(pair, (x1, x2), strict=True))
            d_pair = tuple(loop.put(whole, d, "rows", step) for whole, d in zip(d_pair, (d1, d2), strict=True))
        totals = dict(totals)
        for found in (from_g, from_f):
            for i, part in found.items():
                with jax.named_scope(f"grad:{loop.paths[i]}"):
                    totals[i] = loop.put(totals[i], part, loop.kinds[i], step, add=True)
        if coupling.probe:
            errors = errors.at[step.layer].add(_differences(coupling, (x1, x2), seen))
        return (pair, d_pair, totals, errors), None

    totals = {i: jnp.zeros(leaves[i].shape, leaves[i].dtype) for i in trained}
    errors = jnp.zeros((len(loop.layers), 3))
    start = (pair, d_pair, totals, errors)
    (_, d_pair, totals, errors), _ = jax.lax.scan(body, start, (loop.steps, lost), reverse=True)
    if perturbed[loop.x]:
        totals[loop.x] = d_pair[1]
    return d_pair[0] if moved else None, [totals.get(i) for i in range(len(leaves))], None, errors


_run.defvjp(_forward, _backward, symbolic_zeros=True)


def _differences(coupling, found, seen):
    """(3,): elements that differ, the sum of the differences' squares, that of the elements' squares."""
    found, seen = jnp.stack(found), jnp.stack(seen)
    count = jnp.sum(found != seen, dtype=jnp.float32)
    found, seen = (coupling.streams.decode(x, jnp.float32) for x in (found, seen))
    return jnp.stack([count, jnp.sum((found - seen) ** 2), jnp.sum(seen**2)])


def _times(d, factor: Fraction):
    return d if factor == 1 else d * jnp.asarray(float(factor), d.dtype)


class Reversible(NamedTuple):
    """A segment as it was traced (see `jaxpeft.backward.segments.recorded`)."""

    kept: dict[str, int]
    flops: float

    def kept_bytes(self) -> dict[str, dict[str, int]]:
        """{"device" or "host": {name: bytes of all layers}}."""
        return {"device": self.kept, "host": {}}

    def recompute_flops(self) -> float:
        """FLOPs of matrix products that the backward pass computes again."""
        return self.flops


def check(name: str, coupling: Coupling) -> None:
    """Raises InputError for factors that the streams cannot be divided by."""
    for which, factor in (("lam", coupling.lam), ("beta", coupling.beta)):
        if factor <= 0:
            raise InputError(f"{name}: {which} {factor} must be above 0")
        n, k = factor.numerator, factor.denominator.bit_length() - 1
        if isinstance(coupling.streams, Fixed) and (factor.denominator != 2**k or k > 16 or n % 2 == 0):
            raise InputError(f"{name}: {which} {factor} must be n / 2^k with n odd and k at most 16 for exact streams")
