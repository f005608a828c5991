"""SlimFit: of each weight those layers train whose last update was the largest, all others stand still.

    d_i = mean |new - old| / |old|        over the numbers of tensor i, of the last step in which it has trained
    every K steps, of each stack W (L, ...): the ceil((1 - freeze) L) layers with the largest d train

A tensor is a matrix or a norm's scale of one layer. All d start large and random, so that each trains early. Biases in
the layers, and what lies outside of them, always train. The stack is moved and keeps its dtype; the masters (g, ...)
are trained leaves `slimfit/<path>`, so that gradients and moments exist for g layers (see `jaxpeft.sampling`).
`slimfit/distance/<path>` (L,) float32 are the d, `slimfit/active/<path>` (g,) int32 the layers that train.

Moments, and the count that corrects their bias, stay with a layer that goes on, and start anew for one that comes in.

Kept for the backward pass: what full fine-tuning keeps, as which layers train is known only when the step runs. The
paper's codes are the plan's (`--save`), with this method as with any other; of BERT:

    q_proj=compress (k_proj, v_proj), attention=recompute, attention_lse=recompute     attention's operands, 8 bits
    up_proj=compress4                                                                  GELU's inputs, 4 bits
    attention_norm_normalized=prune, output_norm_normalized=prune                      norms, a tenth (or compress4)
    block_input=compress, attention_norm=compress                                      inputs of linear maps, 8 bits

Paper: Ardakani et al. 2023, "SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training
Dynamics", arXiv:2305.18513. Deviations: layers are chosen of each stack, so that shapes are static, where the paper
sorts all tensors of the model together. Codes are in steps of each block or token, without bias, where the paper's are
of one size and clipped; probabilities of attention are not kept at all. Norms are pruned, and inputs of linear maps in
codes, in all layers, where the paper prunes those whose scale stands still and drops inputs of frozen kernels. Its
code keeps a second copy of all weights to compare with; d is calculated here from a step's own leaves.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import sampling, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, TRAINED, Leaves, Method, Moment, Objective, Spec, View, told
from jaxpeft.methods import full as _full

_LARGE = 1e10  # of a tensor that has not trained yet
_LEAST = 1e-12  # of a weight that is divided by
_DISTANCE = "slimfit/distance/"
_ACTIVE = "slimfit/active/"
_REST = "slimfit/norm_of_the_rest"


class SlimFitState(NamedTuple):
    """The optimizer's state.

    masters: {path: of one optimizer for each layer that trains, (g, ...)}.
    others: of the optimizer on all other leaves.
    layers: {path: (g,) int32, whose they are}.
    """

    masters: dict[str, Any]
    others: Any
    layers: dict[str, jax.Array]


def slimfit(freeze: float = 0.9, every: int = 1, which: str = "all") -> Method:
    """SlimFit on the model itself, or on what the chain trains.

    Args:
      freeze: of each stack's layers, the share that stands still; one trains at least.
      every: K, steps from one choice to the next.
      which: what trains where nothing else in the chain does: "all", "layers", or a regular expression found in the
        path; what it names outside the layers always trains.

    Returns:
      The method; it trains `slimfit/<path>` (g, ...) and the other leaves that `which` names.

    Raises:
      InputError: for a share outside [0, 1), a period below 1, an expression that does not compile, a chain in which no
        layers train before it, or quantized kernels.
    """
    config = dict(locals())
    if not 0 <= freeze < 1:
        raise InputError(f"slimfit: freeze {freeze} must be at least 0 and below 1")
    if every < 1:
        raise InputError(f"slimfit: every {every} must be at least 1")
    pattern = _full.pattern_of(which, "slimfit: which")

    def begun(flat, stacks):
        del flat
        draw = lambda path, layers: jax.random.uniform(jax.random.key(zlib.crc32(path.encode())), (len(layers),))
        return {_DISTANCE + path: _LARGE * (1 + draw(path, layers)) for path, layers in stacks.items()}

    def draw(key, stacks, moved):
        del key
        return {
            f"active/{path}": layers[0] + largest(moved[_DISTANCE + path], trains_of(len(layers), freeze))
            for path, layers in stacks.items()
        }

    sampler = sampling.Sampler(
        "slimfit",
        draw,
        every,
        begun,
        takes=lambda path: not path.endswith("/bias"),
        drawn_as=lambda path: f"active/{path}",
        what=f" but biases{_full.of(which)}",
    )

    def gradient(objective: Objective, view: View) -> Objective:
        del view

        def value_and_grad(trainable, rest, batch, key, opt_state):
            (value, aux), grads = objective.value_and_grad(trainable, rest, batch, key, opt_state)
            return (value, {**aux, **{path: leaf for path, leaf in rest.items() if path.startswith(_ACTIVE)}}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        moved = dict(leaves.moved)
        for path, new in leaves.trained.items():
            if sampler.is_master(path):
                own = path.removeprefix(sampler.scope)
                at = sampling.local(path, moved[own], moved[sampler.active(path)], sampler.scope)
                found = distance(new, moment.before[path])
                moved[_DISTANCE + own] = moved[_DISTANCE + own].at[at].set(found, mode="drop")
        return sampler.move(leaves._replace(moved=moved), moment)

    return Method(
        forward=sampler.forward,
        roles=sampler.roles,
        gradient=gradient,
        update=lambda optimizer, view: _staying(sampler, optax.with_extra_args_support(optimizer)),
        move=move,
        merge=sampler.merge,
        specs=(Spec("slimfit", config),),
        alone=lambda path: TRAINED if pattern.found(path) else FROZEN,
    )


def trains_of(layers: int, freeze: float) -> int:
    """g of a stack of so many layers."""
    return max(1, layers - int(freeze * layers + 1e-9))


def largest(d: jax.Array, count: int) -> jax.Array:
    """(count,) int32, ascending: where d (L,) is largest."""
    return jnp.sort(jax.lax.top_k(d, count)[1]).astype(jnp.int32)


def distance(new: jax.Array, old: jax.Array) -> jax.Array:
    """d (g,) float32 of masters (g, ...)."""
    old = old.astype(jnp.float32)
    change = jnp.abs(new.astype(jnp.float32) - old) / jnp.maximum(jnp.abs(old), _LEAST)
    return jnp.mean(change.reshape(len(change), -1), axis=1)


def _staying(
    sampler: sampling.Sampler, optimizer: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for each layer that trains, which goes on as long as the layer does.

    Each is given the norm of all other gradients as one more leaf, so that clipping by the global norm sees them.
    """

    def split(leaves):
        masters = {path: leaf for path, leaf in leaves.items() if sampler.is_master(path)}
        return masters, {path: leaf for path, leaf in leaves.items() if path not in masters}

    def fresh(path: str, master: jax.Array) -> Any:
        one = optimizer.init({path: master[0], _REST: jnp.zeros(())})
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(master), *x.shape)), one)

    def init(params):
        masters, others = split(params)
        return SlimFitState(
            {path: fresh(path, leaf) for path, leaf in masters.items()},
            optimizer.init({**others, _REST: jnp.zeros(())}),
            {path: jnp.full((len(leaf),), sampling.NO_LAYER, jnp.int32) for path, leaf in masters.items()},
        )

    def update(grads, state, params=None, *, aux=None, **extra):
        own, others = split(grads)
        now = grads if params is None else params
        squares = {path: _squares(leaf) for path, leaf in own.items()}
        beside = optax.global_norm(others) if others else jnp.zeros(())
        changes, masters, layers = {}, {}, {}
        for path, grad in own.items():
            rest = [x for other, x in squares.items() if other != path]
            apart = beside**2 + sum(map(jnp.sum, rest)) + (1 - jnp.eye(len(grad))) @ squares[path]

            def one(grad, norm, state, leaf, path=path):
                found, state = optimizer.update(
                    {path: grad, _REST: norm}, state, {path: leaf, _REST: jnp.zeros(())}, aux=aux, **extra
                )
                return found[path], state

            layers[path] = told(sampler.name, aux, sampler.active(path))
            before = _followed(state.masters[path], state.layers[path], layers[path], fresh(path, now[path]))
            changes[path], masters[path] = jax.vmap(one)(grad, jnp.sqrt(apart), before, now[path])
        whole = jnp.sqrt(sum(map(jnp.sum, squares.values()), jnp.zeros(())))
        beside_now = {**split(now)[1], _REST: jnp.zeros(())}
        found, kept = optimizer.update({**others, _REST: whole}, state.others, beside_now, aux=aux, **extra)
        del found[_REST]
        return {**found, **changes}, SlimFitState(masters, kept, layers)

    return optax.GradientTransformationExtraArgs(init, update)


