"""The optimizer of a run, in two parts: a direction, and a rate that is a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax

from jaxpeft import tree
from jaxpeft.about import Defaults
from jaxpeft.method import Spec, about

Schedule = Literal["constant", "linear", "cosine"]
Direction = Literal["adam", "sgd"]


def make_schedule(kind: Schedule, lr: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """The learning rate of the update that follows `count` updates, count from 0 to steps - 1.

        count < warmup:   lr (count + 1) / (warmup + 1)
        constant:         lr
        linear, cosine:   from lr down to zero at count = steps

    The first update has a rate above zero and the last one too: no step is wasted.

    Args:
      kind: the shape after the warm-up.
      lr: the peak, reached at count = warmup.
      steps: updates in the run.
      warmup: updates before the peak; at least steps of them: the run is a warm-up only.
    """
    falling = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, falling),
        "cosine": optax.cosine_decay_schedule(lr, falling),
    }[kind]
    rise = optax.linear_schedule(lr / (warmup + 1), lr, max(warmup, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_direction(kind: Direction = "adam", clip: float | None = 1.0) -> optax.GradientTransformation:
    """Gradients -> the direction that a step goes against; the step itself knows the rate and the decay.

    Args:
      kind: "adam" (with decoupled decay AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101), or "sgd", the gradient,
        which is not clipped: where it is a method's estimate, its norm is that of the method's noise.
      clip: the largest global norm of the gradients that Adam sees; None leaves them as they are.
    """
    if kind == "sgd":
        return optax.identity()
    own = optax.scale_by_adam()
    return own if clip is None else optax.chain(optax.clip_by_global_norm(clip), own)


def defaults(specs: Sequence[Spec]) -> Defaults:
    """What the members of a chain say of a run's defaults: of each figure, the first one that has an opinion.

    A rate for the company of another member comes before any other.
    """
    members = [about(spec.name).defaults for spec in specs]
    names = [spec.name for spec in specs]
    beside = [member.lr_with[name] for member in members for name in names if name in member.lr_with]
    first = lambda values, otherwise: next((value for value in values if value is not None), otherwise)
    return Defaults(
        lr=first([*beside, *(member.lr for member in members)], None),
        weight_decay=first([member.weight_decay for member in members], 0.0),
        direction=first([member.direction for member in members], "adam"),
    )


def decays(path: str, leaf: Any) -> bool:
    """Whether weight decay acts on a leaf: on matrices, not on biases, scales of norms and other vectors."""
    # Of a stack, or of what a method keeps of one: "lisa/layers/...".
    names = path.split("/")
    layered = any(tree.stacked("/".join(names[i:])) for i in range(len(names)))
    return jnp.ndim(leaf) - layered >= 2
