"""Which adapter a tile of rows belongs to, in the kernels that gpu_products.py describes.

A factor is one array, for all rows; or (G, ...), G adapters of one rank; or, where ranks differ, a tuple of such
stacks, one for each rank in whole tiles of TMA's 8 rows. For the last two a kernel reads from `owner` whose rows a tile
has, and for the last, from the tables of `places`, where that adapter's factor is; an owner of G is none there.

A tile then costs its adapter's rank, rounded up to wgmma's 64 rows: its `height`. What TMA reads beyond a stack's rank
are zeros. Sums in registers have static shapes, so that there is one piece of program for each height (at most four),
and one copy to shared memory for each stack; a tile runs one of each. (With an operand for each adapter nothing would
be stacked, but a kernel for 24 of them takes half a minute to compile, in place of six seconds.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu import ALIGNMENT, TILE, round_up

NONE = -1  # the stack of nobody


def stacks(ranks: Sequence[int]) -> dict[int, list[int]]:
    """{rank in whole rows: its adapters}."""
    found: dict[int, list[int]] = {}
    for g, rank in enumerate(ranks):
        found.setdefault(round_up(rank, ALIGNMENT), []).append(g)
    return found


def places(ranks: Sequence[int]) -> dict[str, jax.Array]:
    """Tables for a kernel to read, int32 (G + 1,), of which the last entry is nobody's.

    stack: number of an adapter's in `stacks`.
    place: the adapter's there.
    height: of its tiles.
    """
    found = stacks(ranks)
    number = {g: i for i, members in enumerate(found.values()) for g in members}
    place = {g: i for members in found.values() for i, g in enumerate(members)}
    tables = {
        "stack": [*(number[g] for g in range(len(ranks))), NONE],
        "place": [*(place[g] for g in range(len(ranks))), 0],
        "height": [*(round_up(rank, TILE) for rank in ranks), 0],
    }
    return {name: jnp.asarray(values, jnp.int32) for name, values in tables.items()}


def heights_of(factor: Any, axis: int) -> tuple[int, ...]:
    """Of each stack; where all have one, that alone. axis: of the ranks."""
    return tuple(round_up(f.shape[axis], TILE) for f in (factor if isinstance(factor, tuple) else (factor,)))


def height_at(extra: dict[str, Any], tile: Any) -> Any:
    """That of a tile's rows, () int32; None where all have one."""
    return extra["height"][extra["owner"][tile]] if "height" in extra else None


def count_at(height: Any, steps: Any) -> Any:
    """Steps of a tile: none where nobody owns its rows."""
    return steps if height is None else jnp.where(height > 0, steps, 0)


def each_height(heights: Sequence[int], height: Any, use: Callable[[int], None]) -> None:
    """use(height), as a static number, for the tile's, which is one of `heights`."""
    if height is None:
        use(heights[0])
        return
    for one in sorted(set(heights)):
        pl.when(height == one)(functools.partial(use, one))


def with_factor(factor: Any, heights: Sequence[int], extra: dict[str, Any], owner: Any, use: Callable) -> None:
    """use(reference, height) for an owner's factor, if it is one's. owner: () int32, or None where nobody else is."""
    if isinstance(factor, tuple):
        mine = extra["place"][owner]
        for i, (stack, height) in enumerate(zip(factor, heights, strict=True)):
            pl.when(extra["stack"][owner] == i)(functools.partial(use, stack.at[mine], height))
    else:
        use(factor if owner is None else factor.at[owner], heights[0])


def owner_of(extra: dict[str, Any], tile: Any) -> Any:
    """Whose a tile of rows is, () int32; None where nobody else is."""
    return extra["owner"][tile] if "owner" in extra else None


def first(slots: Any, slot: Any, height: int, axis: int = 0) -> Any:
    """A slot's first `height` rows (axis 0) or columns (axis 1)."""
    if slots.shape[1 + axis] == height:
        return slots.at[slot]
    own = pl.ds(0, height)
    return slots.at[(slot, own) if axis == 0 else (slot, slice(None), own)]
