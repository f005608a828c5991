"""LISA: of all layers only a few, drawn anew every so many steps, train.

    every K steps: draw gamma layers a_1 ... a_gamma, M_i <- W[a_i], moments of M <- 0
    in layer l:    W_l = M_i in W's dtype where a_i = l, else W[l]
    at the end of each step: W[a_i] <- M_i, rounded once

Embeddings, final norm and head always train. The stack W (L, ...) is moved and keeps its dtype; the masters M
(gamma, ...) are trained leaves `lisa/<path of W>`, so that gradients and moments exist for gamma layers. `lisa/active`
(gamma,) int32 says which layers they are. A layer is put in place inside the block: as whole leaves (L, ...) the
gradients would be those of all layers.

Moments of M and the count that corrects their bias start anew with each draw; those of all other leaves, and the
learning rate's schedule, go on. In a chain, the leaves whose layers are sampled are those that the members before it
train: `lora+lisa` samples layers of LoRA's.

Kept for the backward pass: what full fine-tuning keeps, because which layers train is known only when the step runs;
for the same reason dW is computed in each layer. Under plain autodiff (`--save everything`) the kernels in use are kept
too, a copy of the stack; a plan picks them again.

Paper: Pan et al. 2024, "LISA", arXiv:2403.17919. Deviations: the published code keeps Adam's moments of every layer
that was ever drawn and goes on from them; here they are gone, as the paper's memory figures say.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import patterns, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, MOVED, TRAINED, Leaves, Method, Moment, Role, Spec, View, trained
from jaxpeft.methods import full as _full
from jaxpeft.model import Model, reads_stacks
from jaxpeft.quant import is_packed
from pallas_kernels.stacked import taken

SCOPE = "lisa/"
ACTIVE = "lisa/active"
_NORM = "lisa/norm_of_the_rest"


class LisaState(NamedTuple):
    """The optimizer's state.

    masters: of the optimizer on the sampled layers' masters.
    others: of the optimizer on all other leaves.
    steps: () int32, steps done.
    """

    masters: Any
    others: Any
    steps: jax.Array


def lisa(count: int = 2, every: int = 20, which: str = "all") -> Method:
    """LISA: `count` random layers of what the chain trains, or of the model itself.

    Args:
      count: gamma, layers that train at a time.
      every: K, steps from one draw to the next.
      which: what trains where nothing else in the chain does: "all", "biases", "norms", or a regular expression found
        in the path; what it names outside the layers always trains.

    Returns:
      The method; it trains `lisa/<path>` (count, ...) and what lies outside the layers.

    Raises:
      InputError: for a count or a period below 1, more layers than the model has, an expression that does not compile,
        a chain in which no layers train before it, or quantized kernels to sample.
    """
    config = dict(locals())
    for name, value in (("count", count), ("every", every)):
        if value < 1:
            raise InputError(f"lisa: {name} {value} must be at least 1")
    pattern = patterns.compiled(_full.WHICH.get(which, which), "lisa: which")

    def roles(others):
        def role(path: str) -> Role:
            if path == ACTIVE:
                return MOVED
            own = others(path.removeprefix(SCOPE))
            if path.startswith(SCOPE):
                return trained(own.dtype or jnp.float32)
            if own.name == "trained" and tree.stacked(path):
                return Role("moved", own.dtype or jnp.float32)
            return own

        return role

    def forward(model: Model, view: View) -> Model:
        return _sampled(model, view, count)

    def update(optimizer, view):
        return _fresh(optax.with_extra_args_support(optimizer), every)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        masters = {path: leaf for path, leaf in leaves.trained.items() if path.startswith(SCOPE)}
        active, moved, own = leaves.moved[ACTIVE], dict(leaves.moved), {}
        drawn = _draw(moment.key, _layers(masters, moved), count)
        now = jnp.where((moment.step + 1) % every == 0, drawn, active)
        for path, master in masters.items():
            stack = moved[path.removeprefix(SCOPE)]
            stack = moved[path.removeprefix(SCOPE)] = _written(path, stack, master, active)
            # Of a layer that stays, the master stays too: it is not what it was rounded to.
            stays = jnp.any(now[:, None] == active, axis=1)
            kept = jnp.take(master, jnp.argmax(now[:, None] == active, axis=1), axis=0)
            fresh = _read(path, stack, now).astype(master.dtype)
            own[path] = jnp.where(stays.reshape(-1, *[1] * (master.ndim - 1)), kept, fresh)
        return Leaves({**leaves.trained, **own}, {**moved, ACTIVE: now})

    return Method(
        forward=forward,
        roles=roles,
        update=update,
        move=move,
        merge=merge,
        specs=(Spec("lisa", config),),
        alone=lambda path: TRAINED if pattern.found(path) else FROZEN,
    )


def merge(params: Mapping[str, Any]) -> tree.Params:
    """The stacks with the masters written into them, which go."""
    flat = tree.flatten(params)
    whole = {path: leaf for path, leaf in flat.items() if not path.startswith(SCOPE)}
    for path, master in flat.items():
        if path.startswith(SCOPE) and path != ACTIVE:
            own = path.removeprefix(SCOPE)
            whole[own] = _written(path, jnp.asarray(whole[own]), master, flat[ACTIVE])
    return tree.unflatten(whole)


# Where layers lie in their stacks.


def _span(path: str, stack: Any) -> tuple[int, int]:
    """(first layer, end) of the segment that a stack is of; `path` with or without the masters' scope."""
    segment = path.removeprefix(SCOPE).split("/", 1)[0]
    ((_, first, end),) = tree.segments({segment: {"": stack}})
    return first, end


