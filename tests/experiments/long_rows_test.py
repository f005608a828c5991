"""The search for the longest row, on sizes that are made up; nothing is compiled."""

import pytest

from experiments.memory import long_rows
from experiments.memory.common import GIB


@pytest.mark.parametrize("room", [6, 20, 70])
@pytest.mark.parametrize("like", [None, (5 * GIB, 150 * 1024), (5 * GIB, 50 * 1024)])
def test_the_longest_row_fits_and_a_longer_one_does_not(room, like):
    """Bytes grow by 100 KiB a token, and by a fifth more where the row has 100,000."""

    def size(length):
        return 5 * GIB + length * 1024 * (100 if length < 100_000 else 120)

    compiled = []

    def figure(length):
        compiled.append(length)
        bytes_ = {"weights": 4 * GIB, "adapters": 0, "optimizer": GIB, "total": size(length)}
        return {"seq_len": length, "bytes": bytes_}

    best, _ = long_rows.longest([], figure, room * GIB, like)
    length = best["seq_len"]
    assert size(length) <= room * GIB < size(length + max(long_rows.STEP, int(long_rows.NEAR * length)))
    assert len(compiled) <= long_rows.MOST
    rows = [figure(length) for length in tuple(compiled)]
    assert long_rows.longest(rows, None, room * GIB, like)[0] == best


def test_a_row_that_nothing_fits_is_none():
    figure = lambda length: {
        "seq_len": length,
        "bytes": {"weights": 2 * GIB, "adapters": 0, "optimizer": 0, "total": 2 * GIB + length},
    }
    assert long_rows.longest([], figure, GIB)[0] is None
