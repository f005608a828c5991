"""What a layer keeps for its backward pass: each named activation is saved, recomputed, compressed or offloaded.

The layers are run twice by loops of our own. With l the layer, g a group of the batch's rows and n a name,

    forward   for l, for g:   x_g, v = block(W_l, x_g);   keep_n[l, g] = store(v_n)        for the names that are kept
    backward  for l, for g:   d W_l, d x_g = vjp of block at (W_l, keep_x[l, g]) applied to d x_g,
                              in which fetch(keep_n[l, g]) takes the place of v_n

so the backward pass runs the block again, but whatever only led to a v_n that was kept is dead code. What nothing would
read is not kept. The names are those that the model gives (`jax.ad_checkpoint.checkpoint_name`); `block_input` is x.

    action      store, fetch
    save        the array itself
    recompute   nothing
    compress    8-bit codes and one float32 scale per token, rounded so that the mean is exact (compressed.py; what has
                fewer than two axes, or is no float, is saved); the forward pass goes on with the exact value, the
                backward pass reads the rounded one (as in ActNN, Chen et al. 2021, arXiv:2104.14129)
    compress12  bfloat16 in 12 bits, the exponent as its distance from a block's largest (twelve_bits.py), of the same
                activations
    compress4   4-bit codes, a step and the largest number of each block of channels (four_bits.py), of the same
                activations; rounded as with compress
    prune       the largest tenth of each row and where it is (pruned.py), of the same activations; `prune:0.25` a
                quarter; the backward pass reads zeros elsewhere
    offload     the array in the host's pinned memory

A block gets its frozen kernels as layers of the stacks that they lie in (`pallas_kernels.stacked`): the fused products
of GPUs and TPUs read them there, which spares a copy of each kernel in each pass.

Rows don't see each other inside a block, so both loops take a few of them at a time: what a block needs besides the
kept arrays shrinks with the group, and no product is computed twice for it. On GPUs groups are a loop within that over
layers (`loop.nests`): adapters, and kernels where products cannot read stacks, are taken once per layer and pass. A
kernel that the backward pass reads once is taken where it is read, or it would stay beside what is live elsewhere.
Where x is saved, the forward pass there has no stream besides: x_g of layer l is keep_x[l, g], and the block writes
keep_x[l + 1, g]; the last one writes in the place of the first one's input, which is put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun

from jaxpeft import constraints, host, tree
from jaxpeft.backward.kept import fetch, has_codes, room, seed_of, store
from jaxpeft.backward.loop import Loop, Static, flows, replaced
from jaxpeft.backward.norms import naming
from jaxpeft.backward.options import options
from jaxpeft.backward.places import compute, makers
from jaxpeft.backward.plan import INPUT, action_of, codes_of, is_code, reads_norms
from jaxpeft.backward.programs import Kept, decide
from jaxpeft.backward.segments import Segment, record
from jaxpeft.errors import InputError
from pallas_kernels.platform import writes_in_place


def _decide(loop, plan, leaves, streams, key, perturbed):
    """(traced block, {kept: action}, the backward jaxpr, inputs that it reads, kept values in its order)."""
    with naming(reads_norms(plan)):
        traced = loop.programs(leaves, streams, key, perturbed)
    plan = plan if plan.budget is None else _under_budget(plan, loop, traced, streams)
    actions = decide(plan, traced)
    closed, used, read = traced.backward(actions)
    shapes = _shapes(traced, streams)
    actions = {name: actions[name] for name in read}
    action = dict(plan.actions).get(INPUT) or action_of(plan.preset, INPUT)
    actions |= {(INPUT, n): action for n, i in enumerate(loop.streams) if used[i]}
    actions = {
        name: "save" if is_code(action) and not has_codes(shapes[name]) else action for name, action in actions.items()
    }
    return traced, actions, closed, used, read


def _under_budget(plan, loop, traced, streams):
    """The plan with the least recomputation under the budget."""
    segment = Segment(traced, len(loop.steps), {}, _shapes(traced, streams))
    code = codes_of(plan.preset)
    more = ("offload",) if plan.preset == "offload" else (code,) if code else ()
    found = options({loop.name: segment}, ("save", *more), plan.tokens)
    chosen = next((option.plan for option in found if option.kept <= plan.budget), None)
    if chosen is None:
        raise InputError(
            f"budget={plan.budget}: the inputs of {len(loop.layers)} layers alone take {found[-1].kept} bytes"
        )
    return chosen


def _shapes(traced, streams):
    ones = {(INPUT, n): jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in enumerate(streams)}
    return {**dict(zip(traced.names, traced.shapes, strict=True)), **ones}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_loop(loop, plan, leaves, key):
    """The streams after all layers, [(groups, rows, ...) each]; differentiated under a plan.

    Args:
      loop: of `loop_over`.
      plan: what is kept.
      leaves: the loop's.
      key: of the forward pass, or None.
    """
    loop = loop.stacked(leaves, [False] * len(leaves))

    def body(streams, parts, step):
        ys = loop.function(*loop.inputs(parts, streams, step, key))
        return [loop.put(x, y, "rows", step) for x, y in zip(streams, ys, strict=True)], None

    return loop.scan(body, [leaves[i] for i in loop.streams], leaves)[0]


def forward(loop, plan, leaves, key, nests=False):
    """`run_loop`'s (streams, what `gradients` needs), leaves and key as a rule with symbolic zeros has them.

    nests: whether groups of rows have to be a loop within that over layers, where there are several.
    """
    perturbed = [leaf.perturbed for leaf in leaves]
    leaves, key = [leaf.value for leaf in leaves], None if key is None else key.value
    streams = [leaves[i] for i in loop.streams]
    loop, (traced, actions, closed, used, _) = _nested(loop, plan, leaves, streams, key, perturbed, nests)
    shapes = _shapes(traced, streams)
    numbers = {name: n for n, name in enumerate(traced.names, len(streams)) if actions.get(name) == "save"}
    placed = makers(traced.forward, list(numbers.values())) if writes_in_place() else {}
    numbers = {name: n for name, n in numbers.items() if n in placed}
    # What comes into a layer is kept for all groups at once, where they are a loop of their own.
    entering = {name for name, action in actions.items() if loop.nested and name[0] == INPUT and not is_code(action)}
    # A stream whose inputs are all kept lies in them: a block writes what comes into the next one.
    flowing = {n: (INPUT, n) for n in range(len(streams)) if flows() and actions.get((INPUT, n)) == "save"}
    entering -= set(flowing.values())
    record(loop.name, Segment(traced, len(loop.steps), actions, shapes))

    def enter(carry, layer):
        (streams, kept), out = carry, {}
        kept = dict(kept)
        for name in entering:
            x = streams[name[1]]
            with jax.named_scope(f"save:{name[0]}"):
                if actions[name] == "offload":
                    out[name] = store(x, "offload", name, None)
                else:
                    whole = kept[name].reshape(len(loop.layers), *x.shape)
                    kept[name] = replaced(whole, x, layer).reshape(kept[name].shape)
        return (streams, kept), out

    def body(carry, parts, step):
        streams, kept = carry
        inputs = loop.inputs(parts, streams, step, key)
        for n, name in flowing.items():
            with jax.named_scope(f"read:{name[0]}"):
                inputs[loop.streams[n]] = loop.at(kept[name], "steps", step)
        stacks = {n: kept[name] for name, n in numbers.items()}
        called = {n: f"save:{name}/in_place" for (name, _), n in numbers.items()}
        results = compute(traced.forward, inputs, stacks, step.number, called)
        ys = results[: len(streams)]
        values: dict[Kept, Any] = dict(zip(traced.names, results[len(streams) :], strict=True))
        values |= {(INPUT, n): inputs[i] for n, i in enumerate(loop.streams)}
        seed = seed_of(step.number, key)
        kept, out = dict(kept), {}
        for name, action in actions.items():
            if name in entering or name in flowing.values():
                continue
            with jax.named_scope(f"save:{name[0]}"):
                if name in numbers:
                    kept[name] = values[name]
                    continue
                value = store(values[name], action, name, seed)
                if action == "offload":
                    out[name] = value  # a loop's results may lie in the host's memory, what it carries may not
                else:
                    kept[name] = jax.tree.map(lambda x, part: loop.put(x, part, "steps", step), kept[name], value)
        for n, name in flowing.items():
            with jax.named_scope(f"save:{name[0]}"):
                kept[name] = replaced(kept[name], ys[n], (step.number + loop.groups) % len(loop.steps))
        with jax.named_scope("stream"):
            streams = [None if x is None else loop.put(x, y, "rows", step) for x, y in zip(streams, ys, strict=True)]
            return (streams, kept), out

    rooms = {name: room(shapes[name], action, len(loop.steps)) for name, action in actions.items()}
    start = {name: x for name, x in rooms.items() if x is not None}
    start |= {name: _first(loop, start[name], streams[n]) for n, name in flowing.items()}
    apart = [None if n in flowing else x for n, x in enumerate(streams)]
    (end, kept), out = loop.scan(body, (apart, start), leaves, enter=enter)
    for n, name in flowing.items():
        # The last block has written into the place of the first one's input.
        last, kept[name] = jax.lax.optimization_barrier((kept[name][: loop.groups], kept[name]))
        # Before anything reads what leaves the layers: what has entered them need not live on.
        end[n], kept[name] = jax.lax.optimization_barrier((last, _first(loop, kept[name], streams[n])))
    kept |= {name: x.reshape(len(loop.steps), *shapes[name].shape) for name, x in out.items()}
    kept = [kept[name] for name in actions]
    leaves = [None if i in loop.streams else leaf for i, leaf in enumerate(leaves)]
    back = loop.holding(_read_again(loop, closed, used).__contains__)
    return end, (Static([back, *perturbed]), leaves, key, kept, [jnp.zeros((0,), x.dtype) for x in streams])


def _first(loop, kept, x):
    """What is kept of all steps, with a stream (groups, ...) in the place of those of the first layer."""
    with jax.named_scope(f"save:{INPUT}"):
        whole = kept.reshape(len(loop.layers), *x.shape)
        return replaced(whole, x, 0).reshape(kept.shape)


def _nested(loop, plan, leaves, streams, key, perturbed, nests=False):
    """(the loop with the frozen kernels as stacks, what `_decide` says of it).

    Groups are no loop of their own where they would put what they have made into the host's memory.

    nests: whether they have to be one, where there are several.
    """
    for nested in ("always" if nests else True, False):
        own = loop.stacked(leaves, perturbed, nested)
        decided = _decide(own, plan, leaves, streams, key, perturbed)
        away = [name for (name, _), action in decided[1].items() if name != INPUT and action == "offload"]
        if not own.nested or not away:
            break
        if nests:
            raise InputError(
                f"--save {plan} --update-in-backward: {away[0]} would be offloaded by groups of rows, of which a "
                f"layer's gradient is the sum; offload {INPUT} alone, or let tokens= take all rows at once"
            )
    return own, decided


def _read_again(loop, closed, used) -> set[int]:
    """Of the kernels that are held, those whose layer a step reads more than once: a copy stays for it anyway."""
    variables = iter(closed.jaxpr.invars)
    read = [next(variables) if use else None for use in used]
    reads = [v for equation in closed.jaxpr.eqns for v in equation.invars]
    held = zip(loop.held, read[len(read) - len(loop.held) :], strict=True)
    return {i for i, v in held if sum(v is other for other in reads) > 1}


class Update(NamedTuple):
    """The update of a layer inside the backward loop, as soon as its gradients are there.

    paths: of the leaves that it changes.
    state: a pytree of arrays with a leading axis of layers, the optimizer's state of these leaves.
    change: (gradients, leaves, state) -> (leaves, state) of one layer, its axis of layers 1 long; the first two are
      {path: array}.
    """

    paths: frozenset[str]
    state: Any
    change: Callable[[tree.Flat, tree.Flat, Any], tuple[tree.Flat, Any]]


class Updated(NamedTuple):
    """What an `Update` of all layers leaves behind.

    leaves: {number of the leaf: its stack}.  state: as in `Update`.
    squares: () float32, the sum of all squares of the gradients.
    """

    leaves: dict[int, jax.Array]
    state: Any
    squares: jax.Array

    def layer(self, loop: Loop, update: Update, found: dict[int, jax.Array], layer: jax.Array) -> Updated:
        """After the update of a layer; `found` are the gradients of its leaves (...)."""
        own = lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1)
        put = lambda whole, part: replaced(whole, host.put(part[0]) if host.holds(whole) else part[0], layer)
        by_path = lambda parts: {loop.paths[i]: part for i, part in parts.items()}
        squares = sum(jnp.sum(jnp.square(part.astype(jnp.float32))) for part in found.values())
        with jax.named_scope("update"):
            grads = by_path({i: part[None] for i, part in found.items()})
            leaves, state = _at_once(update.change, layer)(
                grads, by_path(jax.tree.map(own, self.leaves)), host.fetched(jax.tree.map(own, self.state))
            )
            return Updated(
                {i: put(whole, leaves[loop.paths[i]]) for i, whole in self.leaves.items()},
                jax.tree.map(put, self.state, state),
                self.squares + squares,
            )


def _at_once(change: Callable[..., Any], layer: jax.Array) -> Callable[..., Any]:
    """The function, all of whose arguments are read before anything of its results is written.

    XLA would fuse, on a CPU, the reading of one stack with the writing of another, and then copy both for each layer;
    it heeds no barrier there, but a branch that it cannot foresee.
    """

    def apart(*args):
        shapes = jax.eval_shape(change, *args)
        nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(layer >= 0, change, nothing, *args)

    return lambda *args: jax.lax.platform_dependent(*args, cpu=apart, default=change)


def _backward(loop, plan, saved, d_end):
    leaves = saved[1]
    if all(isinstance(d, SymbolicZero) for d in d_end):
        return [None] * len(leaves), None
    return gradients(loop, plan, saved, d_end)[0], None


def gradients(loop, plan, saved, d_end, update=None):
    """(the gradient of each leaf, None where there is none or `update` has used it; what the update leaves behind)."""
    (loop, *perturbed), leaves, key, kept, like = saved
    streams = [jax.ShapeDtypeStruct(d.shape, x.dtype) for d, x in zip(d_end, like, strict=True)]
    d_end = [jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in d_end]
    traced, actions, closed, used, read = _decide(loop, plan, leaves, streams, key, perturbed)
    pull = jaxpr_as_fun(closed)
    shapes = _shapes(traced, streams)
    moved = [i for i, use in enumerate(perturbed) if use or i in loop.streams]
    changed = [i for i in moved if update is not None and i not in loop.streams and loop.paths[i] in update.paths]
    summed = [i for i in moved if i not in loop.streams and i not in changed]

    # On a mesh sums over devices are taken as each layer's are complete: else XLA takes those of the whole stack there.
    apart = [i for i in moved if i not in loop.streams and loop.nested and constraints.gathers() and loop.by_layer(i)]
    apart += [i for i in changed if loop.nested and i not in apart]

    def body(carry, parts, step):
        d_streams, totals, own, after = carry
        values = {
            name: fetch(x, step.number, action, name, shapes[name])
            for (name, action), x in zip(actions.items(), kept, strict=True)
        }
        inputs = loop.inputs(parts, None, step, key)
        for n, i in enumerate(loop.streams):
            inputs[i] = values.get((INPUT, n))
        inputs = [x for x, use in zip(inputs, used, strict=True) if use]
        d_ys = [loop.at(d, "rows", step) for d in d_streams]
        if loop.nested:  # else XLA writes copies of them together with sums, which it then reads twice
            d_ys = jax.lax.optimization_barrier(d_ys)
        found = dict(zip(moved, pull(*inputs, *d_ys, *[values[name] for name in read]), strict=True))
        with jax.named_scope("stream"):
            d_streams = [loop.put(d, found.pop(i), "rows", step) for d, i in zip(d_streams, loop.streams, strict=True)]
        totals, own = dict(totals), dict(own)
        if changed and not loop.nested:
            after = after.layer(loop, update, {i: found.pop(i) for i in changed}, step.layer)
        for i, part in found.items():
            with jax.named_scope(f"grad:{loop.paths[i]}"):
                if i in own:
                    own[i] += part
                else:
                    totals[i] = loop.put(totals[i], part, loop.kinds[i], step, add=not loop.once(loop.kinds[i]))
        return (d_streams, totals, own, after), None

    def enter(carry, layer):
        d_streams, totals, own, after = carry
        return (d_streams, totals, jax.tree.map(jnp.zeros_like, own), after), None

    def leave(carry, layer):
        d_streams, totals, own, after = carry
        if changed:
            after = after.layer(loop, update, {i: own[i] for i in changed}, layer)
        whole = {i: replaced(totals[i], x, layer) for i, x in own.items() if i not in changed}
        return d_streams, {**totals, **whole}, own, after

    def now(carry):
        """The leaves, those that change as the loop goes as they are."""
        return leaves if update is None else [carry[3].leaves.get(i, leaf) for i, leaf in enumerate(leaves)]

    totals = {i: loop.total(leaves[i], loop.kinds[i]) for i in summed}
    own = {i: jnp.zeros(leaves[i].shape[1:], leaves[i].dtype) for i in apart}
    after = None if update is None else Updated({i: leaves[i] for i in changed}, update.state, jnp.zeros(()))
    carry = (d_end, totals, own, after)
    (d_streams, totals, _, after), _ = loop.scan(body, carry, now, reverse=True, enter=enter, leave=leave)
    totals |= {i: d for i, d in zip(loop.streams, d_streams, strict=True) if perturbed[i]}
    return [totals.get(i) for i in range(len(leaves))], after


run_loop.defvjp(forward, _backward, symbolic_zeros=True)
