"""What is done with an activation that a layer keeps for its backward pass: how it is stored, and read again."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft.backward.compressed import compress, decompress
from jaxpeft.backward.four_bits import quarter, whole
from jaxpeft.backward.places import empty
from jaxpeft.backward.plan import is_code, share_of
from jaxpeft.backward.programs import Kept
from jaxpeft.backward.pruned import prune, spread
from jaxpeft.backward.twelve_bits import lengthen, shorten


class Code(NamedTuple):
    """How an array is stored that is not stored as it is.

    encode: (x, seed of its rounding) -> what is kept, a tree of arrays.
    decode: (what is kept, shape and dtype of x) -> x, as the backward pass reads it.
    """

    encode: Callable[[jax.Array, jax.Array], Any]
    decode: Callable[[Any, Any], jax.Array]


_CODES = {
    "compress": Code(compress, lambda kept, x: decompress(kept, x.dtype)),
    "compress12": Code(lambda x, seed: shorten(x), lambda kept, x: lengthen(kept, x.dtype)),
    "compress4": Code(quarter, lambda kept, x: whole(kept, x.dtype)),
}


def code_of(action: str) -> Code:
    """That of an action that changes what is stored."""
    if action in _CODES:
        return _CODES[action]
    return Code(lambda x, seed: prune(x, share_of(action)), lambda kept, x: spread(kept, x.shape[-1], x.dtype))


def seed_of(step, key):
    """() uint32 that differs from step to step, and from call to call where there is a key."""
    if key is None:
        return step.astype(jnp.uint32)
    return jax.random.bits(jax.random.fold_in(key, step), (), jnp.uint32)


def store(x, action: str, name: Kept, seed):
    """An activation as it is kept; `seed` is that of its rounding."""
    if is_code(action):
        return code_of(action).encode(x, seed ^ jnp.uint32(zlib.crc32(f"{name[0]}/{name[1]}".encode())))
    return jax.device_put(x, jax.memory.Space.Host) if action == "offload" else x


def has_codes(shape) -> bool:
    """Whether there are codes for an array: of floats, with tokens and channels."""
    return jnp.issubdtype(shape.dtype, jnp.floating) and len(shape.shape) > 1


def room(shape, action: str, steps: int):
    """Where all steps' values are written; None for what is offloaded."""
    if action == "offload":
        return None
    return jax.tree.map(lambda x: empty((steps, *x.shape), x.dtype), stored(shape, action))


@functools.cache
def stored(shape, action: str):
    """Shapes of an activation as it is kept."""
    if not is_code(action) or not has_codes(shape):
        return shape
    return jax.eval_shape(code_of(action).encode, shape, jax.ShapeDtypeStruct((), jnp.uint32))


def fetch(kept, step, action: str, name: Kept, shape):
    """A step's activation, of those that all steps have kept."""
    with jax.named_scope(f"read:{name[0]}"):
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step, keepdims=False), kept)
        if is_code(action):
            return code_of(action).decode(own, shape)
        return jax.device_put(own, jax.memory.Space.Device) if action == "offload" else own
