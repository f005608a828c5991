"""Layers that are sampled: of a stack, only those that are drawn have masters, gradients and an optimizer's state.

    every so many steps    draw numbers of layers a_1 ... a_g, M_i <- W[a_i]
    in layer l             W_l = M_i in W's dtype where a_i = l, else W[l]
    after each step        W[a_i] <- M_i, rounded once

The stack W (L, ...) is moved and keeps its dtype; the masters M (g, ...) are trained leaves `<name>/<path of W>`, so
that gradients exist for g layers. `<name>/active` (g,) int32 says which layers they are. A layer is put in place inside
the block: as whole leaves (L, ...) the gradients would be those of all layers, as they are where a model does not run
its layers by blocks (a module of one's own). Methods differ in how they draw: for all stacks alike, or for each apart
(`<name>/active/<...>`). NO_LAYER as a number leaves a master idle.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import drawn_state, tree
from jaxpeft.errors import InputError
from jaxpeft.method import MOVED, Leaves, Moment, Objective, Role, Roles, View, blind, trained
from jaxpeft.model import Model, marked_as, runs_through_blocks
from jaxpeft.quant import is_packed, unfolded
from pallas_kernels.stacked import taken

NO_LAYER = 2**31 - 1
Stacks = Mapping[str, Sequence[int]]  # path of a stack whose layers are sampled -> their numbers

# Of a moved stack whose layers are sampled, and change by `move` alone; known by its identity.
SAMPLED = Role("moved")


def nothing_more(flat: tree.Flat, stacks: Stacks) -> tree.Flat:
    """No further leaves."""
    del flat, stacks
    return {}


class Sampler(NamedTuple):
    """What a method says of its sampling.

    name: the method's, and the scope of its leaves.
    draw: (key, the stacks, {path: moved leaf}) -> {name: (g,) int32, numbers of different layers}; "active" where the
      layers of all stacks are drawn together.
    every: steps from one draw to the next; 0: the first stays.
    leaves: (all leaves, the stacks) -> further moved leaves `<name>/...`, which `draw` may read.
    keeps: whether the optimizer's state of a layer, its count of steps too, is kept until the layer is drawn again;
      otherwise it starts anew with each draw, and exists for g layers.
    away: whether what is kept lies in the host's memory, of the layers that are not drawn.
    own: path in a layer -> whether it is the method's own leaf of the layers that are drawn, `<name>/<segment>/<path>`
      (g, ...), which no stack has: it is put into those layers, and zeros into all others.
    takes: path -> whether the layers of a stack that trains are sampled; else it trains as it is.
    drawn_as: path of a stack -> the name in `draw`'s result of its layers' numbers.
    what: in words, after "nothing in the layers trains", what `takes` takes.
    """

    name: str
    draw: Callable[[jax.Array, Stacks, Mapping[str, Any]], Mapping[str, jax.Array]]
    every: int
    leaves: Callable[[tree.Flat, Stacks], tree.Flat] = nothing_more
    keeps: bool = False
    away: bool = False
    own: Callable[[str], bool] = lambda path: False
    takes: Callable[[str], bool] = lambda path: True
    drawn_as: Callable[[str], str] = lambda path: "active"
    what: str = ""

    @property
    def scope(self) -> str:
        return f"{self.name}/"

    def active(self, path: str) -> str:
        """The path of the numbers of the layers that are drawn of a stack, which may have the scope in front."""
        return self.scope + self.drawn_as(path.removeprefix(self.scope))

    def is_master(self, path: str) -> bool:
        """Whether a path is that of sampled layers' masters."""
        of_layers = path.startswith(self.scope) and tree.stacked(path.removeprefix(self.scope))
        return of_layers and not self.own(path)

    # The slots of a method.

    def roles(self, others: Roles) -> Roles:
        """What trains in the layers is moved, and has masters that train.

        Raises:
          InputError: from a role, where another member of the chain has sampled the layers already.
        """

        def role(path: str) -> Role:
            own = others(path.removeprefix(self.scope))
            if _is_sampled(own):
                raise InputError(
                    f"{self.name}: another member of the chain samples layers already, and each would write its own "
                    "masters over the other's; leave one of them out"
                )
            if self.is_master(path):
                return trained(own.dtype or jnp.float32)
            if path.startswith(self.scope):
                return MOVED
            if own.name == "trained" and tree.stacked(path) and self.takes(path):
                return Role("moved", own.dtype or jnp.float32)
            return own

        return role

    def forward(self, model: Model, view: View) -> Model:
        """The model that computes with the masters of the layers that are drawn, and whose `init` adds them."""

        def init(key, params):
            flat = tree.flatten(model.init(key, params))
            there = any(path.startswith(self.scope) for path in flat)
            return tree.unflatten(flat if there else {**flat, **self._first(key, flat, view)})

        stack = model.stack
        if not runs_through_blocks(stack.run):  # it may read its layers in any way, and gets whole stacks
            run = lambda own, params, batch, key=None, cache=None: stack.run(own, self._put(params), batch, key, cache)
            return model._replace(init=init, stack=stack._replace(run=run))

        def embed(params, batch, key):
            x, ctx = stack.embed(params, batch, key)
            return x, ctx.add(shared={self.name: params[self.name]})

        def layer(function):
            def call(layer, x, ctx, cache, segment):
                own, flat = tree.flatten(ctx.shared[self.name]), tree.flatten(layer)
                for path in [path for path in own if path.startswith(f"{segment}/")]:
                    masters, at = own[path], path.removeprefix(f"{segment}/")
                    leaf = jnp.zeros_like(masters[0]) if self.own(path) else taken(flat[at])
                    flat[at] = _chosen(leaf, masters, own[self.drawn_as(path)], ctx.layer)
                return function(tree.unflatten(flat), x, ctx, cache, segment)

            return marked_as(call, function)

        return model._replace(init=init, stack=stack.map_layers(layer)._replace(embed=embed))

    def stacks(self, view: View) -> Stacks:
        """What is sampled, of a view with all leaves."""
        return _stacks({path: leaf for path, leaf in view.shapes.items() if _is_sampled(view.role(path))})

    def gradient(self, objective: Objective, view: View) -> Objective:
        """Says which layers they are, to an `update` that keeps their state."""
        del view

        def value_and_grad(trainable, rest, batch, key, opt_state):
            (value, aux), grads = objective.value_and_grad(trainable, rest, batch, key, opt_state)
            return (value, {**aux, f"{self.scope}active": rest[f"{self.scope}active"]}), grads

        return objective._replace(value_and_grad=value_and_grad)

    @property
    def update(self) -> Callable[..., Any]:
        """One optimizer for the masters, or one for each layer's, and one for all other leaves."""

        def update(optimizer: optax.GradientTransformation, view: View) -> optax.GradientTransformationExtraArgs:
            if not self.keeps:
                return drawn_state.anew(self.name, self.every, optimizer)
            return drawn_state.kept(self.name, self.is_master, layers_of(self.stacks(view)), self.away, optimizer)

        return update if self.keeps else blind(update)

    def move(self, leaves: Leaves, moment: Moment) -> Leaves:
        """Writes the masters into the stack, and draws when it is time."""
        masters = {path: leaf for path, leaf in leaves.trained.items() if self.is_master(path)}
        moved, own = dict(leaves.moved), {}
        drawn = self._draw(moment.key, self.stacks(moment.view), moved) if self.every else {}
        due = (moment.step + 1) % self.every == 0 if self.every else False
        numbers = {path: jnp.where(due, fresh, moved[path]) for path, fresh in drawn.items()}
        for path, master in masters.items():
            active = moved[self.active(path)]
            stack = moved[path.removeprefix(self.scope)]
            stack = moved[path.removeprefix(self.scope)] = written(path, stack, master, active, self.scope)
            if not self.every:
                continue
            # Of a layer that stays, the master stays too: it is not what it was rounded to.
            now = numbers[self.active(path)]
            stays = jnp.any(now[:, None] == active, axis=1)
            kept = jnp.take(master, jnp.argmax(now[:, None] == active, axis=1), axis=0)
            fresh = read(path, stack, now, self.scope).astype(master.dtype)
            own[path] = jnp.where(stays.reshape(-1, *[1] * (master.ndim - 1)), kept, fresh)
        return Leaves({**leaves.trained, **own}, {**moved, **numbers})

    def merge(self, params: Mapping[str, Any]) -> tree.Params:
        """The stacks with the masters written into them; what is the method's own goes."""
        flat = tree.flatten(params)
        whole = {path: leaf for path, leaf in flat.items() if not path.startswith(self.scope)}
        for path, master in flat.items():
            if self.is_master(path):
                own = path.removeprefix(self.scope)
                whole[own] = written(path, jnp.asarray(whole[own]), master, flat[self.active(path)], self.scope)
        return tree.unflatten(whole)

    # Its parts.

    def _put(self, params: tree.Params) -> tree.Params:
        """The parameters with the masters in the layers' places: gradients are then made of whole stacks."""
        flat = tree.flatten(params)
        whole = {path: leaf for path, leaf in flat.items() if not path.startswith(self.scope)}
        for path, master in flat.items():
            if self.is_master(path) or (path.startswith(self.scope) and self.own(path)):
                own = path.removeprefix(self.scope)
                if own in whole:
                    stack = taken(whole[own])
                else:  # the method's own leaf: zeros in the layers that are not drawn
                    layers = next(len(leaf) for other, leaf in whole.items() if _segment(other) == _segment(own))
                    stack = jnp.zeros((layers, *master.shape[1:]), master.dtype)
                whole[own] = written(path, stack, master, flat[self.active(path)], self.scope)
        return tree.unflatten(whole)

    def _first(self, key: jax.Array, flat: tree.Flat, view: View) -> tree.Flat:
        """The leaves of the first draw.

        Raises:
          InputError: without stacked layers, or where nothing in them trains, too few are there, or they are quantized.
        """
        check_stacks(self.name, flat)
        sampled = {path: unfolded(leaf) for path, leaf in flat.items() if _is_sampled(view.role(path))}
        name = self.name
        if not sampled:
            members = [spec.name for spec in view.specs]
            front, behind = members[: members.index(name)], members[members.index(name) + 1 :]
            advice = f"leave {name} out" if front else f"put {name} behind the methods whose layers it samples"
            if self.what and not (front or behind):
                advice = "name layers' own leaves with which"
            raise InputError(f"{name}: nothing in the layers trains{self.what}; {advice}")
        if packed := [path for path, leaf in sampled.items() if is_packed(leaf)]:
            raise InputError(
                f"{name}: {packed[0]} is quantized and cannot train; sample the layers of adapters: quantize+lora+lisa"
            )
        stacks = _stacks(sampled)
        more = self.leaves(flat, stacks)
        drawn = self._draw(key, stacks, more)
        masters = {
            self.scope + path: read(path, leaf, drawn[self.active(path)]).astype(view.role(self.scope + path).dtype)
            for path, leaf in sampled.items()
            if view.role(path) is not SAMPLED
        }
        return {**masters, **more, **drawn}

    def _draw(self, key: jax.Array, stacks: Stacks, moved: Mapping[str, Any]) -> tree.Flat:
        found = self.draw(jax.random.fold_in(key, zlib.crc32(self.name.encode())), stacks, moved)
        return {self.scope + name: numbers for name, numbers in found.items()}


