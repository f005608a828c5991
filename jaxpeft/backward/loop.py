"""A loop over layers and groups of rows: how one block's inputs lie in the arrays of all of them.

Rows don't see each other inside a block, so a loop over the layers may take a few rows at a time: what a block needs to
work on shrinks with the group. A step is one block on one group; layers are the outer loop.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxpeft import constraints, host
from jaxpeft.backward.places import empty
from jaxpeft.backward.programs import Programs, trace
from jaxpeft.model import Context
from jaxpeft.quant import is_packed
from pallas_kernels.platform import traced_for, traced_for_hopper
from pallas_kernels.stacked import Stacked


def num_groups(rows: int, tokens_per_row: int, tokens: int, shards: int = 1) -> int:
    """The fewest groups of equal size, each of at most `tokens` tokens or one row of every shard."""
    own = max(rows // shards, 1)
    most = max(tokens // tokens_per_row, 1)
    return next(groups for groups in range(1, own + 1) if own % groups == 0 and own // groups <= most)


@jax.custom_jvp
def replaced(whole, part, place):
    """whole (L, ...) with its row number `place` replaced by part (...).

    XLA has no 16-bit floating point on a CPU: it would widen all rows to replace one, and narrow them again. Integers
    it moves as they are.
    """
    if whole.dtype not in (jnp.bfloat16, jnp.float16):
        return _put(whole, part, place)

    def integers(whole, part, place):
        bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
        return jax.lax.bitcast_convert_type(_put(bits(whole), bits(part), place), whole.dtype)

    return jax.lax.platform_dependent(whole, part, place, cpu=integers, default=_put)


def _put(whole, part, place):
    return jax.lax.dynamic_update_index_in_dim(whole, part, place, 0)


@replaced.defjvp
def _(primals, tangents):
    """That of the plain update: integers have no derivative, and it would be zero in silence."""
    (_, _, place), (whole, part, _) = primals, tangents
    return replaced(*primals), _put(whole, part, place)


def nests() -> bool:
    """Whether groups of rows are a loop within that over layers, which takes once what all of them read: on GPUs.

    On a v5p XLA lays out what is kept anew between such loops, whole (63.4 GiB in place of 59.7 for Llama-2-7B with
    `matmuls`, 16 x 1024 tokens), and there is little to take: its kernels read stacks.
    """
    return traced_for() == "cuda"


def flows() -> bool:
    """Whether a stream whose inputs to all layers are kept lies among them, and is copied nowhere: on one Hopper GPU.

    In plain JAX on other GPUs it costs an MLP's array at the peak: 17.09 GiB in place of 17.03 for Llama-3.1-8B on an
    RTX 4090, and spares no bytes that XLA does not move elsewhere.
    """
    return nests() and traced_for_hopper() and not constraints.divides()


def divide(x, groups):
    """(B, ...) -> (G, B / G, ...); group g takes rows g, g + G, ..., so that sharded rows stay where they are.

    One group is x itself, of any shape.
    """
    return x[None] if groups == 1 else x.reshape(x.shape[0] // groups, groups, *x.shape[1:]).swapaxes(0, 1)


def join(x):
    """The inverse of `divide`."""
    if x.shape[0] == 1:
        return x[0]
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


@jax.tree_util.register_static
class Static(tuple):
    """Hashable facts that go from a forward rule to its backward rule."""


class Step(NamedTuple):
    """A block on a group of rows, each a () int32.

    number: of the step.  layer: counted from the segment's first.  group: of rows.
    """

    number: Any
    layer: Any
    group: Any


class Loop(NamedTuple):
    """How one block's inputs lie in the arrays of all layers and groups; a step is one block on one group.

    name: the segment's.
    block: (layer, x, ctx) -> y.
    treedef: of (params, x, ctx).
    paths: per leaf, its path.
    kinds: per leaf, "layer" (indexed by layer), "rows" (by group), "shared", or "stack": as "layer", but a step's part
      is all of it, and the block gets the kernel that it belongs to as `Stacked`, which products read without a copy;
      "whole": as "layer", gathered over a mesh's devices once for all groups;
      "held": so, and beside it the layer that products take which do not read stacks, once for all groups; "each": as
      "layer", but taken by each group.
    streams: the leaves that the block changes from layer to layer: x, or those of x if it is a tree.
    layers: the segment's.  groups: of rows.
    keyed: whether there is a PRNG key.
    kernels: the leaves of each layer's matrices, which may be "stack" or "held" where they are frozen.
    nested: whether groups are a loop within that over layers.
    plain: the block without tiles (tiles.py), from which follows what they compute again; None: it has none.
    """

    name: str
    block: Callable[..., jax.Array]
    treedef: Any
    paths: tuple[str, ...]
    kinds: tuple[str, ...]
    streams: tuple[int, ...]
    layers: range
    groups: int
    keyed: bool
    kernels: tuple[tuple[int, ...], ...] = ()
    nested: bool = False
    plain: Callable[..., jax.Array] | None = None

    def stacked(
        self, leaves: Sequence[Any], perturbed: Sequence[bool], nested: bool | Literal["always"] = True
    ) -> Loop:
        """The loop with the kernels of which nothing is differentiated as stacks, held where groups are a loop within.

        nested: whether they may be (see `nests`), or are always where there are several. What is in another type than
          the stream is taken by each group even so: a block converts it, which XLA does as it takes it.
        """
        gathers = constraints.gathers()
        nested = bool(nested) and self.groups > 1 and (gathers or nests() or nested == "always")
        away = [perturbed[i] or host.holds(leaf) for i, leaf in enumerate(leaves)]
        frozen = {i for kernel in self.kernels if not any(away[i] for i in kernel) for i in kernel}
        kind = "stack" if not nested else "whole" if gathers else "held"
        kinds = [kind if i in frozen else own for i, own in enumerate(self.kinds)]
        if nested and not gathers:
            types = {leaves[i].dtype for i in self.streams}
            kinds = [
                "each" if kind == "layer" and leaf.dtype not in types else kind
                for kind, leaf in zip(kinds, leaves, strict=True)
            ]
        return self._replace(kinds=tuple(kinds), nested=nested)

    def holding(self, wanted: Callable[[int], bool]) -> Loop:
        """The loop that holds no kernels but those of which a leaf, by its number, is wanted."""
        dropped = {i for leaves in self.kernels if not any(map(wanted, leaves)) for i in leaves}
        kinds = tuple("stack" if i in dropped and kind == "held" else kind for i, kind in enumerate(self.kinds))
        return self._replace(kinds=kinds)

    @property
    def held(self) -> list[int]:
        """The leaves that are "held"."""
        return [i for i, kind in enumerate(self.kinds) if kind == "held"]

    @property
    def x(self) -> int:
        """The stream, where it is one array."""
        return self.streams[0]

    @property
    def steps(self) -> jax.Array:
        return jnp.arange(len(self.layers) * self.groups)

    def step(self, number) -> Step:
        """The step with a number."""
        return Step(number, number // self.groups, number % self.groups)

    def by_layer(self, i: int) -> bool:
        """Whether a leaf is of layers, each step's part of it that of its layer."""
        return self.kinds[i] in ("layer", "each")

    def scan(
        self,
        body,
        carry,
        leaves,
        reverse=False,
        enter=lambda carry, layer: (carry, None),
        leave=lambda carry, layer: carry,
    ):
        """(carry, out) of body(carry, parts, step) -> (carry, out) over all steps, as `jax.lax.scan`.

        Args:
          body: `parts` are those of `inputs`.
          leaves: of all layers and groups; or a function of the carry that gives them.
          reverse: whether the last step is the first.
          enter: (carry, layer) -> (carry, out) before each layer, where groups are a loop within; that `out` is then
            the result, and the body's is left out.
          leave: (carry, layer) -> carry after it, there.
        """
        now = leaves if callable(leaves) else lambda carry: leaves
        if not self.nested:

            def one(carry, number):
                step = self.step(number)
                return body(carry, self.parts(now(carry), step.layer), step)

            return jax.lax.scan(one, carry, self.steps, reverse=reverse)

        def of_layer(carry, layer):
            parts = self.parts(now(carry), layer)
            carry, out = enter(carry, layer)

            def of_group(carry, group):
                return body(carry, parts, Step(layer * self.groups + group, layer, group))[0], None

            carry, _ = jax.lax.scan(of_group, carry, jnp.arange(self.groups), reverse=reverse)
            return leave(carry, layer), out

        return jax.lax.scan(of_layer, carry, jnp.arange(len(self.layers)), reverse=reverse)

    def parts(self, leaves, layer):
        """The leaves, of those of layers this layer's; then this layer's of those of `held`."""

        def own(i):
            with jax.named_scope(self.paths[i].rpartition("/")[0]):
                return self.at(leaves[i], "layer", Step(None, layer, None))

        found = [
            own(i) if kind in ("layer", "whole") and leaf is not None else leaf
            for i, (leaf, kind) in enumerate(zip(leaves, self.kinds, strict=True))
        ]
        if "whole" in self.kinds:
            layer = self.treedef.unflatten(found)[0]
            of_layer = jax.tree.leaves(constraints.gathered(layer, self.name, self.whole.get))
            found = [*of_layer, *found[len(of_layer) :]]
        return [*found, *map(own, self.held)]

    @property
    def whole(self) -> dict[str, bool]:
        """The paths of the kernels that are "whole"."""
        paths = (path for path, kind in zip(self.paths, self.kinds, strict=True) if kind == "whole")
        return {path[: path.index("/kernel") + len("/kernel")]: True for path in paths}

    def at(self, leaf, kind, step):
        """A step's part of a leaf."""
        if kind in ("shared", "stack", "held"):
            return leaf
        return host.fetched(jax.lax.dynamic_index_in_dim(leaf, self.place(kind, step), keepdims=False))

    def place(self, kind, step):
        """Where a step's part lies: by layer, by group of rows, or one after the other."""
        return {"layer": step.layer, "each": step.layer, "rows": step.group, "steps": step.number}[kind]

    def put(self, whole, part, kind, step, add=False):
        """The leaf with a step's part replaced, or added to."""
        if kind == "shared":
            return whole + part if add else part
        if add:
            part = self.at(whole, kind, step) + part
        return replaced(whole, part, self.place(kind, step))

    def once(self, kind) -> bool:
        """Whether each element of a leaf is part of one step alone."""
        return kind == "layer" and self.groups == 1

    def total(self, leaf, kind):
        """Where the gradients of a leaf are put by all steps: zeros, unless each step writes a part of its own."""
        return (empty if self.once(kind) else jnp.zeros)(leaf.shape, leaf.dtype)

    def inputs(self, parts, streams, step, key):
        """Everything that `function` takes; the last are the layer's number, its key, and the layers of `held`.

        Args:
          parts: of the step's layer (see `parts`); those of the streams are not read.
          streams: as they come into the step's layer; None leaves them out.
          step: which.
          key: of the forward pass, or None.
        """
        flowing = dict(zip(self.streams, streams or [None] * len(self.streams), strict=True))
        count = len(self.kinds)
        found = [
            x if x is None or kind in ("layer", "whole") else self.at(x, kind, step)
            for x, kind in zip([flowing.get(i, x) for i, x in enumerate(parts[:count])], self.kinds, strict=True)
        ]
        index = self.layers.start + step.layer
        if not self.keyed:
            return [*found, index, *parts[count:]]
        key = jax.random.fold_in(key, index)
        return [*found, index, key if self.groups == 1 else jax.random.fold_in(key, step.group), *parts[count:]]

    def function(self, *inputs):
        """The block, as a function of flat inputs; [each stream after it]."""
        count = len(self.kinds) + 1 + self.keyed
        layer, x, ctx = self.treedef.unflatten(inputs[: len(self.kinds)])
        own, held = Context(ctx.rows, ctx.shared, *inputs[len(self.kinds) : count]), iter(inputs[count:])
        kinds, *_ = self.treedef.unflatten(self.kinds)

        def kernel(part, kinds):
            found = {"stack", "held"}.intersection(jax.tree.leaves(kinds))
            if not found:
                return part
            layer = jax.tree.map(lambda _: next(held), part) if "held" in found else None
            return Stacked(part, own.layer - self.layers.start, layer)

        whole = self.whole
        layer = jax.tree.map(kernel, layer, kinds, is_leaf=is_packed)
        layer = constraints.gathered(layer, self.name, lambda path: path not in whole)
        return constraints.rows(jax.tree.leaves(self.block(layer, constraints.rows(x), own)[0]))

    def shapes(self, leaves, streams, key):
        """Those of the inputs of a step."""

        def inputs(leaves, streams, number, key):
            step = self.step(number)
            return self.inputs(self.parts(leaves, step.layer), streams, step, key)

        return jax.eval_shape(inputs, leaves, streams, jax.ShapeDtypeStruct((), jnp.int32), key)

    def programs(self, leaves, streams, key, perturbed) -> Programs:
        """The traced block."""
        shapes = self.shapes(leaves, streams, key)
        # What trains in one layer moves the stream of the next, whether or not it moves that of the first.
        perturbed = [use or i in self.streams for i, use in enumerate(perturbed)]
        perturbed += [False] * (len(shapes) - len(perturbed))
        found = trace(self.function, shapes, perturbed)
        if self.plain is None:
            return found
        whole = trace(self._replace(block=self.plain).function, shapes, perturbed)
        return dataclasses.replace(found, whole=whole)


