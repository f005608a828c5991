"""What no array takes at the peak, of layouts by hand."""

import random

import pytest

from jaxpeft.memory import hlo, layout

F32, TUPLE = b"\x10\x0b", b"\x10\x0d"  # as xla_data.proto writes an element type
KIB = 2**10


def program(size, *placed):
    """A program of one block of so many bytes: (name, offset, bytes, first, last); a name t... is a tuple's table."""
    shapes = [TUPLE if name.startswith("t") else F32 for name, *_ in placed]
    instructions = {
        n: hlo.Instruction(n, name, "", "", (), (), 0, "", 0, shape)
        for n, ((name, *_), shape) in enumerate(zip(placed, shapes, strict=True))
    }
    values = [hlo.Value((n, ()), 0, *where) for n, (_, *where) in enumerate(placed)]
    blocks = {0: hlo.Allocation(0, size, "temporary", -1)}
    order = [str(n) for n in range(100)]
    return hlo.Program("p", "tpu", instructions, {}, 0, order, frozenset(), blocks, values, 0)


def unused(size, peak, *placed):
    made = program(size, *placed)
    rows = layout.unused(made, 0, peak, lambda key: made.instructions[key[0]].name)
    return [(row.category, row.module, row.arrays, row.bytes) for row in rows]


def test_arrays_are_rounded_up():
    found = unused(48 * KIB, 5, ("a", 0, 20 * KIB, 0, 9), ("b", 32 * KIB, 16 * KIB, 5, 5))
    assert found == [("alignment", "rounding up to 16.00 KiB", 2, 12 * KIB)]


def test_tables_keep_their_place():
    """Of two tables, one at the peak: what it doesn't fill is rounding, the other's place nobody's."""
    found = unused(48 * KIB, 5, ("a", 0, 16 * KIB, 0, 9), ("t1", 16 * KIB, 512, 5, 6), ("t2", 32 * KIB, 512, 7, 8))
    assert found == [
        ("alignment", "rounding up to 16.00 KiB", 2, 16 * KIB - 512),
        ("alignment", "tables of tuples", 2, 16 * KIB),
    ]


def test_room_is_the_largest_others():
    found = unused(
        64 * KIB, 5, ("a", 0, 16 * KIB, 0, 9), ("b", 16 * KIB, 48 * KIB, 0, 2), ("c", 32 * KIB, 16 * KIB, 3, 4)
    )
    assert found == [("fragmentation", "room for b", 1, 48 * KIB)]


def test_a_place_that_an_array_and_a_table_take_is_the_arrays():
    found = unused(32 * KIB, 5, ("a", 0, 16 * KIB, 0, 9), ("b", 16 * KIB, 16 * KIB, 0, 2), ("t", 16 * KIB, 512, 7, 8))
    assert found == [("fragmentation", "room for b", 1, 16 * KIB)]


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_is_counted_once(seed):
    draw = random.Random(seed)
    size = 64 * 40
    placed = []
    for n in range(draw.randrange(1, 30)):
        offset, first = 64 * draw.randrange(40), draw.randrange(10)
        bytes_ = draw.randrange(1, size - offset + 1)
        placed.append((draw.choice("at") + str(n), offset, bytes_, first, draw.randrange(first, 10)))
    live = {
        at for _, offset, count, first, last in placed if first <= 5 <= last for at in range(offset, offset + count)
    }
    assert sum(bytes_ for *_, bytes_ in unused(size, 5, *placed)) == size - len(live)
