"""Leaves that lie in the host's memory, pinned, while the device computes: whoever takes a layer of one brings it over.

JAX knows of each array, and of each value that it traces, in which of the two memories it lies. A method says by its
role which leaves lie in the host's (`jaxpeft.method.Role`): they are read there, `init_state` puts there what is not,
and a step leaves them there. On a CPU both memories are the same, and programs are those of devices.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
_KIND = "pinned_host"


def holds(x: Any) -> bool:
    """Whether an array, or a value that is traced, lies in the host's memory."""
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == HOST


def put(x: Any) -> Any:
    """The arrays in the host's memory."""
    return jax.tree.map(lambda x: x if holds(x) else jax.device_put(x, HOST), x)


def fetched(x: Any) -> Any:
    """The arrays on the device; what is there stays as it is."""
    return jax.tree.map(lambda x: jax.device_put(x, DEVICE) if holds(x) else x, x)


def row(stack: Any, index: int) -> Any:
    """A layer of a stack; on the device, where the stack lies in the host's memory."""
    return _row(stack, index) if holds(stack) else stack[index]


@jax.jit
def _row(stack: jax.Array, index: Any) -> jax.Array:
    return fetched(jax.lax.dynamic_index_in_dim(stack, index, keepdims=False))


def of(where: Sharding) -> Sharding:
    """The sharding, in the host's memory."""
    return where.with_memory_kind(_KIND)


def beside(device: jax.Device) -> Sharding:
    """That of an array in the host's memory of one device."""
    return of(SingleDeviceSharding(device))


def typed(x: Any) -> Any:
    """The arrays, those in the host's memory known to lie there: JAX makes some of which the sharding alone says so."""
    return jax.tree.map(lambda x: put(x) if x.sharding.memory_kind == _KIND else x, x)
