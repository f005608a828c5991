"""Which slices of TPUs and hosts of GPUs there are, by their names: v5p:4x4x8, h200x8, h200x8x2.

TPU: the shapes of Google's Cloud TPU documentation. A slice of a 2D torus (v5e, v6e) is one of seven; one of a 3D torus
is a part of a cube of 4 x 4 x 4 chips, or whole cubes, the sides in ascending order. Cubes are connected to a torus in
all dimensions; of a two-dimensional slice a side of 16 chips is a ring.

GPU: a host of 1, 2, 4 or 8 (NVIDIA's HGX and DGX), or several hosts of 8.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from jaxpeft.errors import InputError
from jaxpeft.memory.kinds import Kind

_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBE = 4
_HOST = (1, 2, 4, 8)  # GPUs of one host
_MOST_HOSTS = 512


def of_tpu(text: str, name: str, kind: Kind, written: str) -> tuple[int, ...]:
    """The chips in each dimension of the slice that a name's part behind the colon says.

    Raises:
      InputError: for what is no shape, or one that such chips do not come in; it names near ones.
    """
    dimensions = len(kind.host)
    numbers = re.fullmatch(r"\d{1,18}(x\d{1,18})*", written)
    shape = tuple(map(int, written.split("x"))) if numbers else ()
    if len(shape) != dimensions:
        like = _near(shape or (4,) * dimensions, kind)[0]
        raise InputError(
            f"target {text!r}: a slice of {name} has {dimensions} dimensions; write {_named(name, like)} for "
            f"{math.prod(like)} chips"
        )
    if set(shape) != {1} and shape not in existing(kind):
        near = " or ".join(f"{_named(name, other)} ({math.prod(other)} chips)" for other in _near(shape, kind))
        raise InputError(f"target {text!r}: there is no such slice of {name}; near are {near}")
    return shape


def of_gpus(text: str, name: str, kind: Kind, written: str) -> tuple[int, int]:
    """(GPUs of a host, hosts) of what a name has behind its first x: 8, or 8x2.

    Raises:
      InputError: for GPUs that have no links, or numbers that hosts do not come in.
    """
    if kind.link is None:
        raise InputError(f"target {text!r}: {name} has no links to others; write {name}")
    numbers = [int(number) for number in written.split("x") if re.fullmatch(r"\d{1,6}", number)]
    gpus, hosts = (*numbers, 1, 1)[:2]
    if len(numbers) != written.count("x") + 1 or len(numbers) > 2 or gpus not in _HOST:
        raise InputError(f"target {text!r}: a host has 1, 2, 4 or 8 of {name}; write {name}x8, or {name}x8x2 for two")
    if not 1 <= hosts <= _MOST_HOSTS or (hosts > 1 and gpus != _HOST[-1]):
        raise InputError(
            f"target {text!r}: several hosts, at most {_MOST_HOSTS}, have 8 of {name} each; write {name}x8x2 for two"
        )
    return gpus, hosts


def existing(kind: Kind) -> list[tuple[int, ...]]:
    """The shapes of all slices of more than one chip, by their number of chips."""
    if len(kind.host) == 2:
        return list(_FLAT)
    sides = [range(_CUBE, most + 1, _CUBE) for most in kind.largest]
    cubes = [shape for shape in itertools.product(*sides) if list(shape) == sorted(shape)]
    return sorted([*_PARTS, *cubes], key=math.prod)


def wraps(shape: Sequence[int]) -> tuple[bool, ...]:
    """Whether a slice's last chip is connected to its first one, in each dimension."""
    if len(shape) == 2:
        return tuple(size == 16 for size in shape)
    return (all(size % _CUBE == 0 for size in shape),) * len(shape)


def _near(shape: Sequence[int], kind: Kind, most: int = 2) -> list[tuple[int, ...]]:
    """The slices with nearly as many chips, of several the most alike."""
    chips, sides = max(math.prod(shape), 1), sorted(shape, reverse=True)

    def far(other: tuple[int, ...]) -> tuple[float, int]:
        pairs = itertools.zip_longest(sides, sorted(other, reverse=True), fillvalue=1)
        return abs(math.log(math.prod(other) / chips)), sum(abs(a - b) for a, b in pairs)

    return sorted(existing(kind), key=far)[:most]


def _named(name: str, shape: Sequence[int]) -> str:
    return f"{name}:{'x'.join(map(str, shape))}"