def loop_over(
    block: Callable[..., jax.Array],
    segment: str,
    layers: range,
    params: Any,
    x: jax.Array,
    ctx: Context,
    keyed: bool,
    tokens: int | None = None,
    shards: int = 1,
    stacked: bool = False,
) -> tuple[Loop, list[jax.Array]]:
    """The loop over a segment's layers and groups of rows, and its leaves, those of rows divided into groups.

    Args:
      block: (layer, x, ctx) -> y.
      segment: its name.  layers: its layers' numbers.
      params: stacked over layers.
      x: (B, S, d), or a tree of such arrays; without `tokens` of any arrays.
      ctx: of the forward pass (see `jaxpeft.model`).
      keyed: whether there is a PRNG key.
      tokens: of a group, at most (but at least a row of every shard); None: all rows are one group.
      shards: devices over which the rows are divided.
      stacked: whether the block takes frozen kernels as `Stacked`.
    """
    ctx = Context(ctx.rows, ctx.shared)
    of_ctx = Context(*(jax.tree.map(lambda _, kind=kind: kind, getattr(ctx, kind)) for kind in ("rows", "shared")))
    leaves, treedef = jax.tree.flatten((params, x, ctx))
    first, count = len(jax.tree.leaves(params)), len(jax.tree.leaves(x))
    paths = [*(f"{segment}/{path}" for path in _paths(params)), *["x"] * count, *_paths(ctx)]
    kinds = tuple(["layer"] * first + ["rows"] * count + jax.tree.leaves(of_ctx))
    kernels = _kernels(params) if stacked else ()
    groups = 1
    if tokens is not None:
        rows, length = jax.tree.leaves(x)[0].shape[:2]
        chex.assert_tree_shape_prefix((x, ctx.rows), (rows,))
        groups = num_groups(rows, length, tokens, shards)
    streams = tuple(range(first, first + count))
    loop = Loop(segment, block, treedef, tuple(paths), kinds, streams, layers, groups, keyed, kernels)
    return loop, [divide(leaf, groups) if kind == "rows" else leaf for leaf, kind in zip(leaves, kinds, strict=True)]


def _kernels(params) -> tuple[tuple[int, ...], ...]:
    """The numbers of the leaves of each stack of matrices called `kernel`."""
    found, start = [], 0
    for path, node in jax.tree.leaves_with_path(params, is_leaf=is_packed):
        leaves = range(start, start := start + len(jax.tree.leaves(node)))
        if jax.tree_util.keystr(path[-1:], simple=True) == "kernel" and node.ndim == 3:
            found.append(tuple(leaves))
    return tuple(found)


def _paths(nested) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(nested)]
