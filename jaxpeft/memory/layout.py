"""What of a block of temporaries no array takes at the peak, and why.

    block = arrays + alignment + room + what is left

A compiler places every array at a multiple of a number of bytes: 16 KiB on a TPU, 256 bytes on a GPU, 64 on a CPU. A
tuple is a table of its elements' addresses, 512 bytes on a TPU, and keeps its place to itself throughout the program;
a small step has a thousand of them, a large one hardly more. Both are the "alignment". What else is free at the peak is
room that arrays take at other moments: an array needs one place for its whole life, so that what it leaves cannot
always be used. That is "fragmentation", by the owner of the largest array that takes it.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable

from jaxpeft.memory import hlo
from jaxpeft.memory.owners import Buffer
from jaxpeft.train.report import human_bytes

Span = tuple[int, int]  # of bytes in a block, the end not included
_LARGEST = 2**14  # bytes of an alignment; a larger common divisor of the places is by chance


def unused(program: hlo.Program, block: int, peak: int, owner: Callable[[hlo.Key], str]) -> list[Buffer]:
    """What no array takes of a block (an allocation of temporaries) at a position of the schedule.

    Args:
      program: the program.
      block: the allocation's number.
      peak: the position.
      owner: of a value.

    Returns:
      Rounding up, tables, and room by owner, in this order.
    """
    values = [value for value in program.values if value.allocation == block and value.last >= value.first]
    if not values:
        return []
    unit = math.gcd(_LARGEST, *(value.offset for value in values))
    size = program.allocations[block].bytes

    def place(value: hlo.Value) -> Span:
        return value.offset, min(value.offset - -value.bytes // unit * unit, size)

    live = [value for value in values if value.first <= peak <= value.last]
    tables = [value for value in values if program.instructions[value.key[0]].shape(value.key[1])[0] == "tuple"]
    known = {table.key for table in tables}
    arrays = [value for value in values if value.key not in known]
    taken = _joined(map(place, live))
    rounding = _bytes(taken) - _bytes(_joined((value.offset, value.offset + value.bytes) for value in live))
    ever = _joined([*map(place, arrays), *taken])
    of_tables = _without(_joined(map(place, tables)), ever)
    free = _without([(0, size)], _joined([*taken, *of_tables]))
    others = [(place(value), owner(value.key)) for value in sorted(arrays, key=lambda value: -value.bytes)]
    end = max(len(program.order), 1)

    def row(bytes_: int, category: str, text: str, count: int) -> Buffer:
        return Buffer(bytes_, "", "", "", 0, end, category, text, arrays=count)

    found = [
        row(rounding, "alignment", f"rounding up to {human_bytes(unit)}", len(live)),
        row(_bytes(of_tables), "alignment", "tables of tuples", len(tables)),
        *(row(n, "fragmentation", f"room for {name}" if name else "", 1) for name, n in _room(free, others).items()),
    ]
    return [buffer for buffer in found if buffer.bytes]


def _room(free: list[Span], others: list[tuple[Span, str]]) -> dict[str, int]:
    """{owner: bytes} of free spans, each by the first array, and so the largest, that takes it at another moment."""
    total: dict[str, int] = defaultdict(int)
    left = free
    for (start, end), name in others:
        first = bisect.bisect_right(left, (start, start)) - 1
        first += first < 0 or left[first][1] <= start
        last = bisect.bisect_left(left, (end, end))
        if first < last:
            rest = _without(left[first:last], [(start, end)])
            total[name] += _bytes(left[first:last]) - _bytes(rest)
            left = left[:first] + rest + left[last:]
    total[""] += _bytes(left)
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those that touch as one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _without(spans: list[Span], others: list[Span]) -> list[Span]:
    """What of spans in order no other span covers; the others are in order, too."""
    found, at = [], 0
    for start, end in spans:
        while at < len(others) and others[at][1] <= start:
            at += 1
        here = at
        while here < len(others) and others[here][0] < end:
            if others[here][0] > start:
                found.append((start, others[here][0]))
            start = max(start, others[here][1])
            here += 1
        if start < end:
            found.append((start, end))
    return found


def _bytes(spans: Iterable[Span]) -> int:
    return sum(end - start for start, end in spans)
