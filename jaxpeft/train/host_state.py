"""`optimizer_memory="host"`: the optimizer's state of matrices lies in the host's pinned memory (`jaxpeft.host`).

    of each stack W (L, n, m), for l = 1 ... L:    its state s_l to the device
                                                   direction_l, s_l <- update(gradient_l, s_l, W_l),   and s_l back

On the device is the state of one layer of one stack at a time, and the vectors of all (the state of norms, Adafactor's
means of rows), which stay there. What no layer has, a table of embeddings, comes whole. An optimizer here treats each
leaf, and each layer of a stack, by itself, so the step is that of a state on the device: moments are the same bits,
directions are rounded as the compiler orders their products. The state goes over the link to the host's memory once
each way in each step.

Which arrays of a state are there is known from the state alone: `init` puts them there, a step leaves them there.
Whoever looks into the state of an optimizer that it has not made meets arrays that are not on the device: an `update`
slot that does not look says so (`method.blind`), any other one is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft import host, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, is_blind, view_of
from jaxpeft.model import Model
from jaxpeft.train.places import Places


def away(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transform, the state of whose matrices lies in the host's memory.

    Args:
      inner: over flat leaves; it treats each leaf, and each layer of a stack, by itself, and its state starts alike for
        all layers.
    """

    def init(params):
        whole = Places.of(jax.eval_shape(inner.init, params), params)
        parts, found = [], None
        for path, leaf in params.items():
            layered = tree.layered(path)
            found = inner.init({path: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype) if layered else leaf})
            lain = functools.partial(_lain, layers=len(leaf) if layered else None)
            parts.append(jax.tree.map(lain, whole.parts(found, [path])))
        return inner.init(params) if found is None else whole.after(found).joined(*parts)

    def update(grads, state, params=None):
        places = Places.of(state, grads)
        there = [path for path in grads if any(map(host.holds, jax.tree.leaves(places.parts(state, [path]))))]
        of = lambda flat, paths: None if flat is None else {path: flat[path] for path in paths}

        def some(grads, own, params):
            found, after = inner.update(grads, places.joined(own), params)
            return found, places.parts(after, grads), places.after(after)

        here = [path for path in grads if path not in there]
        directions, own, after = some(of(grads, here), places.parts(state, here), of(params, here))
        parts = [own]
        for path in there:
            one = lambda grads, own, params: some(grads, own, params)[:2]
            given = ({path: grads[path]}, places.parts(state, [path]), of(params, [path]))
            found, own = _by_layer(one, *given) if tree.layered(path) else _whole(one, *given)
            directions |= found
            parts.append(own)
        return of(directions, grads), after.joined(*parts)

    return optax.GradientTransformation(init, update)


def _lain(x: Any, layers: int | None) -> Any:
    """An array of a leaf's first state where it belongs; of a stack's the one of a layer, (1, ...), for all of them."""
    if layers is None:
        return host.put(x) if jnp.ndim(x) >= 2 else x
    return host.repeated(x, layers) if jnp.ndim(x) >= 3 else jnp.broadcast_to(x, (layers, *x.shape[1:]))


def _whole(one: Callable[..., Any], grads: tree.Flat, own: Any, params: Any) -> tuple[tree.Flat, Any]:
    found, after = one(grads, host.fetched(own), params)
    return found, put(after, jax.tree.map(host.holds, own))


def _by_layer(one: Callable[..., Any], grads: tree.Flat, own: Any, params: Any) -> tuple[tree.Flat, Any]:
    """The same of stacks, a layer at a time; the direction takes the gradient's place."""
    take = lambda i, stacks: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), stacks)
    into = lambda i, stacks, parts: jax.tree.map(
        lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, i, 0), stacks, parts
    )
    there = jax.tree.map(host.holds, own)
    shapes = jax.eval_shape(lambda *given: one(given[0], host.fetched(given[1]), given[2])[0], grads, own, params)
    same = {path: leaf.dtype == shapes[path].dtype for path, leaf in grads.items()}
    room = {p: leaf if same[p] else jnp.zeros(leaf.shape, shapes[p].dtype) for p, leaf in grads.items()}

    def layer(i, carry):
        room, own = carry
        of = {path: leaf if same[path] else grads[path] for path, leaf in room.items()}
        found, after = one(take(i, of), host.fetched(take(i, own)), take(i, params))
        return into(i, room, found), into(i, own, put(after, there))

    (leaf,) = grads.values()
    return jax.lax.fori_loop(0, len(leaf), layer, (room, own))


# Of any state: where its arrays lie.


def lies(optimizer: optax.GradientTransformation, trained: Mapping[str, Any]) -> Any:
    """For each array of the state of leaves, given these or their shapes: whether it lies in the host's memory."""
    found: list[Any] = []

    def look(trained):
        found.append(jax.tree.map(host.holds, optimizer.init(trained)))

    jax.eval_shape(look, dict(trained))
    return found[0]


def put(state: Any, there: Any) -> Any:
    """The state, its arrays known to lie where `there` says; a program for a device that is described is told."""
    return jax.tree.map(lambda x, away: host.put(x) if away else x, state, there)


def check(model: Model, method: Method, optimizer: optax.GradientTransformation, leaves: Mapping[str, Any]) -> None:
    """Refuses what cannot be.

    Args:
      model: adapted.
      method: of the run.
      optimizer: with `memory="host"`.
      leaves: {path: leaf or its shape}, all of them.

    Raises:
      InputError: for a method that looks into the optimizer's state, and for a state none of which would lie there.
    """
    said, view = f"--optimizer-memory host: {method.name}", view_of(model, method, leaves)
    there = jax.tree.leaves(lies(optimizer, view.trained))
    if not there:
        raise InputError(f"{said} steps along the gradients themselves, with no state to keep there; leave it out")
    if not any(there):
        raise InputError(f"{said} keeps a state of vectors only, which stays on the device; leave it out")
    if not is_blind(method.update):
        raise InputError(f"{said} reads and writes the optimizer's state itself, on the device; leave it out")


def check_device(device: jax.Device) -> None:
    """Raises InputError for a device that shows no pinned memory of its host."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if host.KIND not in kinds:
        raise InputError(
            f"--optimizer-memory host: {device.device_kind} shows JAX no {host.KIND} memory, only {', '.join(kinds)}; "
            "leave it out"
        )
