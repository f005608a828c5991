"""What is done with an activation that a layer keeps for its backward pass: how it is stored, and read again."""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp

from jaxpeft.backward.compressed import compress, decompress
from jaxpeft.backward.four_bits import quarter, whole
from jaxpeft.backward.places import empty
from jaxpeft.backward.plan import CODES
from jaxpeft.backward.programs import Kept
from jaxpeft.backward.twelve_bits import lengthen, shorten


def seed_of(step, key):
    """() uint32 that differs from step to step, and from call to call where there is a key."""
    if key is None:
        return step.astype(jnp.uint32)
    return jax.random.bits(jax.random.fold_in(key, step), (), jnp.uint32)


def store(x, action: str, name: Kept, seed):
    """An activation as it is kept; `seed` is that of its rounding."""
    if action in ("compress", "compress4"):
        own = seed ^ jnp.uint32(zlib.crc32(f"{name[0]}/{name[1]}".encode()))
        return compress(x, own) if action == "compress" else quarter(x, own)
    if action == "compress12":
        return shorten(x)
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
    if action not in CODES or not has_codes(shape):
        return shape
    if action == "compress12":
        return jax.eval_shape(shorten, shape)
    make = compress if action == "compress" else quarter
    return jax.eval_shape(make, shape, jax.ShapeDtypeStruct((), jnp.uint32))


def fetch(kept, step, action: str, name: Kept, shape):
    """A step's activation, of those that all steps have kept."""
    with jax.named_scope(f"read:{name[0]}"):
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step, keepdims=False), kept)
        if action == "compress":
            return decompress(own, shape.dtype)
        if action == "compress4":
            return whole(own, shape.dtype)
        if action == "compress12":
            return lengthen(own, shape.dtype)
        return jax.device_put(own, jax.memory.Space.Device) if action == "offload" else own