def _is_sampled(role: Role) -> bool:
    """Whether the layers of a leaf are sampled."""
    return role.name == "moved" and (role.dtype is not None or role is SAMPLED)


def _stacks(leaves: Mapping[str, Any]) -> Stacks:
    return {path: range(*_span(path, leaf)) for path, leaf in leaves.items()}


def layers_of(stacks: Stacks) -> list[int]:
    """The numbers of all layers that stacks have."""
    return sorted({layer for layers in stacks.values() for layer in layers})


# Draws.


def uniform(key: jax.Array, layers: Sequence[int], count: int) -> jax.Array:
    """(count,) int32, different layers; all are equally likely."""
    return jax.random.choice(key, jnp.asarray(layers, jnp.int32), (count,), replace=False)


def weighted(key: jax.Array, layers: Sequence[int], count: int, weights: jax.Array) -> jax.Array:
    """The same, one after the other, each as likely as its weight (L,) is of those left: torch's `multinomial`."""
    shares = weights / weights.sum()
    return jax.random.choice(key, jnp.asarray(layers, jnp.int32), (count,), replace=False, p=shares)


def check_stacks(name: str, params: Mapping[str, Any]) -> None:
    """Raises InputError for a model without a stack of layers; `params` may be nested or flat."""
    if not any(map(tree.stacked, tree.flatten(params))):
        raise InputError(
            f"{name}: the model shows no stack of layers, of which some could be drawn; train without {name}"
        )


