"""Training data that grows in rounds, by what the model is most uncertain of (`jaxpeft.train.uncertainty`).

    round 0               `size` examples, drawn at random
    each further round    the `size` most uncertain ones of those that are left, beside the ones before

A round's batches are made of its examples alone, as `make_batches` makes them, in an order of its own. The steps of a
run are divided evenly over its rounds: it is in round `step * rounds // steps`.

What makes the next batch is in the state: the round, its examples' numbers, the base's uncertainties, and the place
among the batches. So a run is resumed anywhere.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxpeft.data.batches import Batch, Batches, Item, Lines, eval_batches
from jaxpeft.errors import InputError

Make = Callable[[Sequence[Item], int], Batches]  # (examples, seed) -> batches


class Rounds(Batches):
    """Iterator of (batch, lines), as `Batches`, of the examples of the round that it is in.

    round: from 0.  rounds: how many there are.
    chosen: numbers of its examples, ascending.  count: of all.
    base: float64 (n,), each example's uncertainty under the model before the first step; None before it is known.
    """

    def __init__(self, examples: Sequence[Item], make: Make, rounds: int, size: int, seed: int):
        """Round 0.

        Args:
          examples: all of them.
          make: of a round's batches.
          rounds: at least 1.
          size: examples that each round adds; the last rounds add what is left.
          seed: of the first draw, and of the rounds' orders.

        Raises:
          InputError: for no rounds, no examples in one, or so many that nothing is left to choose.
        """
        if rounds < 1:
            raise InputError(f"rounds {rounds} must be at least 1")
        if not 1 <= size < len(examples):
            raise InputError(
                f"--round-size {size}: must be from 1 to {len(examples) - 1}, one less than the examples, of which "
                "rounds choose"
            )
        self._all, self._make, self._seed, self.rounds, self.size = examples, make, seed, rounds, size
        whole = make(examples, seed).get_state()["identity"]
        self._identity = hashlib.blake2b(f"{whole}:{rounds}:{size}".encode(), digest_size=8).hexdigest()
        first = np.random.default_rng([seed, 0]).choice(len(examples), size, replace=False)
        self.round, self.chosen, self.base = 0, sorted(first.tolist()), None
        self._held = None
        self.count = len(examples)
        self._begin()

    def _begin(self) -> None:
        own = int(np.random.SeedSequence([self._seed, self.round]).generate_state(1)[0])
        self._inner = self._make([self._all[i] for i in self.chosen], own).hold(self._held)

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """That are no padding in all rows of the last batch."""
        return self._inner.tokens

    def hold(self, rows: Sequence[int] | None) -> "Rounds":
        """Makes arrays of these rows of each batch alone, ascending numbers; None: of all. Returns itself."""
        self._held = rows
        self._inner.hold(rows)
        return self

    def __next__(self) -> tuple[Batch, Lines]:
        batch, lines = next(self._inner)
        numbers = np.array([0, *(i + 1 for i in self.chosen)], np.int32)
        return {**batch, "example_ids": numbers[batch["example_ids"]]}, lines

    def get_state(self) -> dict[str, Any]:
        """All that the next batch follows from; plain JSON."""
        base = None if self.base is None else self.base.tolist()
        own = {"round": self.round, "chosen": self.chosen, "base": base}
        return {"identity": self._identity, **own, "rows": self._inner.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of `get_state`.

        Raises:
          InputError: the state is of other examples or other settings.
        """
        self._check_same(state)
        self.round, self.chosen = state["round"], state["chosen"]
        self.base = None if state["base"] is None else np.array(state["base"])
        self._begin()
        self._inner.set_state(state["rows"])

    # What is chosen.

    def left(self) -> list[int]:
        """Numbers of the examples that no round has chosen yet."""
        return sorted(set(range(len(self._all))) - set(self.chosen))

    def of(self, numbers: Sequence[int], batch_size: int, seq_len: int) -> Batches:
        """Examples by their numbers, one a row, in this order."""
        return eval_batches([self._all[i] for i in numbers], batch_size, seq_len).hold(self._held)

    def add(self, uncertainty: npt.NDArray[np.float64]) -> None:
        """Begins the next round with the most uncertain of those that are left.

        Args:
          uncertainty: (n,) under the model as it is, of the examples that `left` names, in that order.
        """
        left = self.left()
        if left:
            assert self.base is not None
            weight = min(1.0, (self.round + 1) / self.rounds)
            scores = weight * scaled(uncertainty) + (1 - weight) * scaled(self.base[left])
            order = np.argsort(-scores, kind="stable")[: self.size]
            self.chosen = sorted([*self.chosen, *(left[i] for i in order)])
        self.round += 1
        self._begin()


def scaled(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The smallest is 0, the largest 1."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)
