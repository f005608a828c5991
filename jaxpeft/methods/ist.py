"""IST: of a chain's adapters those of a few layers train in each step, and which ones a bandit learns.

    each step        layers a_1 ... a_g are drawn, one after the other, with probability ~ sigmoid(-I_l); they train
    every K steps    N trials on the step's batch: half of the layers, drawn with probability ~ sigmoid(I_l), are
                     suppressed, y = x W + beta (adapted(x) - x W), and the reward is r_k = exp(-loss)
                     I_l <- I_l + mu sum_k (r_k - mean r) p_l (1 - p_l)    over the trials in which l was suppressed

with p = sigmoid(I). A large I says that little is lost without a layer's adapters: it trains less often. All adapters
are part of the forward pass in each step.

The adapters' leaves are moved stacks and the drawn layers are masters (see `jaxpeft.sampling`): gradients exist for g
layers. An optimizer's state for each layer is kept, with its own count of steps, and goes on when the layer is drawn
again. `ist/scores` (L,) float32 is I; a trial is a forward pass, under the same memory plan as the step's.

Kept for the backward pass: what the adapters keep, in every layer. Which layers train is known only when the step runs,
and a step that is compiled once sets aside what each of them might need; a plan that computes layers again keeps none
of it in any layer.

Paper: Yao et al. 2024, "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
Fine-tuning of Large Language Models", arXiv:2410.11772; constants are those of its published code. Deviations: the
trials are on the step's own batch, without dropout; several adapters at one site are suppressed one inside the other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpeft import sampling, sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, Leaves, Method, Moment, Objective, Spec, View, about, told
from jaxpeft.model import Model
from jaxpeft.train.step import mean_over

_ELSEWHERE = ("module", "input", "stack")  # levels of adapters that are at no linear map


def ist(
    share: float = 0.25, every: int = 10, trials: int = 3, suppress: float = 0.5, beta: float = 0.25, gain: float = 10.0
) -> Method:
    """IST on the adapters that the members before it put at linear maps of the layers.

    Args:
      share: of the layers, those that train in a step.
      every: K, steps from one update of the scores to the next.
      trials: N, at least 2: a reward is compared with their mean.
      suppress: share of the layers that are suppressed in a trial.
      beta: what is left of their adapters' response, from 0 to below 1.
      gain: mu.

    Returns:
      The method, a modifier: `lora+ist`. It trains `ist/<path>` (g, ...).

    Raises:
      InputError: for an argument outside its range, a chain without adapters before it, or adapters that are not at
        linear maps of the layers.
    """
    config = dict(locals())
    for name in ("share", "suppress"):
        if not 0 < config[name] <= 1:
            raise InputError(f"ist: {name} {config[name]} must be above 0 and at most 1")
    for name, least in (("every", 1), ("trials", 2)):
        if config[name] < least:
            raise InputError(f"ist: {name} {config[name]} must be at least {least}")
    if not 0 <= beta < 1:
        raise InputError(f"ist: beta {beta} must be at least 0 and below 1")
    if not 0 < gain < float("inf"):
        raise InputError(f"ist: gain {gain} must be a finite number above 0")

    def begun(flat, stacks):
        del flat
        return {"ist/scores": jnp.zeros(len(sampling.layers_of(stacks))), "ist/steps": jnp.zeros((), jnp.int32)}

    def draw(key, stacks, moved):
        layers = sampling.layers_of(stacks)
        count = max(1, round(share * len(layers)))
        return {"active": sampling.weighted(key, layers, count, jax.nn.sigmoid(-moved["ist/scores"]))}

    sampler = sampling.Sampler("ist", draw, 1, begun, keeps=True)

    def forward(model: Model, view: View) -> Model:
        for spec in view.specs:
            if about(spec.name).level in _ELSEWHERE:
                raise InputError(
                    f"ist: what {spec.name} adds is at no linear map, and its response is not suppressed; chain ist "
                    "to adapters that are, as lora+ist"
                )
        own = sampler.forward(model, view)

        def init(key, params):
            flat = tree.flatten(own.init(key, params))
            for path in flat:
                site = path.removeprefix("ist/").rpartition("/")[0].rpartition("/")[0]
                if sampler.is_master(path) and sites.kernel_path(flat, site) not in flat:
                    raise InputError(f"ist: {path.removeprefix('ist/')} trains and is no adapter's; as lora+ist")
            return tree.unflatten(flat)

        return own._replace(init=init)

    def gradient(objective: Objective, view: View) -> Objective:
        layers = sampling.layers_of(sampler.stacks(view))
        inner = sampler.gradient(objective, view)

        def value_and_grad(trainable, rest, batch, key, opt_state):
            def learnt():
                masks = tried(jax.random.fold_in(key, 0x157), rest["ist/scores"], trials, suppress)

                def trial(_, mask):
                    factors = jnp.ones(max(layers) + 1).at[jnp.asarray(layers)].set(jnp.where(mask, beta, 1.0))
                    other = objective.on(lambda model: suppressed(model, factors))
                    part = lambda batch, key: other.value(trainable, rest, batch, None)
                    return None, mean_over(part, batch, key, objective.parts)[0]

                losses = jax.lax.scan(trial, None, masks)[1]
                return updated(rest["ist/scores"], masks, losses, gain)

            scores = jax.lax.cond(rest["ist/steps"] % every == 0, learnt, lambda: rest["ist/scores"])
            (value, aux), grads = inner.value_and_grad(trainable, rest, batch, key, opt_state)
            return (value, {**aux, "ist/scores": scores}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        own = {"ist/scores": told("ist", moment.aux, "ist/scores"), "ist/steps": leaves.moved["ist/steps"] + 1}
        return sampler.move(leaves._replace(moved={**leaves.moved, **own}), moment)

    return Method(
        forward=forward,
        roles=sampler.roles,
        gradient=gradient,
        update=sampler.update,
        move=move,
        merge=sampler.merge,
        specs=(Spec("ist", config),),
        alone=lambda path: FROZEN,
    )


# The bandit.


def tried(key: jax.Array, scores: jax.Array, trials: int, share: float) -> jax.Array:
    """(N, L) bool: the layers that are suppressed in each trial."""
    count = max(1, round(share * len(scores)))

    def one(key):
        found = sampling.weighted(key, range(len(scores)), count, jax.nn.sigmoid(scores))
        return jnp.zeros(len(scores), bool).at[found].set(True)

    return jax.vmap(one)(jax.random.split(key, trials))


def updated(scores: jax.Array, masks: jax.Array, losses: jax.Array, gain: float) -> jax.Array:
    """I (L,) after trials that suppressed `masks` (N, L) and had `losses` (N,)."""
    rewards, p = jnp.exp(-losses), jax.nn.sigmoid(scores)
    return scores + gain * ((rewards - rewards.mean()) @ masks.astype(jnp.float32)) * p * (1 - p)


def suppressed(model: Model, factors: jax.Array) -> Model:
    """The model whose adapters' responses in layer l are factors[l] times what they are."""

    def embed(params, batch, key):
        x, ctx = model.stack.embed(params, batch, key)
        return x, ctx.add(shared={sites.RESPONSE: factors})

    return model._replace(stack=model.stack._replace(embed=embed))


ABOUT = About(
    summary="adapters of a few layers train in each step, by importance that trials with suppressed layers tell",
    level="step",
    trains="in each step, of `share` of the layers, what the chain trains there",
    saves="gradients of the other layers' adapters; no activations but those that a plan saves in any layer",
    reference="Yao et al. 2024, arXiv:2410.11772",
    example={"share": 0.5, "every": 2},
    promises=Promises(block_bytes=lambda *_, **__: 0, state=lambda view, **_: sampling.kept_numbers("ist", view)),
    defaults=Defaults(lr_with={"lora": 2e-4}),
    within="lora+ist",
    stored="host",
    remade=lambda path: path.startswith("ist/"),
)
