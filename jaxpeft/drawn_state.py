"""The optimizer's state of layers that are drawn anew every so many steps (`jaxpeft.sampling`).

Each of two optimizers is given the norm of the other's gradients as one more leaf, so that clipping by the global norm
sees all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import host
from jaxpeft.method import told


class SampledState(NamedTuple):
    """The optimizer's state.

    masters: of the optimizer on the sampled layers' masters; where it is kept, (L, ...) of an optimizer per layer, or
      `Held`.
    others: of the optimizer on all other leaves.
    steps: () int32, steps done.
    """

    masters: Any
    others: Any
    steps: jax.Array


class Held(NamedTuple):
    """The state of an optimizer per layer, most of it in the host's memory.

    rows: (g, ...), of the layers that are drawn.
    at: (g,) int32, which of the layers these are, counted among those that are sampled.
    kept: (L, ...), of all, matrices in the host's memory (`jaxpeft.host`); of those drawn as it was when they were.
    """

    rows: Any
    at: jax.Array
    kept: Any

    def turned(self, now: jax.Array) -> Held:
        """With the rows of other layers, if they are others: the old ones go to their places, row by row."""
        count = jnp.where(jnp.any(now != self.at), len(now), 0)
        take = lambda i, stacks: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), stacks)

        def put(i, stacks, parts):
            own = lambda x, part: host.put(part) if host.holds(x) else part
            into = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, own(x, part), i, 0)
            return jax.tree.map(into, stacks, parts)

        kept = jax.lax.fori_loop(0, count, lambda i, kept: put(self.at[i], kept, take(i, self.rows)), self.kept)
        fetched = lambda i, rows: put(i, rows, host.fetched(take(now[i], kept)))
        return Held(jax.lax.fori_loop(0, count, fetched, self.rows), now, kept)


def anew(name: str, every: int, optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """One for the masters, which starts anew with each draw, and one for all other leaves.

    Args:
      name: of the method; `<name>/...` are its masters.
      every: steps from one draw to the next.
      optimizer: of each.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    rest = f"{name}/norm_of_the_rest"

    def split(leaves, norm=optax.global_norm):
        masters = {path: leaf for path, leaf in leaves.items() if path.startswith(f"{name}/")}
        others = {path: leaf for path, leaf in leaves.items() if path not in masters}
        return {**masters, rest: norm(others)}, {**others, rest: norm(masters)}

    def of_params(params):
        return split(params, norm=lambda _: jnp.zeros(()))

    def init(params):
        masters, others = of_params(params)
        return SampledState(optimizer.init(masters), optimizer.init(others), jnp.zeros((), jnp.int32))

    def update(grads, state, params=None, **extra):
        parts = (None, None) if params is None else of_params(params)
        found = [
            optimizer.update(own, old, of, **extra)
            for own, old, of in zip(split(grads), (state.masters, state.others), parts, strict=True)
        ]
        (directions, masters), (others, own) = found
        steps = state.steps + 1
        begun = of_params(grads if params is None else params)[0]
        if any(map(host.holds, jax.tree.leaves(masters))):  # whose stacks are not to be made anew whole
            begun = {path: leaf if path == rest else leaf[:1] for path, leaf in begun.items()}
        due = steps % every == 0
        masters = jax.tree.map(lambda a, b: host.chosen(due, a, b), optimizer.init(begun), masters)
        changes = {**directions, **others}
        del changes[rest]
        return changes, SampledState(masters, own, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def kept(
    name: str,
    is_master: Callable[[str], bool],
    layers: Sequence[int],
    away: bool,
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """One for each layer, which makes a step when the layer does, and one for all other leaves.

    Args:
      name: of the method, whose gradient tells `<name>/active` (g,) int32, the numbers of the layers that are drawn.
      is_master: path of a trained leaf -> whether it is (g, ...), of the layers that are drawn.
      layers: numbers of all that may be.
      away: whether the state of layers that are not drawn lies in the host's memory.
      optimizer: of each.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    rest = f"{name}/norm_of_the_rest"

    def split(leaves):
        masters = {path: leaf for path, leaf in leaves.items() if is_master(path)}
        return masters, {path: leaf for path, leaf in leaves.items() if path not in masters}

    def init(params):
        masters, others = split(params)
        zero = jnp.zeros(())
        one = optimizer.init({**{path: leaf[0] for path, leaf in masters.items()}, rest: zero})
        count = len(next(iter(masters.values())))
        many = lambda x, n: jnp.broadcast_to(x, (n, *x.shape))
        each: Any = jax.tree.map(lambda x: many(x, len(layers)), one) if not away else None
        if away:
            there = lambda x: host.repeated(x[None], len(layers)) if x.ndim >= 2 else many(x, len(layers))
            rows = jax.tree.map(lambda x: jnp.copy(many(x, count)), one)
            each = Held(rows, jnp.arange(count, dtype=jnp.int32), jax.tree.map(there, one))
        return SampledState(each, optimizer.init({**others, rest: zero}), jnp.zeros((), jnp.int32))

    def update(grads, state, params=None, *, aux=None, **extra):
        (own, others), (own_now, others_now) = split(grads), (None, None) if params is None else split(params)
        zero = {rest: jnp.zeros(())}
        squares = sum(jnp.sum(jnp.square(x.astype(jnp.float32)).reshape(len(x), -1), axis=1) for x in own.values())
        apart = (1 - jnp.eye(len(squares))) @ squares + optax.global_norm(others) ** 2

        def of_layer(grads, norm, state, now):
            now = None if now is None else {**now, **zero}
            return optimizer.update({**grads, rest: norm}, state, now, aux=aux, **extra)

        at = jnp.searchsorted(jnp.asarray(layers), told(name, aux, f"{name}/active"))
        held = state.masters.turned(at.astype(jnp.int32)) if away else None
        rows = jax.tree.map(lambda x: x[at], state.masters) if held is None else held.rows
        directions, rows = jax.vmap(of_layer)(own, jnp.sqrt(apart), rows, own_now)
        put = lambda x, row: x.at[at].set(row)
        masters = jax.tree.map(put, state.masters, rows) if held is None else held._replace(rows=rows)
        others_now = None if others_now is None else {**others_now, **zero}
        changes, beside = optimizer.update(
            {**others, rest: jnp.sqrt(squares.sum())}, state.others, others_now, aux=aux, **extra
        )
        changes = {**directions, **changes}
        del changes[rest]
        return changes, SampledState(masters, beside, state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)
