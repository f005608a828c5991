"""Tiles of a long row: the part of a layer that takes tokens one by one, its MLP, takes a few of a row at a time.

With f that part of layer l, x (B, S, d) and t a tile, some of the tokens of each row,

    forward   for t:  y_t = f(W, x_t)
    backward  for t:  (d W)_t, d x_t = vjp of f at (W, x_t) applied to d y_t;   d W += (d W)_t

What f needs in between, several arrays of the MLP's width, is that of one tile, however long the row (tiled compute:
Bekman et al. 2025, arXiv:2506.13996). Nothing inside f is kept: its products are computed again in the backward pass,
as under the plan `blocks`. y is written over x, d x over d y.

A part says of itself that it takes tokens one by one (`model.by_token`), and so does what a method puts around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from jaxpeft import constraints
from jaxpeft.errors import InputError
from jaxpeft.model import Context, Stack, takes_by_token


def tiled(stack: Stack, tile: int, said: str = "") -> Callable[..., Any]:
    """`stack.block`, the last of its parts by tiles.

    Args:
      stack: of a model as methods have changed it.
      tile: tokens of a row that this part takes at a time, at most.
      said: the plan, for messages.

    Raises:
      InputError: if it has no such part.
    """
    if not stack.parts or not takes_by_token(stack.parts[-1]):
        raise InputError(
            f"--save {said}: tile={tile} needs layers whose MLP takes tokens one by one; this model has no parts, or a "
            "method reads other tokens in them; leave it out"
        )
    *before, last = stack.parts

    def block(layer, x, ctx, cache, segment):
        for part in before:
            x, _ = part(layer, x, ctx, cache, segment)
        return _by_tiles(last, layer, x, ctx, segment, tile), None

    return block


class _Tiles(NamedTuple):
    """How a function of some leaves is cut.

    function: leaves, the number of the tile -> y.
    cut: per leaf, whether it is taken by tiles.
    x: the number of x.
    size: tokens of a tile, of each device.
    number: of tiles.
    along: devices over which the tokens of a row are divided.
    """

    function: Callable[..., jax.Array]
    cut: tuple[bool, ...]
    x: int
    size: int
    number: int
    along: int

    def at(self, leaf: jax.Array, n: Any) -> jax.Array:
        """A tile of (B, S, ...): tokens of every device."""
        rows, _, *rest = leaf.shape
        leaf = leaf.reshape(rows, self.along, -1, *rest)
        part = jax.lax.dynamic_slice_in_dim(leaf, n * self.size, self.size, 2)
        return constraints.rows(part.reshape(rows, -1, *rest))

    def put(self, whole: jax.Array, part: jax.Array, n: Any) -> jax.Array:
        """With this tile in its place."""
        rows, _, *rest = whole.shape
        split = whole.reshape(rows, self.along, -1, *rest)
        part = part.reshape(rows, self.along, -1, *rest)
        return jax.lax.dynamic_update_slice_in_dim(split, part, n * self.size, 2).reshape(whole.shape)

    def inputs(self, leaves: list[Any], n: Any) -> list[Any]:
        """What the function takes of a tile."""
        return [self.at(leaf, n) if cut else leaf for leaf, cut in zip(leaves, self.cut, strict=True)]


def _by_tiles(part, layer, x, ctx, segment, tile):
    rows, length = x.shape[:2]
    _, along = constraints.shards(rows, length)
    count = -(-length // (along * tile))
    size = -(-length // (along * count))
    more = along * count * size - length
    if count == 1:
        return part(layer, x, ctx, None, segment)[0]
    # What lies by tokens among what belongs to rows, such as segment ids, goes with them.
    lies = jax.tree.map(lambda leaf: leaf.shape[:2] == x.shape[:2], ctx.rows)
    no = functools.partial(jax.tree.map, lambda _: False)
    cut = jax.tree.leaves((no(layer), True, Context(lies, *no(tuple(ctx[1:])))))
    leaves, treedef = jax.tree.flatten((layer, x, ctx))

    def function(leaves, n):
        layer, x, ctx = treedef.unflatten(leaves)
        if ctx.key is not None:
            ctx = ctx._replace(key=jax.random.fold_in(ctx.key, n))
        y, said = part(layer, x, ctx, None, segment)
        assert said is None, "what a layer says beside the stream is of whole rows"
        return y

    place = len(jax.tree.leaves(layer))
    tiles = _Tiles(function, tuple(cut), place, size, count, along)
    if more:  # tokens of zeros, behind every device's
        leaves = [_longer(leaf, along, more) if use else leaf for leaf, use in zip(leaves, cut, strict=True)]
    y = _run(tiles, leaves)
    return y if not more else _shorter(y, along, more)


def _longer(x: jax.Array, along: int, more: int) -> jax.Array:
    rows, _, *rest = x.shape
    x = x.reshape(rows, along, -1, *rest)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, more // along)] + [(0, 0)] * len(rest))
    return x.reshape(rows, -1, *rest)


def _shorter(x: jax.Array, along: int, more: int) -> jax.Array:
    rows, _, *rest = x.shape
    return x.reshape(rows, along, -1, *rest)[:, :, : -(more // along)].reshape(rows, -1, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(tiles, leaves):
    def body(n, x):
        own = tiles.inputs([*leaves[: tiles.x], x, *leaves[tiles.x + 1 :]], n)
        return tiles.put(x, tiles.function(own, n), n)

    return _loop(tiles.number, body, leaves[tiles.x])


def _loop(count, body, carry):
    return jax.lax.scan(lambda carry, n: (body(n, carry), None), carry, jnp.arange(count, dtype=jnp.int32))[0]


def _forward(tiles, leaves):
    values = [leaf.value for leaf in leaves]
    return _run(tiles, values), (values, [leaf.perturbed for leaf in leaves])


def _backward(tiles, saved, d_y):
    leaves, perturbed = saved
    if isinstance(d_y, SymbolicZero):
        return ([None] * len(leaves),)
    moved = [i for i, use in enumerate(perturbed) if use or i == tiles.x]

    def body(n, carry):
        d, totals = carry
        found = dict(zip(moved, _pulled(tiles, moved, tiles.inputs(leaves, n), n, tiles.at(d, n)), strict=True))
        d = tiles.put(d, found.pop(tiles.x), n)
        add = lambda i, part: tiles.put(totals[i], part, n) if tiles.cut[i] else totals[i] + part
        return d, {i: add(i, part) for i, part in found.items()}

    totals = {i: jnp.zeros_like(leaves[i]) for i in moved if i != tiles.x}
    d, totals = _loop(tiles.number, body, (d_y, totals))
    totals[tiles.x] = d
    return ([totals.get(i) if use else None for i, use in enumerate(perturbed)],)


def _pulled(tiles, moved, own, n, d_y):
    """The gradients of a tile's leaves, without what only y would read: of that nothing is to be counted."""

    def pull(own, n, d_y):
        def of(*parts):
            values = dict(zip(moved, parts, strict=True))
            return tiles.function([values.get(i, leaf) for i, leaf in enumerate(own)], n)

        return jax.vjp(of, *[own[i] for i in moved])[1](d_y)

    closed = jax.make_jaxpr(pull)(own, n, d_y)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(moved), instantiate=True)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*jax.tree.leaves((own, n, d_y)))


_run.defvjp(_forward, _backward, symbolic_zeros=True)
