"""The optimizer of a run: AdamW behind a clip by global norm; its learning rate is a function of the step alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree

Schedule = Literal["constant", "linear", "cosine"]


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


def make_optimizer(
    schedule: optax.Schedule | float, weight_decay: float = 0.0, clip: float | None = 1.0
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over a flat trainable dict.

    Args:
      schedule: learning rate.
      weight_decay: decoupled, times the learning rate; only on the leaves that `decays` names.
      clip: the largest global norm of the gradients; None leaves them as they are.
    """
    adamw = optax.adamw(schedule, weight_decay=weight_decay, mask=_decay_mask)
    return adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)


def decays(path: str, leaf: Any) -> bool:
    """Whether weight decay acts on a leaf: on matrices, not on biases, scales of norms and other vectors."""
    return jnp.ndim(leaf) - tree.stacked(path) >= 2


def _decay_mask(leaves: Mapping[str, jax.Array]) -> dict[str, bool]:
    return {path: decays(path, leaf) for path, leaf in leaves.items()}
