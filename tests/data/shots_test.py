"""Examples in context: what stands before a question, and what counts of it."""

import numpy as np
import pytest

from jaxpeft import data
from jaxpeft.special import SpecialTokens

SPECIAL = SpecialTokens(before=(0,), begin=0, end=1, ends=(1, 2), blanks=frozenset())


def example(ids, start, line=1):
    """<s> ids </s>, of which everything from `start` on is completion."""
    ids = np.array([0, *ids, 1], np.int32)
    return data.Example(ids, np.arange(len(ids)) >= start, line)


TRAIN = [example([10 + i, 20 + i], 2, i) for i in range(5)] + [example([30], 0, 5)]


@pytest.mark.parametrize("count", [2, 5, 9])
def test_what_is_shown_is_drawn_once_among_examples_with_a_prompt(count):
    before = data.shown(TRAIN, count, 3, SPECIAL, [7, 7], whole=False)
    bodies = [ids.tolist() for ids in before]
    assert len(bodies) == len({tuple(ids) for ids in bodies}) == min(count, 5)
    assert all(ids in [[10 + i, 20 + i, 7, 7] for i in range(5)] for ids in bodies)
    again = data.shown(TRAIN, count, 3, SPECIAL, [7, 7], whole=False)
    assert [ids.tolist() for ids in again] == bodies
    others = [[ids.tolist() for ids in data.shown(TRAIN, 2, seed, SPECIAL, [], whole=False)] for seed in range(9)]
    assert any(other != others[0] for other in others)


def test_a_template_s_end_of_a_turn_stays_and_texts_without_prompts_do():
    assert data.shown(TRAIN[:1], 1, 0, SPECIAL, [7], whole=True)[0].tolist() == [10, 20, 1]
    assert data.shown(TRAIN[5:], 1, 0, SPECIAL, [7], whole=False)[0].tolist() == [30, 7]


def test_only_the_example_s_own_completion_counts_and_the_nearest_shown_have_room():
    before = [np.array(ids, np.int32) for ids in ([11, 12], [13, 14, 15], [16])]
    question = example([4, 5, 6], 3)  # four positions
    for most, taken in ((100, 3), (10, 3), (9, 2), (8, 2), (7, 1), (5, 1), (4, 0)):
        (made,), fewer = data.in_context([question], before, most, SPECIAL)
        middle = [token for ids in before[3 - taken :] for token in ids]
        assert made.ids.tolist() == [0, *middle, 4, 5, 6, 1] and made.ids.dtype == np.int32
        assert made.ids[made.completion].tolist() == [6, 1] and made.line == question.line
        assert made.positions <= most and fewer == (taken < 3)
