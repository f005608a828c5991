"""Layers that are updated inside the backward pass: the gradients of all of them never exist.

    forward   x_0, ctx = embed(batch);   x_l+1 = block(W_l, x_l) for all l, what the plan keeps is kept
    head      loss, d x_L, d (what trains beside the layers)                of the loss, its `run` being x_L
    backward  for l = L-1 ... 0:  d W_l, d x_l = vjp of the block;   W_l, s_l <- update(d W_l, W_l, s_l)
    embed     d (what trains beside the layers) += vjp of embed, at d x_0

W and the optimizer's state s are carried by the loop and written where they lie: a step that is given them to keep
(`step.in_place`) holds them once, and a gradient lives for one layer. Lv et al. 2023 (LOMO, arXiv:2306.09782) do so
with plain SGD. What needs all gradients, such as clipping by their norm, cannot be had before the first layer is
updated.

Groups of rows add up inside a layer, so a plan's `tokens=` is gradient accumulation that costs no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.backward import passes
from jaxpeft.backward.loop import join
from jaxpeft.backward.passes import Update
from jaxpeft.backward.residuals import laid_out, plan_of
from jaxpeft.backward.segments import told
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Context, Model, entered, joined, nothing_before


class Result(NamedTuple):
    """Of a step's batch.

    loss, aux: of the loss.
    gradients: {path: array} of what was not updated.
    leaves: {path: stack}, updated.  state: {segment: their optimizer's state}.
    squares: () float32, the sum of the squares of the gradients of what was updated.
    """

    loss: jax.Array
    aux: dict[str, Any]
    gradients: tree.Flat
    leaves: tree.Flat
    state: dict[str, Any]
    squares: jax.Array


def check_model(model: Model) -> None:
    """Raises InputError for a model whose layers are not run by the loops that can update them."""
    if not model.stack.layered:
        raise InputError("--update-in-backward: this model shows no layers; it needs one of jaxpeft.models")
    if plan_of(model.stack.run) is None:
        raise InputError(
            "--update-in-backward: needs our own loops over the layers: --remat loops, a plan such as --save matmuls "
            "or blocks, and a method that does not run the layers in its own way"
        )
    if model.stack.before is not nothing_before:
        raise InputError("--update-in-backward: layers are read before the first of them runs, for a prompt's states")


def value_and_update(
    model: Model,
    loss: Callable[..., tuple[jax.Array, dict[str, Any]]],
    trainable: tree.Flat,
    rest: tree.Flat,
    batch: Batch,
    key: jax.Array | None,
    updates: Mapping[str, Callable[[dict[str, Any]], Update]],
) -> Result:
    """The loss, and the layers updated on the way.

    Args:
      model: that `check_model` has passed.
      loss: (model, params, batch, key) -> (loss, aux), which runs the layers once, by the model's `run`.
      trainable: {path: leaf}, differentiated.
      rest: all other leaves.
      batch: of the step.
      key: of the step.
      updates: {segment: aux -> the update of its layers}.

    Raises:
      InputError: when traced, for a loss that runs the layers otherwise, or reads what trains in them itself.
    """
    stack, (plan, shards) = model.stack, plan_of(model.stack.run)  # type: ignore[misc]
    inside = {path: leaf for path, leaf in trainable.items() if tree.stacked(path)}
    beside = {path: leaf for path, leaf in trainable.items() if path not in inside}
    params = tree.combine(trainable, rest)

    # What trains beside the layers reaches them through these.
    reached: list[bool] = []
    treedefs: list[Any] = []

    def enter(beside):
        x, ctx, _ = entered(stack, tree.combine(beside, {**rest, **inside}), batch, key)
        leaves, treedef = jax.tree.flatten((x, Context(ctx.rows, ctx.shared)))
        treedefs.append(treedef)
        return told(reached.extend, leaves)

    entering, pull_enter = jax.vjp(enter, beside)
    reached = reached or [False] * len(entering)
    x, ctx = treedefs[0].unflatten(entering)

    passed: list[_Passed | None] = []
    said: list[Any] = []
    moves = reached[0]
    for segment, first, end in tree.segments(params):
        laid = laid_out(plan, shards, stack, segment, range(first, end), params[segment], x, ctx, key is not None)
        loop = laid.loop
        streams = range(loop.streams[0], loop.streams[-1] + 1)
        perturbed = [path in inside for path in loop.paths[: streams.start]] + [True] * len(streams) + reached[1:]
        moves = moves or any(perturbed[: streams.start]) or any(reached[1:])
        if not moves:  # nothing below, and nothing here
            ends = passes.run_loop(loop, plan, laid.leaves, key)
            passed.append(None)
        else:
            primals = [_Primal(leaf, use) for leaf, use in zip(laid.leaves, perturbed, strict=True)]
            ends, saved = passes.forward(loop, plan, primals, None if key is None else _Primal(key, False), nests=True)
            passed.append(_Passed(segment, loop, saved))
        (x, sums), pull = jax.vjp(laid.opened, ends)
        if passed[-1] is not None:
            passed[-1] = passed[-1]._replace(pull=pull)
        said.append(sums)
    whole, pull_said = jax.vjp(joined, said)

    def ended(beside, x, whole):
        given = tree.combine(beside, rest)

        def run(_, params, own, own_key=None, cache=None):
            if params is not given or own is not batch or own_key is not key or cache is not None:
                raise InputError(
                    "--update-in-backward: the loss runs the layers on something else than the step's parameters and "
                    "batch, of which a second backward pass would be needed"
                )
            return x, whole

        try:
            return loss(model._replace(stack=stack._replace(run=run)), given, batch, key)
        except KeyError as error:
            raise InputError(
                f"--update-in-backward: the loss reads {error} itself, which trains in the layers"
            ) from error

    value, pull_end, aux = jax.vjp(ended, beside, x, whole, has_aux=True)
    gradients, d_x, d_whole = pull_end(jnp.ones_like(value))
    (d_said,) = pull_said(d_whole)

    leaves: tree.Flat = {}
    states: dict[str, Any] = {}
    others: tree.Flat = {}
    squares = jnp.zeros(())
    d_entering: list[Any] = [None] * len(entering)
    for part, d_sums in zip(reversed(passed), reversed(d_said), strict=True):
        if part is None:
            continue
        loop = part.loop
        update = updates[part.segment](aux) if part.segment in updates else None
        (d_ends,) = part.pull((d_x, d_sums))
        found, after = passes.gradients(loop, plan, part.saved, d_ends, update)
        d_x = join(found[loop.streams[0]])
        of_layers, of_ctx = found[: loop.streams[0]], found[loop.streams[-1] + 1 :]
        others |= {path: d for path, d in zip(loop.paths, of_layers, strict=False) if d is not None}
        for i, (d, kind) in enumerate(zip(of_ctx, loop.kinds[loop.streams[-1] + 1 :], strict=True), 1):
            if d is not None:
                d = join(d) if kind == "rows" else d
                d_entering[i] = d if d_entering[i] is None else d_entering[i] + d
        if after is not None:
            leaves |= {loop.paths[i]: leaf for i, leaf in after.leaves.items()}
            states[part.segment] = after.state
            squares += after.squares
    d_entering[0] = d_x
    if any(reached):
        given = [_cotangent(x, d if use else None) for x, d, use in zip(entering, d_entering, reached, strict=True)]
        (of_enter,) = pull_enter(given)
        gradients = jax.tree.map(jnp.add, gradients, of_enter)
    return Result(value, aux, {**gradients, **others}, leaves, states, squares)


class _Primal(NamedTuple):
    """A leaf as a custom rule with symbolic zeros sees it."""

    value: Any
    perturbed: bool


class _Passed(NamedTuple):
    """A segment behind its forward pass."""

    segment: str
    loop: Any
    saved: Any
    pull: Any = None


def _cotangent(x: jax.Array, d: jax.Array | None) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return np.zeros(x.shape, jax.dtypes.float0)
    return jnp.zeros_like(x) if d is None else d
