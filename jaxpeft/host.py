"""Leaves that lie in the host's memory, pinned, while the device computes: whoever takes a layer of one brings it over.

JAX knows of each array, and of each value that it traces, in which of the two memories it lies. A method says by its
role which leaves lie in the host's (`jaxpeft.method.Role`): they are read there, `init_state` puts there what is not,
and a step leaves them there. On a CPU both memories are the same, and programs are those of devices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"


def holds(x: Any) -> bool:
    """Whether an array, or a value that is traced, lies in the host's memory."""
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == HOST


def put(x: Any) -> Any:
    """The arrays in the host's memory."""
    return jax.tree.map(lambda x: x if holds(x) else jax.device_put(x, HOST), x)


def fetched(x: Any) -> Any:
    """The arrays on the device; what is there stays as it is."""
    return jax.tree.map(lambda x: jax.device_put(x, DEVICE) if holds(x) else x, x)


def copied(x: Any) -> Any:
    """An array of its own, where it lies."""
    return put(jnp.copy(fetched(x))) if holds(x) else jnp.copy(x)


def row(stack: Any, index: int) -> Any:
    """A layer of a stack; on the device, where the stack lies in the host's memory."""
    return _row(stack, index) if holds(stack) else stack[index]


@jax.jit
def _row(stack: jax.Array, index: Any) -> jax.Array:
    return fetched(jax.lax.dynamic_index_in_dim(stack, index, keepdims=False))


def of(where: Sharding) -> Sharding:
    """The sharding, in the host's memory."""
    return where.with_memory_kind(KIND)


def beside(device: jax.Device) -> Sharding:
    """That of an array in the host's memory of one device."""
    return of(SingleDeviceSharding(device))


def typed(x: Any) -> Any:
    """The arrays, those in the host's memory known to lie there: JAX makes some of which the sharding alone says so."""
    return jax.tree.map(lambda x: put(x) if x.sharding.memory_kind == KIND else x, x)


def repeated(row: Any, count: int) -> Any:
    """(count, ...), all layers like the one of `row` (1, ...), in the host's memory; a device never holds all."""
    if isinstance(row, jax.core.Tracer):
        return put(jnp.broadcast_to(row, (count, *row.shape[1:])))
    whole = np.broadcast_to(np.asarray(row), (count, *row.shape[1:]))
    return typed(jax.device_put(whole, beside(next(iter(row.devices())))))


def chosen(condition: Any, fresh: Any, old: Any) -> Any:
    """`where(condition, fresh, old)`; in the host's memory layer by layer, and nothing is done where it is not so.

    fresh: of the old one's shape, or (1, ...), like which all layers begin.
    """
    if not holds(old):
        return jnp.where(condition, fresh, old)
    if jnp.ndim(old) == 0:
        return put(jnp.where(condition, fresh, fetched(old)))

    def layer(i, stack):
        row = jax.lax.dynamic_slice_in_dim(fresh, 0 if len(fresh) == 1 else i, 1)
        return jax.lax.dynamic_update_slice_in_dim(stack, put(row), i, 0)

    return jax.lax.fori_loop(0, jnp.where(condition, len(old), 0), layer, old)
