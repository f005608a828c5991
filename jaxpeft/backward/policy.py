"""A memory plan as a policy of `jax.checkpoint`, and the layers run under one.

Saved, recomputed and offloaded is by name (`jax.ad_checkpoint.checkpoint_name`), with JAX's own policies
(`jax.checkpoint_policies`). What a policy cannot do that our own loops (`passes.py`) can:

    compress, prune   a policy says where a value lies, not what is made of it
    tokens            it acts inside one call of a block, and cannot divide the rows of its input
    block_input       what goes into a checkpointed function is always kept, on the device
    one of several    values of one name all have one fate; a loop may keep the first and not the second
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.backward.loop import Loop, loop_over
from jaxpeft.backward.plan import INPUT, Plan, action_of, codes_of, is_code, parse
from jaxpeft.backward.programs import Programs, decide, trace
from jaxpeft.backward.residuals import by_segment
from jaxpeft.backward.segments import Segment, record, told
from jaxpeft.errors import InputError
from jaxpeft.quant import is_packed

Policy = Callable[..., Any]
_JAX = jax.checkpoint_policies
_WHERE = {"offload_src": "device", "offload_dst": "pinned_host"}


def checkpoint_policy(plan: str | Plan, block: Callable[..., Any] | None = None, *args: Any) -> Policy:
    """A plan as the `policy` of `jax.checkpoint`, `nn.remat`, `nnx.remat`, or what else takes one.

        everything        `everything_saveable`
        blocks            `nothing_saveable`
        NAME=ACTION,...   what is called so is saved, or offloaded to the host's pinned memory; all else is recomputed
        matmuls           with a block: the fewest bytes of named values that spare every product of its backward pass.
                          Without one: every product's result, `dots_saveable`, and what the plan saves by name
        offload           with a block: those names, the large ones to the host. Without one: the results of products
                          without batch dimensions go there, `offload_dot_with_no_batch_dims`

    The actions of names come on top of a preset. Under `jax_remat3` JAX 0.10 heeds names that are saved only: what
    should be offloaded or is no name is recomputed there; JAX 0.12 heeds all of it.

    Args:
      plan: a plan, or its text, such as `jaxpeft plan` prints.
      block: what will be checkpointed, a function of arrays to one array.
      *args: its arguments, or their shapes.

    Returns:
      The policy.

    Raises:
      InputError: for a plan that cannot be read, or asks for what a policy cannot do: compress, compress12, compress4,
        prune, tokens=, another action for `block_input`; a name that a preset is to recompute where no block says which
        products it is of; with a block, for a name that none of its activations has, or results that are not one array.
    """
    plan = checked(parse(plan))
    if block is not None and not args:
        raise InputError("checkpoint_policy: the block needs its arguments, or their shapes, after it")
    if block is not None and plan.preset != "everything":
        return by_name(*names_of(plan, _traced(block, args)))
    saved = [name for name, action in plan.actions if action == "save"]
    offloaded = [name for name, action in plan.actions if action == "offload"]
    if plan.preset == "everything":
        return _JAX.everything_saveable
    if plan.preset == "blocks":
        return by_name(saved, offloaded)
    if other := [name for name, action in plan.actions if action != "save"]:
        raise InputError(
            f"--save {plan}: {plan.preset} keeps products by what they are, and {other[0]} may be one; give the block "
            f"and its arguments too, or start from blocks"
        )
    if plan.preset == "matmuls":
        return _JAX.save_from_both_policies(_JAX.dots_saveable, by_name(saved)) if saved else _JAX.dots_saveable
    if saved:
        raise InputError(f"--save {plan}: give the block and its arguments too, or start from blocks")
    return _JAX.offload_dot_with_no_batch_dims(*_WHERE.values())


def checked(plan: Plan) -> Plan:
    """The plan, if a policy can do what it says.

    Raises:
      InputError: where it cannot.
    """
    said = f"--save {plan}: as a policy of jax.checkpoint"
    asked = [name for name, action in plan.actions if is_code(action)]
    if codes_of(plan.preset) or asked:
        raise InputError(
            f"{said}, {asked[0] if asked else plan.preset} cannot be: a policy says where a value lies, and changes "
            f"none; save, recompute or offload it, or use --remat loops"
        )
    if plan.tokens != Plan().tokens:
        raise InputError(f"{said}, tokens={plan.tokens} means nothing: it cannot divide rows; leave it out")
    if plan.tile is not None:
        raise InputError(f"{said}, tile={plan.tile} means nothing: it cannot divide tokens; use --remat loops")
    if dict(plan.actions).get(INPUT, "save") != "save":
        raise InputError(f"{said}, {INPUT} is always saved: it is what goes in; leave it out, or use --remat loops")
    return plan._replace(actions=tuple((name, action) for name, action in plan.actions if name != INPUT))


def by_name(saved: Iterable[str], offloaded: Iterable[str] = ()) -> Policy:
    """JAX's policy for these names; all else is recomputed."""
    saved, offloaded = sorted(saved), sorted(offloaded)
    if offloaded:
        lists = {"names_which_can_be_saved": saved, "names_which_can_be_offloaded": offloaded}
        return _JAX.save_and_offload_only_these_names(**lists, **_WHERE)
    return _JAX.save_only_these_names(*saved) if saved else _JAX.nothing_saveable