def _squares(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)).reshape(len(leaf), -1), axis=1)


def _followed(state: Any, before: jax.Array, now: jax.Array, fresh: Any) -> Any:
    """The optimizers' state (g, ...) of layers `before`, as that of layers `now`; of those that come in `fresh`."""
    same = now[:, None] == before
    stays, at = jnp.any(same, axis=1), jnp.argmax(same, axis=1)

    def of(old, new):
        return jnp.where(stays.reshape(-1, *[1] * (old.ndim - 1)), old[at], new)

    return jax.tree.map(of, state, fresh)


def state_numbers(view: View, **_) -> int:
    """Numbers of Adam's state: two for each trained one; for each layer that trains a count, its number and the two
    moments of a norm, and those of one more.
    """
    masters = [leaf.shape[0] for path, leaf in view.trained.items() if path.startswith("slimfit/")]
    return 2 * tree.size(view.trained) + 4 * sum(masters) + 2


ABOUT = About(
    summary="of each weight those layers train whose last update was the largest",
    level="step",
    trains="a share of each weight's layers, biases, and all that lies outside of the layers",
    saves="gradients, masters and optimizer state of the layers that stand still; no activations, no computation",
    chain="...+slimfit",
    reference="Ardakani et al. 2023, arXiv:2305.18513",
    example={"freeze": 0.5},
    promises=Promises(site_bytes=_full.saved_bytes, state=state_numbers),
    defaults=Defaults(lr=2e-5, lr_with={"lora": 2e-4, "lora_fa": 2e-4}),
    stored="base",
    remade=lambda path: path.startswith("slimfit/"),
)
