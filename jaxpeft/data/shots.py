"""Examples in context: each validation example behind some of the training data, which the model is shown.

    ids         BOS | shown 1 | blank line | shown 2 | blank line | ... | prompt | completion
    completion   0  |    0    |     0      |    0    |     0      |     |   0    |     1

What a conversation's template writes at its end stays; of other texts EOS is left out, as what follows goes on.

Paper: Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165; the baseline "ICL" of MeZO's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from jaxpeft.data.examples import Example
from jaxpeft.special import SpecialTokens

Ids: TypeAlias = npt.NDArray[np.int32]


class InContext(NamedTuple):
    """examples: with those before them that have room.  fewer: how many have room for fewer than were shown."""

    examples: list[Example]
    fewer: int


def shown(
    examples: Sequence[Example], count: int, seed: int, special: SpecialTokens, between: Sequence[int], whole: bool
) -> list[Ids]:
    """The ids of `count` examples, all different, in the order in which they are put before a question.

    Args:
      examples: the training data; those with a prompt are drawn from, or all where none has one.
      count: K; all of them where there are fewer.
      seed: of the draw.
      special: the model's special tokens, of which BOS is left out, and EOS unless `whole`.
      between: the ids of a blank line, put behind each; () with `whole`.
      whole: what ends an example is part of it, as a conversation's template wrote it.
    """
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    prompted = (i for i in order if not examples[i].completion[0])
    drawn = [i for i, _ in zip(prompted, range(count), strict=False)] or order[:count]
    return [_bare(examples[i].ids, special, between, whole) for i in drawn]


def _bare(ids: Ids, special: SpecialTokens, between: Sequence[int], whole: bool) -> Ids:
    """An example's ids without what begins and, unless `whole`, ends a text; `between` behind them."""
    start = _opening(ids, special)
    end = len(ids) - (not whole and int(ids[-1]) in special.ends)
    return np.concatenate([ids[start:end], np.asarray([] if whole else between, np.int32)])


def _opening(ids: Ids, special: SpecialTokens) -> int:
    """How many of the ids are what goes before a text."""
    opening = special.before
    return len(opening) if opening and tuple(ids[: len(opening)].tolist()) == opening else 0


def in_context(examples: Sequence[Example], before: Sequence[Ids], most: int, special: SpecialTokens) -> InContext:
    """Each example behind the last of `before` that have room in `most` positions with it."""
    made, fewer = [], 0
    for example in examples:
        room, taken = most - example.positions, 0
        for ids in reversed(before):
            if len(ids) > room:
                break
            room, taken = room - len(ids), taken + 1
        fewer += taken < len(before)
        start = _opening(example.ids, special)
        parts = [example.ids[:start], *before[len(before) - taken :], example.ids[start:]]
        ids = np.concatenate(parts).astype(np.int32)
        completion = np.concatenate([np.zeros(len(ids) - len(example.ids), bool), example.completion])
        made.append(example._replace(ids=ids, completion=completion))
    return InContext(made, fewer)
