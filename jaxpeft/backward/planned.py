"""A memory plan for layers of the user's own: the loop over them, in place of `lax.scan(jax.checkpoint(block))`.

The names that a plan speaks of are those that the block gives; products without one are named by where they are made
(inline.py). The scans in a whole model are run so by scans.py.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxpeft.backward.inline import name_products
from jaxpeft.backward.loop import Loop, join, loop_over
from jaxpeft.backward.norms import naming
from jaxpeft.backward.passes import run_loop
from jaxpeft.backward.plan import Plan, parse, reads_norms
from jaxpeft.errors import InputError
from jaxpeft.model import Context


def planned_scan(
    block: Callable[..., Any],
    params: Any,
    x: Any,
    ctx: Any = None,
    save: str | Plan = "matmuls",
    *,
    key: jax.Array | None = None,
    budget: int | None = None,
    shards: int = 1,
    name: str = "layers",
) -> Any:
    """x after all layers, x <- block(layer, x, ctx); what each layer keeps for its backward pass is under a plan.

    It stands where `lax.scan(jax.checkpoint(block), x, params)` would, and gives the same values and gradients
    (`compress`, `compress12` and `compress4` round them, `prune` leaves out what is small). What the block calls
    through `jax.checkpoint` is opened: the plan decides.

    Args:
      block: (layer, x, ctx) -> x, of the same shapes and types; pure. It may read other arrays, and they may be
        differentiated. Names that it gives (`checkpoint_name`) are the plan's; products without one are called as the
        modules that they run in ("attention/query") or the line of code that makes them ("train.py:41 block").
      params: a pytree of arrays with a leading axis of layers. What differs from layer to layer goes here, PRNG keys
        too.
      x: an array, or a pytree of arrays, of floating point.
      ctx: what all layers read, any pytree. As `jaxpeft.model.Context(rows, shared)` it says what belongs to the rows
        of x (B, S, ...): a few of them are then taken at a time (`tokens` of the plan), for which rows must not see
        each other in the block; and the block gets a Context with the layer's number and key.
      save: a plan, or its text (see `jaxpeft.backward.plan.parse`).
      key: with a Context: layer i gets `fold_in(key, i)`, and groups of rows keys of their own.
      budget: bytes of what all layers keep on the device, at most: the plan with the least recomputation under it is
        taken, of those that only save (with `save="offload"`: also offload; "compressed": also compress;
        "compressed12": also compress12; "compressed4": also compress4).
      shards: devices over which the rows of x are divided.
      name: of these layers, in tables and profiles.

    Returns:
      As x.

    Raises:
      InputError: for a plan that cannot be read, names nothing, or is under no budget; leaves without a common number
        of layers; a block that gives something else than x; a key without a Context.
    """
    plan = _within(parse(save), budget)
    own = isinstance(ctx, Context)
    if key is not None and not own:
        raise InputError(
            "planned_scan: a key needs a Context as ctx, in which the block finds its own; or put keys into params"
        )
    if plan.tokens != Plan().tokens and not own:
        raise InputError(
            f"planned_scan: tokens={plan.tokens} needs a Context as ctx, which says what belongs to rows; leave it out"
        )
    if plan.tile is not None:
        raise InputError(
            f"planned_scan: tile={plan.tile} is of this library's models, whose layers say which part takes tokens one "
            "by one; leave it out"
        )
    told = Context(ctx.rows, ctx.shared) if own else Context(shared=ctx)
    layers = range(_length(params))
    if not layers:
        return x
    _check(block, params, x, ctx if own else None, told, key)

    def layer(part, x, here):
        return block(part, x, here if own else here.shared), None

    if plan.preset == "everything":
        of = (params, jnp.arange(len(layers)))
        return jax.lax.scan(lambda x, part: layer(part[0], x, told.at(part[1], key)), x, of)[0]
    tokens = plan.tokens if own else None
    loop, leaves = loop_over(layer, name, layers, params, x, told, key is not None, tokens, shards)
    with naming(reads_norms(plan)):
        loop, leaves, _ = named(loop, leaves, key)
    return jax.tree.unflatten(jax.tree.structure(x), [join(end) for end in run_loop(loop, plan, leaves, key)])


def _within(plan: Plan, budget: int | None) -> Plan:
    if budget is None:
        return plan
    if plan.actions or plan.preset in ("everything", "blocks"):
        raise InputError(
            f"planned_scan: save={str(plan)!r} leaves a budget no choice; use matmuls, offload, compressed, "
            "compressed12 or compressed4"
        )
    if not isinstance(budget, numbers.Integral) or isinstance(budget, bool) or budget < 1:
        raise InputError(f"planned_scan: budget={budget!r} should be bytes, a whole number above 0")
    return plan._replace(budget=int(budget))


def _length(params: Any) -> int:
    found = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(found) != 1 or found == {()}:
        said = (
            "no leaves"
            if not found
            else f"leaves of {', '.join(str(n[0]) if n else 'no' for n in sorted(found))} layers"
        )
        raise InputError(f"planned_scan: params has {said}; every leaf should have one leading axis of layers")
    return found.pop()[0]


def _check(block, params, x, ctx, told, key) -> None:
    """Refuses a block that gives something else than x, and what no gradient can flow through."""
    for path, leaf in jax.tree.leaves_with_path(x):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"planned_scan: x{jax.tree_util.keystr(path)} is {leaf.dtype}{[*leaf.shape]}; it should be of floating "
                "point; what layers only read goes into ctx, what differs between them into params"
            )

    def one(params, x, told, key):
        part = jax.tree.map(lambda leaf: leaf[0], params)
        return block(part, x, told.shared if ctx is None else told.at(jnp.int32(0), key))

    y = jax.eval_shape(one, params, x, told, key)
    said, wanted = (
        jax.tree.map(lambda leaf: f"{leaf.dtype}{[*leaf.shape]}", value)
        for value in (y, jax.eval_shape(lambda x: x, x))
    )
    if said != wanted:
        raise InputError(f"planned_scan: the block gives {said}, x is {wanted}; it should give what it takes")


def named(loop: Loop, leaves: list[Any], key: Any) -> tuple[Loop, list[Any], str]:
    """(the loop with its block's products named, its leaves and what the block closes over; the modules in common)."""
    closed = jax.make_jaxpr(loop.function)(*loop.shapes(leaves, [leaves[i] for i in loop.streams], key))
    jaxpr = closed.jaxpr.replace(
        constvars=[],
        invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars],
        debug_info=closed.jaxpr.debug_info.with_unknown_names(),
    )
    named, prefix = name_products(ClosedJaxpr(jaxpr, ()))
    compute = jaxpr_as_fun(named)
    leaves = [*leaves, *(jnp.asarray(const) for const in closed.consts)]
    params, x, ctx = jax.tree.unflatten(loop.treedef, range(loop.treedef.num_leaves))
    places = (params, x, Context(ctx.rows, {"own": ctx.shared, "consts": [*range(len(loop.kinds), len(leaves))]}))
    order, treedef = jax.tree.flatten(places)  # of a dict's entries the names decide

    def block(layer, x, own):
        known = jax.tree.leaves((layer, x, Context(own.rows, own.shared["own"])))
        return compute(*own.shared["consts"], *known, own.layer, *([] if own.key is None else [own.key])), None

    more = len(leaves) - len(loop.kinds)
    kinds, paths = [*loop.kinds, *["shared"] * more], [*loop.paths, *["closed over"] * more]
    loop = loop._replace(
        block=block, treedef=treedef, kinds=tuple(kinds[i] for i in order), paths=tuple(paths[i] for i in order)
    )
    return loop, [leaves[i] for i in order], prefix
