"""Adam whose moments are 8-bit codes, block by block (Dettmers et al. 2022, arXiv:2110.02861).

    m = b1 m + (1 - b1) g         direction = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    v = b2 v + (1 - b2) g^2

    of each moment, in blocks of 256 numbers x along the flattened leaf:
        absmax = max |x|          code = the value of the dynamic map nearest to x / absmax       x ~ map[code] absmax

A step decodes the moments, makes its direction of them in float32, and only then rounds them: of its own gradient
nothing is lost. m has the signed map, v the unsigned one. Both have 7 decades, each with twice the values of the one
below.

Blocks, maps and rounding are those of bitsandbytes 0.50 on a CPU, code for code: x / absmax is rounded to one of 65536
numbers from -1 to 1 first, so that no v becomes zero beside a larger one, and no step is divided by nearly nothing.
Deviation: an exact zero stays zero, where bitsandbytes makes it 1.5e-5 absmax; rows of a table that no token has named
would drift. A leaf below 4096 numbers keeps its moments in float32, as there.

A large leaf's moments are decoded a layer, or some rows, at a time: in float32 they are never whole. The direction
takes the gradient's place.

The leaves of a stack are one parameter for each layer, as a list of layers would be: no block has numbers of two, and
the 4096 are a layer's.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import constraints, tree

BLOCK = 256
LEAST = 4096  # numbers of a leaf whose moments are codes
PART = 2**20  # numbers of a leaf that are decoded at a time, or a layer's if these are more
_GRID = 65536


class Codes(NamedTuple):
    """A moment in 8 bits.

    codes: uint8, in the leaf's shape.
    absmax: float32, one for each block: the leaf's shape with its last axes divided, or (blocks,) behind the layers.
    """

    codes: jax.Array
    absmax: jax.Array


class Adam8bitState(NamedTuple):
    """count: () int32, steps done.  mu, nu: {path: Codes, or the moment in float32}."""

    count: jax.Array
    mu: dict[str, Any]
    nu: dict[str, Any]


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The map's 256 values, ascending, float32."""
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        edges = _linspace(count + 1)
        side = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*side, *(-side if signed else ())]
    return np.array(sorted(values + [0.0] * (256 - len(values))), np.float32)


def _linspace(count: int) -> np.ndarray:
    """`count` numbers from 0.1 to 1 in float32, from both ends to the middle, each rounded once."""
    first, last = np.float32(0.1), np.float32(1)
    step, i = np.float64((last - first) / np.float32(count - 1)), np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


@functools.cache
def _nearest(signed: bool) -> np.ndarray:
    """(65536,) uint8: the code of each number of the grid; of two that are as near the lower one."""
    values, two = dynamic_map(signed), np.float32(2)
    grid = two * np.arange(_GRID, dtype=np.float32) / np.float32(_GRID - 1) - np.float32(1)
    return np.searchsorted((values[1:] + values[:-1]) / two, grid).astype(np.uint8)


def _blocks(shape: tuple[int, ...], lead: int) -> tuple[int, ...] | None:
    """The shape of the blocks of a leaf with `lead` axes of layers; None where they don't fit its last axes.

    So they lie on a mesh as the leaf does.
    """
    n, m = (1, *shape[lead:])[-2:]
    if m % BLOCK == 0:
        return (*shape[:-1], m // BLOCK)
    if BLOCK % m == 0 and n * m % BLOCK == 0:
        return (*shape[:-2], n * m // BLOCK, 1)
    return None


def _cut(x: jax.Array, lead: int) -> jax.Array:
    """(..., 256), the blocks of a leaf; the last one ends with zeros where they don't fit."""
    if (blocks := _blocks(x.shape, lead)) is not None:
        return x.reshape(*blocks, BLOCK)
    flat = x.reshape(*x.shape[:lead], -1)
    return jnp.pad(flat, [(0, 0)] * lead + [(0, -flat.shape[-1] % BLOCK)]).reshape(*x.shape[:lead], -1, BLOCK)


def _joined(blocks: jax.Array, shape: tuple[int, ...], lead: int) -> jax.Array:
    if _blocks(shape, lead) is None:
        blocks = blocks.reshape(*shape[:lead], -1)[..., : math.prod(shape[lead:])]
    return blocks.reshape(shape)


def encode(x: jax.Array, signed: bool, lead: int = 0) -> Codes:
    """x (..., n, m) float32 in 8 bits; `lead` axes are of layers."""
    blocks = _cut(x, lead)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    share = blocks / jnp.where(absmax > 0, absmax, 1)[..., None]
    place = ((share + 1) * 0.5 * (_GRID - 1) + 0.5).astype(jnp.int32)
    zero = int(np.flatnonzero(dynamic_map(signed) == 0)[0])
    codes = jnp.where(blocks == 0, jnp.uint8(zero), jnp.asarray(_nearest(signed))[place])
    return Codes(_joined(codes, x.shape, lead), absmax)


def decode(moment: Codes, signed: bool, lead: int = 0) -> jax.Array:
    """float32, in the leaf's shape."""
    values = jnp.asarray(dynamic_map(signed))[moment.codes.astype(jnp.int32)]
    return _joined(_cut(values, lead) * moment.absmax[..., None], values.shape, lead)


def _in_parts(function: Any, arrays: Any, lead: int) -> Any:
    """function(*arrays) of equal parts of their axis 0, one after the other; results take the arrays' places."""
    leaf, absmax = arrays[0], arrays[1].absmax
    most = max(leaf.size // PART, 1)
    if lead:
        parts = len(leaf) if most > 1 else 1
    elif constraints.divides() or _blocks(leaf.shape, 0) is None:  # rows may lie on several devices; blocks cross them
        parts = 1
    else:
        parts = max(k for k in range(1, min(most, len(leaf)) + 1) if len(leaf) % k == len(absmax) % k == 0)
    if parts == 1:
        return function(*arrays)

    def body(i, arrays):
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * (len(x) // parts), len(x) // parts)
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i * (len(x) // parts), 0)
        return jax.tree.map(put, arrays, function(*jax.tree.map(part, arrays)))

    return jax.lax.fori_loop(0, parts, body, arrays)


def scale_by_adam8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction over flat leaves, of moments in 8 bits.

    Args:
      b1, b2: what of each moment a step keeps.
      eps: added to the root of the second.
    """

    def init(params):
        def zeros(path, leaf):
            lead = int(tree.layered(path))
            if math.prod(leaf.shape[lead:]) < LEAST:
                return jnp.zeros(leaf.shape, jnp.float32)
            like = jax.eval_shape(functools.partial(encode, signed=True, lead=lead), leaf)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

        mu, nu = ({path: zeros(path, leaf) for path, leaf in params.items()} for _ in range(2))
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        first, second = (1 - jnp.float32(b) ** count.astype(jnp.float32) for b in (b1, b2))
        directions, mu, nu = {}, {}, {}

        def wide(gradient, m, v):
            g = gradient.astype(jnp.float32)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            return (m / first / (jnp.sqrt(v) / jnp.sqrt(second) + eps)).astype(gradient.dtype), m, v

        def coded(gradient, m, v, lead):
            direction, m, v = wide(gradient, decode(m, True, lead), decode(v, False, lead))
            return direction, encode(m, True, lead), encode(v, False, lead)

        for path, gradient in grads.items():
            m, v, lead = state.mu[path], state.nu[path], int(tree.layered(path))
            if isinstance(m, Codes):
                found = _in_parts(functools.partial(coded, lead=lead), (gradient, m, v), lead)
            else:
                found = wide(gradient, m, v)
            directions[path], mu[path], nu[path] = found
        return directions, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)
