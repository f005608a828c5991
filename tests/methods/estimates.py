"""MeZO's z and losses in numpy and on whole leaves, to hold what estimates a gradient against."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erfinv

import jaxpeft as jp
from jaxpeft import noise, tree
from jaxpeft.train.optimizer import make_direction
from tests import tiny

BATCH, EPS, RATE = tiny.batch(), 1e-2, 1e-3
RUN = jax.random.key(1)
SGD = make_direction("sgd")


def hashed(h):
    h = np.asarray(h, np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def z_of(words, path, shape):
    """A leaf's z in float64, layer by layer."""

    def one(keys, shape):
        bits = hashed(hashed(np.arange(np.prod(shape), dtype=np.uint32) + keys[0]) ^ keys[1])
        return np.sqrt(2) * erfinv((2 * (bits >> np.uint32(9)).astype(np.float64) + 1) / 2**23 - 1).reshape(shape)

    keys = hashed(words ^ np.uint32(zlib.crc32(path.encode())))
    if not tree.stacked(path):
        return one(keys, shape)
    first = int((*path.split("/")[0].split("_"), "0")[1])
    return np.stack([one(hashed(keys + np.uint32(1 + first + layer)), shape[1:]) for layer in range(shape[0])])


def z_of_step(leaves, step=0):
    words = np.asarray(noise.draw(jax.random.fold_in(RUN, step))).view(np.uint32)
    return {path: z_of(words, path, leaf.shape) for path, leaf in leaves.items()}


def start(method, dtype=jnp.float32, **changes):
    model, trainable, rest = jp.setup(method, *tiny.model(dtype, **changes), jax.random.key(0))
    return model, jp.init_state(method, SGD, trainable, rest, RUN, model)


def by_hand(model, state, leaves, z):
    """(mean of both losses, slope) of whole leaves at theta +- eps z."""
    loss = jax.jit(lambda leaves: jp.completion_loss(model, tree.unflatten({**state.leaves, **leaves}), BATCH)[0])
    up, down = (
        float(loss({path: jnp.float32(leaf + sign * EPS * z[path]) for path, leaf in leaves.items()}))
        for sign in (1, -1)
    )
    return (up + down) / 2, (up - down) / (2 * EPS)
