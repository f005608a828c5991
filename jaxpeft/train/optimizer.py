"""The optimizer of a run, in two parts: a direction, and a rate that is a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree
from jaxpeft.about import Defaults
from jaxpeft.errors import InputError
from jaxpeft.method import Spec, about
from jaxpeft.train.adam8bit import scale_by_adam8bit
from jaxpeft.train.host_state import away

Schedule = Literal["constant", "linear", "cosine"]
Direction = Literal["adam", "sgd", "adam8bit", "adafactor", "sm3", "lion"]
Memory = Literal["device", "host"]
# Of a default rate, which is Adam's: Lion's steps all have its length (Chen et al. 2023: 3 to 10 times smaller).
RATES = {"lion": 0.2}


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


def make_direction(
    kind: Direction = "adam", clip: float | None = 1.0, memory: Memory = "device"
) -> optax.GradientTransformation:
    """Gradients -> the direction that a step goes against; the step itself knows the rate and the decay.

        kind        direction                                                       state, of a kernel (n, m)
        adam        m / (sqrt(v) + eps); with decoupled decay AdamW (1)              2 nm float32
        adam8bit    the same, of moments in 8 bits (2, `jaxpeft.train.adam8bit`)     2 nm bytes + nm / 32
        adafactor   g / sqrt(row x column means of g^2), of an RMS of at most 1 (3)  n + m, nm below 128 x 128
        sm3         momentum of g / sqrt(least of a row's and a column's sum) (4)    nm + n + m
        lion        sign of a momentum (5)                                           nm
        sgd         g                                                                none

    Adafactor has neither momentum nor the scale of the parameters in its steps: the rate is the run's, as with all
    others. Leaves of a stack are one parameter for each layer: rows, columns and RMS are a layer's. `sgd` is not
    clipped: where the gradient is a method's estimate, its norm is that of the method's noise.

    (1) Loshchilov & Hutter 2019, arXiv:1711.05101. (2) Dettmers et al. 2022, arXiv:2110.02861. (3) Shazeer & Stern
    2018, arXiv:1804.04235. (4) Anil et al. 2019, arXiv:1901.11150. (5) Chen et al. 2023, arXiv:2302.06675.

    Args:
      kind: of `Direction`.
      clip: the largest global norm of the gradients that all but `sgd` see; None leaves them as they are.
      memory: where the state of matrices lies: "device", or "host", from where a step takes it layer by layer
        (`jaxpeft.train.host_state`).

    Raises:
      InputError: for another kind or memory.
    """
    if kind not in get_args(Direction):
        raise InputError(f"optimizer {kind!r} is not one of {', '.join(get_args(Direction))}")
    if memory not in get_args(Memory):
        raise InputError(f"optimizer memory {memory!r} is not one of {', '.join(get_args(Memory))}")
    if kind == "sgd":
        return optax.identity()
    own = {
        "adam": optax.scale_by_adam,
        "adam8bit": scale_by_adam8bit,
        "adafactor": lambda: by_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))),
        "sm3": lambda: by_layer(optax.scale_by_sm3()),
        "lion": optax.scale_by_lion,
    }[kind]()
    own = away(own) if memory == "host" else own
    return own if clip is None else optax.chain(optax.clip_by_global_norm(clip), own)


def by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transform of single arrays on flat leaves: each layer of a stack is an array of its own, a number is (1,)."""

    def each(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(function) if tree.layered(path) else function

    wide = lambda x: x if x is None or jnp.ndim(x) else jnp.reshape(x, (1,))

    def init(params):
        return {path: each(path, lambda x: inner.init(wide(x)))(leaf) for path, leaf in params.items()}

    def update(grads, state, params=None):
        def one(gradient, state, param):
            found, state = inner.update(wide(gradient), state, wide(param))
            return jnp.reshape(found, jnp.shape(gradient)), state

        like = grads if params is None else params
        found = {path: each(path, one)(gradient, state[path], like[path]) for path, gradient in grads.items()}
        return {path: x for path, (x, _) in found.items()}, {path: own for path, (_, own) in found.items()}

    return optax.GradientTransformation(init, update)


def direction_of(specs: Sequence[Spec], asked: str | None = None) -> Direction:
    """The optimizer of a run: the one that is asked for, else the method's own.

    Raises:
      InputError: for another one than the gradient itself with a method whose gradients are the direction.
    """
    own = defaults(specs).direction or "adam"
    if own == "sgd" and asked not in (None, own):
        name = "+".join(spec.name for spec in specs)
        raise InputError(
            f"--optimizer {asked}: {name} steps along the gradients themselves; leave it out, or give {own}"
        )
    return asked or own  # type: ignore[return-value]


def defaults(specs: Sequence[Spec]) -> Defaults:
    """What the members of a chain say of a run's defaults: of each figure, the first one that has an opinion.

    A rate for the company of another member comes before any other; then one beside an adapter's own.
    """
    members = [about(spec.name).defaults for spec in specs]
    adapters = [about(spec.name).defaults.lr for spec in specs if about(spec.name).stored != "base"]
    own = next((lr for lr in adapters if lr is not None), None)
    names = [spec.name for spec in specs]
    beside = [member.lr_with[name] for member in members for name in names if name in member.lr_with]
    beside += [] if own is None else [member.beside * own for member in members if member.beside is not None]
    first = lambda values, otherwise: next((value for value in values if value is not None), otherwise)
    return Defaults(
        lr=first([*beside, *(member.lr for member in members)], None),
        weight_decay=first([member.weight_decay for member in members], 0.0),
        direction=first([member.direction for member in members], "adam"),
    )


def decays(path: str, leaf: Any) -> bool:
    """Whether weight decay acts on a leaf: on matrices, not on biases, scales of norms and other vectors."""
    return jnp.ndim(leaf) - tree.layered(path) >= 2