def names_of(plan: Plan, programs: Programs) -> tuple[set[str], set[str]]:
    """What a plan saves and what it offloads of a traced block, by name.

    Raises:
      InputError: for a name in the plan that no activation has.
    """
    actions = decide(plan, programs)
    found: dict[str, set[str]] = {"save": set(), "offload": set()}
    for (name, _), action in actions.items():
        found[action].add(name)
    return found["save"], found["offload"]


def _traced(block: Callable[..., Any], args: tuple[Any, ...]) -> Programs:
    leaves, treedef = jax.tree.flatten(args)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]

    def function(*leaves):
        results = jax.tree.leaves(block(*treedef.unflatten(leaves)))
        if len(results) != 1:
            raise InputError(f"checkpoint_policy: the block gives {len(results)} arrays; it should give one")
        return results

    return trace(function, shapes, [jnp.issubdtype(x.dtype, jnp.inexact) for x in shapes])


# The layers of a model under a policy.


def planned(plan: Plan, trained: Callable[[str], bool] | None = None) -> Callable[..., tuple[jax.Array, Any]]:
    """`run` of a stack (see `jaxpeft.model`): a scan over `jax.checkpoint` of the block, under the plan's policy.

    Args:
      plan: that `checked` has passed.
      trained: path -> whether it may be differentiated, which tells what the backward pass reads; None: all may.
    """

    def layers(stack, segment, numbers, params, x, ctx, key):
        block = functools.partial(stack.block, cache=None, segment=segment)
        inputs = (params, x, ctx)
        loop, leaves = _loop(block, segment, numbers, inputs, key)
        programs = functools.partial(loop.programs, leaves, [leaves[loop.x]], key)
        names = names_of(plan, programs(_differentiated(loop, inputs, trained)))

        def layer(x, per_layer):
            part, index = per_layer
            return block(part, x, ctx.at(index, key))

        x = told(functools.partial(_tell, loop, plan, names, programs), jax.tree.leaves(inputs))[loop.x]
        # In a scan nothing stands beside the layer that a common subexpression could be shared with.
        layer = jax.checkpoint(layer, policy=by_name(*names), prevent_cse=False)
        return jax.lax.scan(layer, x, (params, jnp.arange(numbers.start, numbers.stop)))

    return by_segment(layers)


def _loop(block, segment, layers, inputs, key) -> tuple[Loop, list[Any]]:
    """The loop that takes all rows at once, and the shapes of its leaves: what a layer is traced by."""
    found: list[Loop] = []

    def shapes(params, x, ctx):
        loop, leaves = loop_over(block, segment, layers, params, x, ctx, key is not None)
        found.append(loop)
        return leaves

    leaves = jax.eval_shape(shapes, *inputs)
    return found[0], leaves


def _differentiated(loop, inputs, trained) -> list[bool]:
    """Of each leaf, whether it may be differentiated: not what belongs to rows, and no packed kernel."""
    packed: list[bool] = []
    for node in jax.tree.leaves(inputs, is_leaf=is_packed):
        packed += [is_packed(node)] * len(jax.tree.leaves(node))
    leaves = jax.tree.leaves(inputs)
    return [
        jnp.issubdtype(leaf.dtype, jnp.inexact)
        and not closed
        and kind != "rows"
        and (kind != "layer" or trained is None or trained(path))
        for leaf, kind, path, closed in zip(leaves, loop.kinds, loop.paths, packed, strict=True)
    ]


def _tell(loop, plan, names, programs, perturbed) -> None:
    """Records what is kept where these leaves are differentiated: of the names that the policy knows, those read."""
    traced = programs(perturbed)
    of = {name: action for action, group in zip(("save", "offload"), names, strict=True) for name in group}
    _, used, read = traced.backward(name for name in traced.names if name[0] in of)
    actions = {name: of[name[0]] for name in read}
    if used[loop.x]:
        actions[INPUT, 0] = action_of(plan.preset, INPUT)
    x = traced.forward.in_avals[loop.x]
    shapes = dict(zip(traced.names, traced.shapes, strict=True))
    record(loop.name, Segment(traced, len(loop.layers), actions, {**shapes, (INPUT, 0): x}))
