"""QZO: the scales of a quantized base move, by two forward passes; its integers stay as they are, bit by bit.

    W = s v(c)                            c fixed codes of 2 to 8 bits, s (G, m) float32, one per group of inputs
    d = (L(s + eps z) - L(s - eps z)) / (2 eps),   z ~ N(0, I) of the shape of s
    s <- max(s - rate clip(d, -C, C) z, 0)

Kept for the backward pass: nothing; there is none, and no gradients and no optimizer state: a step needs the packed
kernels and what a forward pass needs. An estimate's variance grows with what is perturbed, which is one number per
group. The clipped derivative d bounds a step along a direction in which the loss is steep; where it clips, the estimate
is biased.

With `relative` each scale is perturbed in proportion to itself, s (1 + eps z), and moves by -rate d z s: scales differ
by kernel and by bits, and of kernels of 8 bits an eps of 1e-3 may be as large as a scale, and turn its sign. A warning
says where it is more than a quarter of one: the evaluations are then of models far from s.

The kernels are those of `quantize` in any format (of nf4, whose codes are a codebook's, the scales of the codewords; of
doubly quantized scales, what they stand for), or those that GPTQ or AWQ has made, zero points fixed. The method has to
be nearest to them, last in the chain: `quantize+qzo`. Scales that move are leaves of their own beside the kernels,
which are frozen: 4 bytes per group more, and a task is its scales. Merging gives s v(c), unpacked in the base's dtype.
`mezo+peqa` estimates for scales that train, without the clip and the bound at zero.

Paper: Shang et al. 2025, "Fine-tuning Quantized Neural Networks with Zeroth-order Optimization", arXiv:2505.13430: C =
100, eps 1e-3, rates of 1e-7 to 1e-5. Deviations: scales are float32; `relative` and `seeds` are ours.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import sites, tree, zeroth_order
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError, Notice
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Context
from jaxpeft.quant import Affine, dense, dot, matrix, merged
from jaxpeft.zeroth_order import OWN, Settings
from pallas_kernels.packed import Packed, decoded

NOISE = 0.25  # of a weight, from which on its evaluations are of another model
_LEAF = "/qzo/scales"


def scales_of(kernel: Packed | Affine) -> jax.Array:
    """s (G, m) float32 of one kernel."""
    return (decoded(kernel) if isinstance(kernel, Packed) else kernel).scales.astype(jnp.float32)


def with_scales(kernel: Any, scales: jax.Array) -> Any:
    """The same codes with other scales (..., G, m)."""
    if isinstance(kernel, Affine):
        return kernel.with_scales(scales)
    return dataclasses.replace(kernel, scales=scales, block_scales=None, mean=None)


class QZO(nn.Module):
    """The product with scales that move. Parameter: scales (G, m), float32."""

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        if not site.plain:
            raise InputError("qzo: must be nearest to the kernel, whose scales it moves: name it last in the chain")
        kernel = matrix(site.kernel)
        moved = with_scales(kernel, self.param("scales", lambda key: scales_of(kernel)))
        return dot(x, moved) if site.through is None else site.through(x, dense(moved, x.dtype))


def qzo(
    targets: Targets = "all-linear",
    eps: float = 1e-3,
    clip: float | None = 100.0,
    relative: bool = False,
    seeds: int = 1,
) -> Method:
    """QZO on the sites that `targets` chooses, whose kernels are packed.

    Args:
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      eps: how far the two evaluations lie from the scales.
      clip: C, the largest derivative along z, of either sign; None does not clip.
      relative: perturb and move scales in proportion to themselves.
      seeds: directions per step, each of two evaluations, whose estimates, clipped one by one, are averaged.

    Returns:
      The method; it moves `<site>/qzo/scales` (L, G, m).

    Raises:
      InputError: for an eps or a clip that is not above 0, no seeds, targets that match nothing, or a kernel that is
        not packed. When a step is traced: for a chain in which something else trains, or a step without a learning rate
        of its own.
    """
    config = dict(locals())
    if clip is not None and not clip > 0:
        raise InputError(f"qzo: clip {clip} must be above 0, or null")

    def choose(params):
        flat = tree.flatten(params)
        found = sites.find(params, targets, "qzo")
        for site in found:
            if not isinstance(matrix(flat[f"{site}/kernel"]), Packed | Affine):
                raise InputError(
                    f"qzo: {site} is not quantized; put quantize before it, as quantize+qzo, or name others"
                )
        return found

    def merge(params):
        flat = tree.flatten(params)
        plain = {path: leaf for path, leaf in flat.items() if not path.endswith(_LEAF)}
        for path, scales in flat.items():
            if path.endswith(_LEAF):
                at = f"{path.removesuffix(_LEAF)}/kernel"
                kernel = with_scales(matrix(flat[at]), scales)
                plain[at] = merged(flat[at], dense(kernel, kernel.dtype))
        return tree.unflatten(plain)

    def forward(model, view):
        adapted = sites.attach(model, "qzo", lambda site: QZO(), choose)

        def init(key, params):
            params = adapted.init(key, params)
            if not relative:
                _say_where_noise_is_larger(params, eps)
            return params

        return adapted._replace(init=init)

    settings = Settings(
        "qzo", eps, seeds, relative=relative, clip=math.inf if clip is None else clip, floor=0.0, others=False
    )
    return zeroth_order.estimated(settings)._replace(
        forward=forward,
        roles=trains(lambda path: path.endswith(_LEAF), OWN),
        merge=merge,
        specs=(Spec("qzo", config),),
    )


def _say_where_noise_is_larger(params: tree.Params, eps: float) -> None:
    """Warns of kernels of which eps is more than `NOISE` of most scales."""
    scales = {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith(_LEAF)}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in scales.values()):
        return
    if small := [path for path, leaf in scales.items() if NOISE * jnp.median(leaf) < eps]:
        least = min(float(jnp.median(scales[path])) for path in small)
        warnings.warn(
            f"qzo: eps {eps:g} is more than {NOISE:g} of most scales of {len(small)} of {len(scales)} kernels, such as "
            f"{small[0].removesuffix(_LEAF)} (the least median is {least:.1e}): the evaluations are far from the "
            "model; give a smaller eps, or relative=true",
            Notice,
            stacklevel=2,
        )


ABOUT = About(
    summary="the scales of a quantized base, by two forward passes; its integers stay as they are",
    level="site",
    trains="one scale per group of inputs, float32, beside codes of 2 to 8 bits",
    saves="the kernels' bytes but 2 to 8 bits per number, and all that a forward pass does not need",
    reference="Shang et al. 2025, arXiv:2505.13430",
    example={},
    promises=Promises(backward=False, state=zeroth_order.state_numbers, starts_at_base=False, falls=0.01, lr=1e-2),
    defaults=Defaults(lr=1e-6, weight_decay=0.0, direction="sgd"),
    within="quantize+qzo",
)
