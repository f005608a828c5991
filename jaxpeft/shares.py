"""A process's share of what all processes hold together: of a batch, of weights; and how it gets to see the whole.

With one process all of it is that one's, and the functions are `jax.device_put` and `np.asarray`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxpeft import distributed, host, sharding

Index = tuple[slice, ...]


def make_mesh(asked: str | None) -> Mesh | None:
    """The mesh that is asked for, as `sharding.make_mesh` reads it.

    Fsdp over all devices where nothing is divided but weights ("auto"; with a batch `sharding.auto` chooses), and for
    several processes that ask for none.
    """
    if asked == "auto" or (asked is None and distributed.group() is not None):
        asked = f"fsdp={jax.device_count()}"
    return None if asked is None else sharding.make_mesh(asked)


def placement(mesh: Mesh | None, away: Callable[[str], bool] = lambda path: False) -> Callable[[str, Any], Any]:
    """Where a base's leaves lie, for `hf.load_pretrained`.

    Args:
      mesh: that they are divided over; None: one device.
      away: path -> whether the leaf lies in the host's memory.
    """

    def where(path: str, leaf: Any) -> Any:
        if mesh is None:
            return host.beside(jax.devices()[0]) if away(path) else None
        there = sharding.of_leaves(mesh, {path: leaf}, {path})[path]
        return jax.tree.map(host.of, there) if away(path) else there

    return where


class Rows(NamedTuple):
    """Rows of a batch that a process's devices hold.

    total: rows of the whole batch.  here: int64 (n,), numbers of those that are held here, ascending.
    """

    total: int
    here: npt.NDArray[np.int64]


def rows_of(mesh: Mesh | None, total: int) -> Rows | None:
    """Of a batch of `total`, the rows that this process holds; None: all of them."""
    if mesh is None or _by_rows(mesh).is_fully_addressable:
        return None
    parts = _by_rows(mesh).addressable_devices_indices_map((total,)).values()
    return Rows(total, np.unique(np.concatenate([np.arange(total)[index] for index in parts if index is not None])))


def batch_of(mesh: Mesh | None, batch: Mapping[str, Any], rows: Rows | None) -> Mapping[str, Any]:
    """A batch on the mesh, of the arrays of this process's rows."""
    if mesh is None:
        return batch
    shapes = shapes_of(batch, rows)
    where = sharding.of_batch(mesh, shapes)
    if rows is None:
        return jax.device_put(batch, where)

    def put(name: str, array: Any) -> jax.Array:
        def part(index: Index) -> Any:
            first, stop, _ = index[0].indices(rows.total)
            at = np.searchsorted(rows.here, [first, stop])
            return array[(slice(*at), *index[1:])]

        return jax.make_array_from_callback(shapes[name].shape, where[name], part)

    return {name: put(name, array) for name, array in batch.items()}


def whole_batches(mesh: Mesh | None, batches: Callable[[], Iterable[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Batches of which every process has all rows, on the mesh."""
    for batch in batches():
        yield dict(batch) if mesh is None else placed(dict(batch), sharding.of_batch(mesh, batch))


def shapes_of(batch: Mapping[str, Any], rows: Rows | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a whole batch, from this process's rows of it."""
    count = {} if rows is None else {"count": rows.total}
    return {
        name: jax.ShapeDtypeStruct((count.get("count", array.shape[0]), *array.shape[1:]), array.dtype)
        for name, array in batch.items()
    }


def _by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(sharding.ROWS))


def placed(tree: Any, shardings: Any) -> Any:
    """Arrays put where shardings say; of several processes each has the same ones, or those that lie there already."""
    return jax.tree.map(_placed, tree, shardings)


def _placed(x: Any, where: Sharding) -> Any:
    if isinstance(x, jax.Array) and x.sharding == where:
        return x
    if where.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, where)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _placed(jax.random.key_data(x), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return made(whole.shape, where, lambda index: whole[index])


def made(shape: tuple[int, ...], where: Sharding, part: Callable[[Index], npt.NDArray[Any]]) -> jax.Array:
    """An array of whose parts each is made once, and only those that this process's devices hold.

    Args:
      shape: of the whole.
      where: its sharding.
      part: its values at an index, slices of all axes.
    """
    found: dict[tuple[tuple[int, int, int], ...], Any] = {}

    def one(index: Index) -> Any:
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        if key not in found:
            found[key] = part(tuple(slice(first, stop) for first, stop, _ in key))
        return found[key]

    return host.typed(jax.make_array_from_callback(shape, where, one))


def on_host(x: Any) -> np.ndarray:
    """The values of an array that lies anywhere; of several processes all have to ask at once, and all are given it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def all_on_host(tree: Any) -> Any:
    """`on_host` of each array."""
    return jax.tree.map(on_host, tree)


class Largest:
    """The largest of numbers that the processes have, without waiting for it: an operation of the devices.

    Args:
      mesh: over the devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._devices = math.prod(mesh.devices.shape)
        self._where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, number: int) -> jax.Array:
        """() int32, on its way."""
        own = np.full((1,), number, np.int32)
        return self._largest(jax.make_array_from_callback((self._devices,), self._where, lambda index: own))