def _layers(masters: Mapping[str, Any], flat: Mapping[str, Any]) -> list[int]:
    """The numbers of all layers of which some leaf has masters."""
    spans = {_span(path, flat[path.removeprefix(SCOPE)]) for path in masters}
    return sorted({layer for span in spans for layer in range(*span)})


def _draw(key: jax.Array, layers: list[int], count: int) -> jax.Array:
    """(count,) int32, numbers of different layers."""
    key = jax.random.fold_in(key, zlib.crc32(b"lisa"))
    return jax.random.choice(key, jnp.asarray(layers, jnp.int32), (count,), replace=False)


def _local(path: str, stack: Any, active: jax.Array) -> jax.Array:
    """Where the layers lie in a stack; its length for those of other segments."""
    first, end = _span(path, stack)
    return jnp.where((active >= first) & (active < end), active - first, end - first)


def _written(path: str, stack: jax.Array, master: jax.Array, active: jax.Array) -> jax.Array:
    return stack.at[_local(path, stack, active)].set(master.astype(stack.dtype), mode="drop")


def _read(path: str, stack: jax.Array, active: jax.Array) -> jax.Array:
    return jnp.take(stack, _local(path, stack, active), axis=0, mode="clip")


# The model.


def _sampled(model: Model, view: View, count: int) -> Model:
    """The model that computes with the masters of the layers that are drawn, and whose `init` adds them."""

    def init(key, params):
        flat = tree.flatten(model.init(key, params))
        if ACTIVE in flat:
            return tree.unflatten(flat)
        roles = {path: view.role(path) for path in flat}
        chosen = [path for path, role in roles.items() if role.name == "moved" and role.dtype is not None]
        if not chosen:
            raise InputError("lisa: nothing in the layers trains; put lisa behind the methods whose layers it samples")
        if packed := [path for path in chosen if is_packed(flat[path])]:
            raise InputError(f"lisa: {packed[0]} is quantized and cannot train; sample adapters: quantize+lora+lisa")
        layers = _layers(dict.fromkeys(chosen), flat)
        if count > len(layers):
            raise InputError(f"lisa: count {count}: {len(layers)} layers train")
        active = _draw(key, layers, count)
        masters = {
            SCOPE + path: _read(path, flat[path], active).astype(view.role(SCOPE + path).dtype) for path in chosen
        }
        return tree.unflatten({**flat, **masters, ACTIVE: active})

    def embed(params, batch, key):
        x, ctx = model.stack.embed(params, batch, key)
        return x, ctx.add(shared={"lisa": params["lisa"]})

    def layer(function):
        def call(layer, x, ctx, cache, segment):
            own = ctx.shared["lisa"]
            flat = tree.flatten(layer)
            for path, masters in tree.flatten(own.get(segment, {})).items():
                flat[path] = _chosen(taken(flat[path]), masters, own["active"], ctx.layer)
            return function(tree.unflatten(flat), x, ctx, cache, segment)

        return reads_stacks(call, like=function)

    return model._replace(init=init, stack=model.stack.map_layers(layer)._replace(embed=embed))


def _chosen(leaf: jax.Array, masters: jax.Array, active: jax.Array, layer: jax.Array) -> jax.Array:
    """A layer's leaf, or the master in its place."""
    for i in range(len(masters)):
        leaf = jnp.where(active[i] == layer, masters[i].astype(leaf.dtype), leaf)
    return leaf


# The optimizer: one for the masters, which starts anew, and one for all other leaves. Each is given the norm of the
# other's gradients as one more leaf, so that clipping by the global norm sees all of them.


def _fresh(optimizer: optax.GradientTransformationExtraArgs, every: int) -> optax.GradientTransformationExtraArgs:
    def split(leaves, norm=optax.global_norm):
        masters = {path: leaf for path, leaf in leaves.items() if path.startswith(SCOPE)}
        others = {path: leaf for path, leaf in leaves.items() if path not in masters}
        return {**masters, _NORM: norm(others)}, {**others, _NORM: norm(masters)}

    def of_params(params):
        return split(params, norm=lambda _: jnp.zeros(()))

    def init(params):
        masters, others = of_params(params)
        return LisaState(optimizer.init(masters), optimizer.init(others), jnp.zeros((), jnp.int32))

    def update(grads, state, params=None, **extra):
        parts = (None, None) if params is None else of_params(params)
        found = [
            optimizer.update(own, old, of, **extra)
            for own, old, of in zip(split(grads), (state.masters, state.others), parts, strict=True)
        ]
        (directions, masters), (others, rest) = found
        steps = state.steps + 1
        fresh = optimizer.init(of_params(grads if params is None else params)[0])
        masters = jax.tree.map(lambda a, b: jnp.where(steps % every == 0, a, b), fresh, masters)
        changes = {**directions, **others}
        del changes[_NORM]
        return changes, LisaState(masters, rest, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def state_numbers(view: View, **_) -> int:
    """Numbers of Adam's state: two for each trained one, and the moments of the norm that each part is told of."""
    return 2 * tree.size(view.trained) + 4


ABOUT = About(
    summary="a few random layers train at a time, drawn anew every so many steps",
    level="step",
    trains="`count` layers of what the chain trains, and all that lies outside of the layers",
    saves="gradients, masters and optimizer state of all layers but `count`; no activations, no computation",
    reference="Pan et al. 2024, arXiv:2403.17919",
    example={"count": 2, "every": 4},
    promises=Promises(site_bytes=_full.saved_bytes, state=state_numbers),
    defaults=Defaults(lr=2e-5, lr_with={"lora": 2e-4, "lora_fa": 2e-4}),
)
