"""LISA: of all layers only a few, drawn anew every so many steps, train.

    every K steps: draw gamma layers a_1 ... a_gamma, M_i <- W[a_i], moments of M <- 0
    in layer l:    W_l = M_i in W's dtype where a_i = l, else W[l]
    at the end of each step: W[a_i] <- M_i, rounded once

Embeddings, final norm and head always train. The stack W (L, ...) is moved and keeps its dtype; the masters M
(gamma, ...) are trained leaves `lisa/<path of W>`, so that gradients and moments exist for gamma layers (see
`jaxpeft.sampling`). `lisa/active` (gamma,) int32 says which layers they are. All layers are equally likely.

Moments of M and the count that corrects their bias start anew with each draw; those of all other leaves, and the
learning rate's schedule, go on. In a chain, the leaves whose layers are sampled are those that the members before it
train: `lora+lisa` samples layers of LoRA's.

Kept for the backward pass: what full fine-tuning keeps, because which layers train is known only when the step runs;
for the same reason dW is computed in each layer. Under plain autodiff (`--save everything`) the kernels in use are kept
too, a copy of the stack; a plan picks them again.

Paper: Pan et al. 2024, "LISA", arXiv:2403.17919. Deviations: the published code keeps Adam's moments of every layer
that was ever drawn and goes on from them; here they are gone, as the paper's memory figures say (`moments="kept"` is
the published code's). With `moments="host"` they go on too, and those of layers that are not drawn lie in the host's
pinned memory: a switch takes gamma layers' there and brings gamma back, steps between move nothing, and the device
holds what it does where they are dropped.
"""

from __future__ import annotations

from jaxpeft import sampling, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, TRAINED, Method, Spec, View, unchanged
from jaxpeft.methods import full as _full

MOMENTS = ("dropped", "kept", "host")


def lisa(count: int = 2, every: int = 20, which: str = "all", moments: str = "dropped") -> Method:
    """LISA: `count` random layers of what the chain trains, or of the model itself.

    Args:
      count: gamma, layers that train at a time.
      every: K, steps from one draw to the next.
      which: what trains where nothing else in the chain does: "all", "biases", "norms", or a regular expression found
        in the path; what it names outside the layers always trains.
      moments: "dropped" with each draw; or "kept", as by the published code: each layer's, and its count of steps, go
        on when it is drawn again, and the state is that of all layers; or "host", the same, and what no drawn layer
        needs lies in the host's pinned memory, from where it comes when the layer is drawn.

    Returns:
      The method; it trains `lisa/<path>` (count, ...) and what lies outside the layers.

    Raises:
      InputError: for a count or a period below 1, unknown moments, more layers than the model has, an expression that
        does not compile, a chain in which no layers train before it, or quantized kernels to sample.
    """
    config = dict(locals())
    for name, value in (("count", count), ("every", every)):
        if value < 1:
            raise InputError(f"lisa: {name} {value} must be at least 1")
    if moments not in MOMENTS:
        raise InputError(f"lisa: moments {moments!r} is not one of {', '.join(MOMENTS)}")
    pattern = _full.pattern_of(which, "lisa: which")

    def draw(key, stacks, moved):
        del moved
        layers = sampling.layers_of(stacks)
        sampling.check_count("lisa", count, layers)
        return {"active": sampling.uniform(key, layers, count)}

    keeps, away = moments != "dropped", moments == "host"
    sampler = sampling.Sampler("lisa", draw, every, keeps=keeps, away=away, what=_full.of(which))
    return Method(
        gradient=sampler.gradient if sampler.keeps else unchanged,
        forward=sampler.forward,
        roles=sampler.roles,
        update=sampler.update,
        move=sampler.move,
        merge=sampler.merge,
        specs=(Spec("lisa", config),),
        alone=lambda path: TRAINED if pattern.found(path) else FROZEN,
    )


def state_numbers(view: View, moments: str = "dropped", **_) -> int:
    """Numbers of Adam's state: two for each trained one, and the moments of the norm that each part is told of."""
    if moments == "dropped":
        return 2 * tree.size(view.trained) + 4
    return sampling.kept_numbers("lisa", view, away=moments == "host")


ABOUT = About(
    summary="a few random layers train at a time, drawn anew every so many steps",
    level="step",
    trains="`count` layers of what the chain trains, and all that lies outside of the layers",
    saves="gradients, masters and optimizer state of all layers but `count`; no activations, no computation",
    chain="...+lisa",
    reference="Pan et al. 2024, arXiv:2403.17919",
    example={"count": 2, "every": 4},
    promises=Promises(site_bytes=_full.saved_bytes, state=state_numbers),
    defaults=Defaults(lr=2e-5, lr_with={"lora": 2e-4, "lora_fa": 2e-4}),
    stored="base",
    remade=lambda path: path.startswith("lisa/"),
)
