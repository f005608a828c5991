"""RMSNorm with a derivative of its own: besides scale, the backward pass needs x and a float32 per token.

    y = x / sqrt(mean(x^2) + epsilon) * scale       over the last axis; Zhang & Sennrich 2019, arXiv:1910.07467

Autodiff of the formula keeps x in float32, which is 4 d bytes per token (16 KB for Llama-2-7B), two float32 more, and,
where scale trains, the rounded x / r. Here it is x itself, 2 d bytes in bfloat16, which the layers keep anyway.

There is no kernel: for an H200 the gradient of x compiles to two loops over x and dy, one for the mean and one for dx,
with 8 bytes of temporaries per token. In a layer they also sum the products that yield dy, write y again where a plan
wants it, and add the gradient that goes around the norm; for a TPU the first is part of a product. A kernel that holds
a row on the chip would read x and dy once instead of twice: 4 d bytes per token, which for both norms of a layer of
Llama-2-7B take 1 % of the time of its products at best, and those sums would need a loop of their own.

Shapes: x and y (..., d), scale (d,).
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels.rms_norm import reference

__all__ = ["rms_norm"]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm over the last axis, computed in float32.

    Args:
      x: (..., d).
      scale: (d,), of any floating dtype; it is rounded to x's.
      epsilon: added to the mean of the squares.

    Returns:
      (..., d) in x's dtype.

    Raises:
      ValueError: if scale is not of shape (d,).
    """
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale of shape {scale.shape} for x of shape {x.shape}: it must be {x.shape[-1:]}")
    return _rms_norm(x, scale, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale, epsilon):
    return reference.forward(x, scale, epsilon)[0]


def _keep(x, scale, epsilon):
    y, inverse = reference.forward(x, scale, epsilon)
    return y, (x, scale, inverse)


def _pull(epsilon, saved, dy):
    x, scale, inverse = saved
    return reference.backward(x, scale, inverse, dy)


_rms_norm.defvjp(_keep, _pull)
