"""A model whose layers run under a memory plan (`jaxpeft.backward.plan`), by our own loops or as a policy of JAX's.

What a plan does to a layer is in `passes.py`; here it is told which layers there are, what they read and what they say.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import tree, updates
from jaxpeft.backward.loop import Loop, join, loop_over
from jaxpeft.backward.passes import run_loop
from jaxpeft.backward.plan import Plan, keeps, parse
from jaxpeft.backward.tiles import tiled
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Context, Model, Stack, entered, joined, scan_layers, takes_stacks, through_blocks

Form = Literal["loops", "policy"]
FORMS = typing.get_args(Form)


def default_plan(model: Model, backward: bool = True) -> Plan:
    """`matmuls`; `everything` for a model that runs its layers in a way of its own, or shows none.

    backward: whether a step has a backward pass; else it is `blocks`, of which the layers' groups of rows are left.
    """
    if model.stack.run is not scan_layers:
        return Plan("everything")
    return Plan("matmuls" if backward else "blocks")


def check_kept(model: Model, name: str) -> None:
    """Refuses a plan that keeps activations in a step that has no backward pass to read them.

    Args:
      model: of the step, as `remat` has made it or not.
      name: of the method.

    Raises:
      InputError: for such a plan; `blocks`, `tokens=` and `everything`, which is no plan, are none.
    """
    plan = next((p for f in (model.stack.run, model.stack.embed) if (p := getattr(f, "asked", None)) is not None), None)
    if plan is not None and keeps(plan):
        tokens = f",tokens={plan.tokens}" if plan.tokens != Plan().tokens else ""
        raise InputError(
            f"--save {plan}: {name} has no backward pass, for which activations would be kept; leave it out, or give "
            f"blocks{tokens or ',tokens=N'}"
        )


def remat(
    model: Model,
    save: str | Plan = "matmuls",
    shards: int = 1,
    form: Form = "loops",
    trained: Callable[[str], bool] | None = None,
) -> Model:
    """The model with its layers' residuals under a plan.

    Apply it last, after `setup`: it acts on the blocks as methods have changed them. Outputs are those of the model,
    gradients too (with `compress`: their mean is, to first order in the rounding). With dropout, groups of rows draw
    masks of their own.

    Args:
      model: a model of stacked layers; or one of `from_linen` or `from_nnx`, of which the scans over stacked parameters
        run so (scans.py).
      save: a plan, or its text (see `parse`).
      shards: devices over which the rows of a batch are divided.
      form: "loops", our own, which take a few rows at a time and can compress; or "policy", a scan over
        `jax.checkpoint` of the block under the plan as a policy (`checkpoint_policy`), which takes all rows at once.
      trained: for a policy: path -> whether the leaf may be differentiated, which tells what the backward pass reads
        (`method.changes`); None: all may.

    Raises:
      InputError: for a plan that cannot be read, or that a policy cannot do, or a model whose layers are not run by the
        ordinary scan. When traced: for a name that no activation has, or a module without such a scan.
    """
    plan = parse(save)
    if form not in FORMS:
        raise InputError(f"--remat {form!r}: unknown form; known: {', '.join(FORMS)}")
    if plan.preset == "everything":
        return model
    if not model.stack.layered:
        return _scanned(model, plan, form)
    if model.stack.run is not scan_layers:
        raise InputError(f"--save {plan}: this model runs its layers in its own way; use --save everything")
    if form == "policy":
        from jaxpeft.backward import policy  # which records its segments here

        run = policy.planned(policy.checked(plan), trained)
    else:
        run = planned(plan, shards)
    return model._replace(stack=model.stack._replace(run=_asked(run, plan)))


def _asked(function: Any, plan: Plan) -> Any:
    """A part of a stack, marked with the plan that was asked for, for `check_kept`."""
    function.asked = plan
    return function


def _scanned(model: Model, plan: Plan, form: Form) -> Model:
    """A model without visible layers, with the scans over stacked parameters that it runs under a plan."""
    if form == "policy":
        raise InputError(
            f"--save {plan} --remat policy: this model shows no layers; give jp.checkpoint_policy({str(plan)!r}) to "
            "its nn.remat, nnx.remat or jax.checkpoint, or use --remat loops"
        )
    from jaxpeft.backward import scans  # which runs its loops here

    def forward(params, batch, key):
        with updates.handed_on() as state:
            return model.stack.embed(params, batch, key)[0], state

    def embed(params, batch, key):
        if not batch:  # nothing runs: the module itself is wanted
            return model.stack.embed(params, batch, key)
        x, state = scans.in_scans(forward, plan)(params, batch, key)
        updates.leave(state)
        return x, Context()

    return model._replace(stack=model.stack._replace(embed=_asked(embed, plan)))


def planned(plan: Plan, shards: int = 1) -> Callable[..., tuple[jax.Array, Any]]:
    """`run` of a stack (see `jaxpeft.model`) under a plan."""

    def layers(stack, segment, numbers, params, x, ctx, key):
        laid = laid_out(plan, shards, stack, segment, numbers, params, x, ctx, key is not None)
        return laid.opened(run_loop(laid.loop, plan, laid.leaves, key))

    run = by_segment(layers)
    run.plan = (plan, shards)  # type: ignore[attr-defined]
    return run


def plan_of(run: Callable[..., Any]) -> tuple[Plan, int] | None:
    """(plan, shards) of a `run` that `planned` has made; None of another."""
    return getattr(run, "plan", None)


class Laid(NamedTuple):
    """A segment as a loop.

    loop: of its layers and groups of rows.  leaves: the loop's.
    opened: streams as `run_loop` gives them -> (x, what the layers have said beside it, or None).
    """

    loop: Loop
    leaves: list[Any]
    opened: Callable[[list[jax.Array]], tuple[jax.Array, Any]]


def laid_out(
    plan: Plan,
    shards: int,
    stack: Stack,
    segment: str,
    numbers: range,
    params: tree.Params,
    x: jax.Array,
    ctx: Context,
    keyed: bool,
) -> Laid:
    """A stack's segment as a loop under a plan; the arguments are those of `by_segment`'s `layers`."""
    if plan.tile is None:
        block, plain = stack.block, None
    else:
        block, plain = tiled(stack, plan.tile, str(plan)), stack.block
    count, widths = len(numbers), dict(stack.sums)
    # What layers say is a stream too: each writes its own numbers, and none reads what is there.
    streams = (x, {name: jnp.zeros((len(x), count * n), jnp.float32) for name, n in widths.items()})

    def layer(block, own, streams, ctx):
        x, said = block(own, streams[0], ctx, None, segment)
        place = ctx.layer - numbers.start
        whole = {
            name: jax.lax.dynamic_update_slice_in_dim(sums, said[name], place * widths[name], 1)
            for name, sums in streams[1].items()
        }
        return (x, whole), None

    def opened(ends):
        x, said = jax.tree.unflatten(jax.tree.structure(streams), [join(end) for end in ends])
        by_layer = {name: sums.reshape(len(x), count, -1).swapaxes(0, 1) for name, sums in said.items()}
        return x, by_layer or None

    rest = (params, streams, ctx, keyed, plan.tokens, shards, takes_stacks(stack.block))
    loop, leaves = loop_over(functools.partial(layer, block), segment, numbers, *rest)
    return Laid(loop._replace(plain=plain and functools.partial(layer, plain)), leaves, opened)


def by_segment(layers: Callable[..., tuple[jax.Array, Any]]) -> Callable[..., tuple[jax.Array, Any]]:
    """`run` of a stack (see `jaxpeft.model`) that differentiates its segments in a way of its own; decoding is as ever.

    Args:
      layers: (stack, segment, layers' numbers, their parameters, x, ctx, key) -> x after them, and what they have said
        beside it (`Stack.sums`).
    """

    def run(stack: Stack, params: tree.Params, batch: Batch, key: jax.Array | None = None, cache: Any = None):
        if cache is not None:  # decoding: there is no backward pass
            return scan_layers(stack, params, batch, key, cache)
        x, ctx, params = entered(stack, params, batch, key)
        said = []
        for segment, first, end in tree.segments(params):
            x, sums = layers(stack, segment, range(first, end), params[segment], x, ctx, key)
            said.append(sums)
        return x, joined(said)

    return through_blocks(run)
