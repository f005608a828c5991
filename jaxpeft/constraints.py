"""What a program says of its arrays' places where it is traced under a mesh (`jax.set_mesh`); without one, nothing.

XLA's partitioner could not know four things from the places of the arguments (`jaxpeft.sharding`): the stream between
blocks is divided by rows and tokens alone (`rows`); a layer's matrices are gathered over `fsdp` where the layer is
taken from its stack, one layer at a time (`gathered`); a chunk of the loss takes tokens of every device (`shards`); and
operations that have kernels run in a `shard_map` (`of_product`, `of_attention`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxpeft import host, tree
from jaxpeft.sharding import AS_HEAD, AXES, ROWS, TIED, TOKENS, divisible, each, num_shards, spec_of, spec_of_name
from pallas_kernels.divided import Divided
from pallas_kernels.stacked import taken


def _mesh() -> Any:
    """The mesh under which a program is traced; None where there is none of these axes, all left to the compiler.

    In a `shard_map` they are not, nor where they are a part of the arrays' types (`AxisType.Explicit`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = set(AXES) <= set(mesh.axis_names) and set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    return mesh if known and mesh.size > 1 else None


def divides() -> bool:
    """Whether the compiler divides what is traced over the devices of a mesh."""
    return _mesh() is not None


def shards(rows: int, tokens: int) -> tuple[int, int]:
    """Parts into which a batch (B, S) is divided: of its rows, and of each row's tokens; 1 of what is no multiple."""
    mesh = _mesh()
    if mesh is None:
        return 1, 1
    parts = (num_shards(mesh), rows), (mesh.shape[TOKENS], tokens)
    across, along = (count if size % count == 0 else 1 for count, size in parts)
    return across, along


def rows(x: Any) -> Any:
    """Arrays (B, S, ...) or (B, ...), divided by rows and tokens and nothing else."""
    return jax.tree.map(lambda x: _along(x, ROWS, TOKENS if x.ndim > 2 else None), x)


def chunks(x: Any) -> Any:
    """An array (chunks, tokens of a chunk, ...), each chunk of tokens of every device."""
    return _along(x, None, (*ROWS, TOKENS))


def _along(x, *axes):
    mesh = _mesh()
    if mesh is None:
        return x
    found = [axes if divisible(mesh, size, axes) else None for size, axes in zip(x.shape, axes, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*found)) if any(found) else x


def _whole(axes):
    """Without `fsdp`."""
    if axes is None or isinstance(axes, str):
        return axes if axes != "fsdp" else None
    return tuple(axis for axis in axes if axis != "fsdp") or None


def looked_up(x: jax.Array) -> jax.Array:
    """Rows (B, S, d) of a table that lies by columns: they are made by columns too, and then divided as `rows` are."""
    mesh = _mesh()
    if mesh is None or x.ndim != 3 or max(mesh.shape["fsdp"], mesh.shape["tensor"]) == 1:
        return x
    if not divisible(mesh, x.shape[0], ROWS):  # a prompt
        return x
    for by_row, by_column in (("data", ("fsdp", "tensor")), ("data", "fsdp"), (ROWS, None)):
        x = _along(x, by_row, TOKENS, by_column)
    return x


_site: contextvars.ContextVar[str] = contextvars.ContextVar("site", default="")


@contextlib.contextmanager
def at(path: str) -> Iterator[None]:
    """What is traced inside computes with the kernel of this path."""
    token = _site.set(path)
    try:
        yield
    finally:
        _site.reset(token)


def of_product(x: jax.Array) -> Divided | None:
    """How the product of x (B, S, n) with the kernel of the site (`at`) is divided: b, s, n and its outputs m."""
    mesh, path = _mesh(), _site.get()
    if mesh is None or x.ndim != 3 or not path or not divisible(mesh, x.shape[0], ROWS):
        return None
    n, m = spec_of_name(f"{path}/kernel") or (None, None)
    return _divided(mesh, b=ROWS, s=TOKENS, n=n if n != "fsdp" else None, m=m if m != "fsdp" else None)


def of_attention() -> Divided | None:
    """How attention is divided: b, s and its heads h."""
    mesh = _mesh()
    return None if mesh is None else _divided(mesh, b=ROWS, s=TOKENS, h="tensor")


def _divided(mesh, **axes) -> Divided:
    named = {letter: (names,) if isinstance(names, str) else names or () for letter, names in axes.items()}
    more = {letter: tuple(name for name in names if mesh.shape[name] > 1) for letter, names in named.items()}
    return Divided(mesh, tuple((letter, names) for letter, names in sorted(more.items()) if names))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(divided: PartitionSpec, whole: PartitionSpec, x: jax.Array) -> jax.Array:
    """x, whole; its cotangent is divided as x is, and never asked for whole: so what sums it up may scatter it."""
    return _constrained(divided, whole, x)


def _constrained(divided, whole, x):
    x = jax.lax.with_sharding_constraint(x, divided)
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(divided, whole, x):
    return _gather(divided, whole, x), None


def _gather_backward(divided, whole, _, cotangent):
    del whole
    return (jax.lax.with_sharding_constraint(cotangent, divided),)


_gather.defvjp(_gather_forward, _gather_backward)


def gathers() -> bool:
    """Whether a layer's matrices are gathered where it is taken."""
    mesh = _mesh()
    return mesh is not None and mesh.shape["fsdp"] > 1


def gathered(params: tree.Params, segment: str = "", wanted: Callable[[str], Any] = lambda path: True) -> tree.Params:
    """Nested parameters, whole over `fsdp`: those of one layer of a segment, or those beside the layers.

    wanted: of a path, whether its leaf is to be gathered; the others are as they are. What lies in the host's memory
      comes to the device.
    """
    mesh, params = _mesh(), host.fetched(params)
    axes = ("fsdp",) if segment else ("fsdp", "tensor")  # a table moves to where it is a head
    if mesh is None or not isinstance(params, Mapping) or all(mesh.shape[axis] == 1 for axis in axes):
        return params
    flat = {f"{segment}/{path}" if segment else path: taken(leaf) for path, leaf in tree.flatten(params).items()}
    shapes = {path: leaf.shape for path, leaf in flat.items()}

    def put(x, spec):
        if not any(spec):
            return x
        divided, whole = PartitionSpec(*spec), PartitionSpec(*map(_whole, spec))
        # A head's gradient adds up over the chunks of the loss: it is summed over the devices once, at their end.
        return _gather(divided, whole, x) if segment else _constrained(divided, whole, x)

    specs = {path: AS_HEAD if path == TIED else spec_of(path, shapes) for path in flat}
    found = {path: each(mesh, leaf, specs[path], 0, put) if wanted(path) else leaf for path, leaf in flat.items()}
    return tree.unflatten({path.removeprefix(f"{segment}/"): leaf for path, leaf in found.items()})