def check_count(name: str, count: int, layers: Sequence[int]) -> None:
    """Raises InputError for more layers than there are."""
    if count > len(layers):
        raise InputError(f"{name}: count {count} must be at most {len(layers)}, the layers that train")


# Where layers lie in their stacks; `path` with or without the masters' scope.


def _span(path: str, stack: Any, scope: str = "") -> tuple[int, int]:
    """(first layer, end) of the segment that a stack is of."""
    segment = path.removeprefix(scope).split("/", 1)[0]
    ((_, first, end),) = tree.segments({segment: {"": stack}})
    return first, end


def local(path: str, stack: Any, active: jax.Array, scope: str = "") -> jax.Array:
    """Where the layers lie in a stack; its length for those of other segments."""
    first, end = _span(path, stack, scope)
    return jnp.where((active >= first) & (active < end), active - first, end - first)


def written(path: str, stack: jax.Array, master: jax.Array, active: jax.Array, scope: str = "") -> jax.Array:
    """The stack with the masters in the layers' places."""
    return stack.at[local(path, stack, active, scope)].set(master.astype(stack.dtype), mode="drop")


def read(path: str, stack: jax.Array, active: jax.Array, scope: str = "") -> jax.Array:
    """The layers (g, ...) of a stack."""
    return jnp.take(stack, local(path, stack, active, scope), axis=0, mode="clip")


def _segment(path: str) -> str:
    return path.partition("/")[0]


def _chosen(leaf: jax.Array, masters: jax.Array, active: jax.Array, layer: jax.Array) -> jax.Array:
    """A layer's leaf, or the master in its place."""
    here = active == layer
    return jnp.where(jnp.any(here), masters[jnp.argmax(here)].astype(leaf.dtype), leaf)


def kept_numbers(name: str, view: View, away: bool = False) -> int:
    """Numbers of Adam's state where it is kept: two for each number of each layer's, its count of steps, and those of
    the norms; `away`: of the layers that are drawn twice, there and on the device.
    """
    masters = {path: leaf for path, leaf in view.trained.items() if path.startswith(f"{name}/")}
    others = {path: leaf for path, leaf in view.trained.items() if path not in masters}
    own = {path: leaf for path, leaf in view.shapes.items() if _is_sampled(view.role(path))}
    one = sum(leaf.size // leaf.shape[0] for leaf in masters.values())
    drawn = max(leaf.shape[0] for leaf in masters.values()) if away else 0
    return (len(layers_of(_stacks(own))) + drawn) * (2 * (one + 1) + 1) + drawn + 2 * (tree.size(others) + 1)
