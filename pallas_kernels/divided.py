"""An operation on a mesh: how its dimensions are divided over the axes, and the operation on each device's part.

A kernel is a custom call, which XLA's partitioner cannot divide. What traces a product under a mesh knows how its
operands lie (`Divided`: letter of a dimension -> axes of the mesh), and an operation knows the letters of its arguments
and results (`Dims`). With both it is lowered as a `shard_map` around the same operation, on arrays of one device; a
result that sums over a divided dimension is summed over that dimension's axes. The operation itself stays one equation
of the program, so that plans see what they see without a mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from pallas_kernels.packed import Packed
from pallas_kernels.stacked import Stacked


class Divided(NamedTuple):
    """Over which axes of a mesh the dimensions of an operation are divided.

    mesh: of which all axes are the compiler's (`AxisType.Auto`).
    axes: (letter, axes) of each dimension that is divided.
    """

    mesh: AbstractMesh
    axes: tuple[tuple[str, tuple[str, ...]], ...]

    def of(self, letters: str) -> tuple[str, ...]:
        """The axes over which dimensions are divided, all together."""
        found = dict(self.axes)
        return tuple(axis for letter in letters for axis in found.get(letter, ()))

    def count(self, letters: str) -> int:
        """Parts into which they are divided."""
        return math.prod(self.mesh.shape[axis] for axis in self.of(letters))

    def renamed(self, **letters: str) -> Divided:
        """The same of an operation that calls dimensions otherwise: new letter = old one; "" where it is whole."""
        known = dict(self.axes)
        kept = {letter: axes for letter, axes in self.axes if letter not in letters}
        kept |= {new: known[old] for new, old in letters.items() if old in known}
        return self._replace(axes=tuple(sorted(kept.items())))


class Dims(NamedTuple):
    """The dimensions of an operation's arguments and results, a letter each.

    Of arrays in a stack, the last ones; of arrays with fewer dimensions than letters, none.

    args: per argument, letters, or a tuple of letters for one that is a tuple of arrays.
    results: per result, letters.
    sums: per result, the letters over which it sums.
    local: (run, divided, *args, **static) -> results, on one device inside the `shard_map`, where that is more than
      run(*args, **static).
    """

    args: tuple[Any, ...]
    results: tuple[str, ...]
    sums: tuple[str, ...]
    local: Callable[..., Sequence[jax.Array]] | None = None


def fits(dims: Dims, divided: Divided, args: Sequence[Any]) -> bool:
    """Whether every dimension of every argument (of shapes) is a multiple of its parts."""

    def whole(letters, arg):
        if arg is None:
            return True
        if isinstance(letters, tuple):
            return all(map(whole, letters, arg))
        packed = arg.stack if isinstance(arg, Stacked) else arg
        if isinstance(packed, Packed) and divided.of(letters):
            parts = divided.count(letters[0])
            return not packed.doubled and (parts == 1 or arg.shape[0] % (packed.unit * parts) == 0)
        return all(
            leaf.shape[axis - len(letters)] % divided.count(letter) == 0
            for leaf in jax.tree.leaves(arg)
            if leaf.ndim >= len(letters)
            for axis, letter in enumerate(letters)
        )

    return all(map(whole, dims.args, args))


def run(function: Callable[..., Any], dims: Dims, divided: Divided, args: Sequence[Any], **static: Any) -> list[Any]:
    """function(*args, **static), which computes on one device's arrays, in a `shard_map` over the whole mesh."""
    leaves, treedef = jax.tree.flatten(tuple(args))

    def local(*leaves):
        given = treedef.unflatten(leaves)
        made = dims.local(function, divided, *given, **static) if dims.local else function(*given, **static)
        axes = [divided.of(letters) for letters in dims.sums]
        return [jax.lax.psum(x, over) if over else x for x, over in zip(jax.tree.leaves(made), axes, strict=True)]

    def specs(letters, arg):
        if arg is None:
            return []
        if isinstance(letters, tuple):
            return [spec for pair in zip(letters, arg, strict=True) for spec in specs(*pair)]
        return [_spec(divided, letters, leaf.ndim) for leaf in jax.tree.leaves(arg)]

    given = tuple(spec for pair in zip(dims.args, args, strict=True) for spec in specs(*pair))
    made = [_spec(divided, letters, len(letters)) for letters in dims.results]
    return jax.shard_map(local, mesh=divided.mesh, in_specs=given, out_specs=made, check_vma=False)(*leaves)


def _spec(divided: Divided, letters: str, ndim: int) -> PartitionSpec:
    if ndim < len(letters):
        return PartitionSpec()
    axes = (divided.of(letter) or None for letter in letters)
    return PartitionSpec(*(None,) * (ndim - len(letters)), *axes)


# Rows of tokens, as the rows of one matrix.


def flat(x: jax.Array, divided: Divided | None) -> jax.Array:
    """x (..., n) as (T, n); where both rows and tokens of x (B, S, n) are divided, each device's are neighbours."""
    rows, tokens = _parts(x, divided)
    if tokens == 1:
        return x.reshape(-1, x.shape[-1])
    b, s, n = x.shape
    return x.reshape(rows, b // rows, tokens, s // tokens, n).swapaxes(1, 2).reshape(-1, n)


def unflat(y: jax.Array, x: jax.Array, divided: Divided | None) -> jax.Array:
    """The inverse, of y (T, m) for the rows of `x` (..., n): (..., m)."""
    rows, tokens = _parts(x, divided)
    if tokens == 1:
        return y.reshape(*x.shape[:-1], y.shape[-1])
    b, s, _ = x.shape
    return y.reshape(rows, tokens, b // rows, s // tokens, -1).swapaxes(1, 2).reshape(b, s, -1)


def _parts(x, divided):
    if divided is None or x.ndim != 3:
        return 1, 1
    rows, tokens = divided.count("b"), divided.count("s")
    return (rows, tokens) if x.shape[0] % rows == 0 and x.shape[1] % tokens == 0 else (1, 1)
