"""The plans worth considering for layers that have been traced: what each keeps, and what it computes again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxpeft.backward.plan import INPUT, Plan
from jaxpeft.backward.programs import Price, matmuls

if TYPE_CHECKING:
    from jaxpeft.backward.segments import Segment

_MOST = 10  # names whose every subset is looked at


class Rates(NamedTuple):
    """What a device does in a second.

    flops: of products.  bandwidth: bytes of its memory.
    host: bytes of the link to the host's memory, each way; None where nothing may go there.
    """

    flops: float
    bandwidth: float
    host: float | None = None

    def product(self, flops: float, size: float) -> float:
        """Seconds of a product: the larger of its work's and its bytes'."""
        return max(flops / self.flops, size / self.bandwidth)


class Option(NamedTuple):
    """A table of actions, and what it costs.

    kept: bytes on the device.  flops: recomputed.  altered: bytes that are compressed or in the host's memory.
    seconds: of recomputed products, and of writing and reading what is kept.  transfer: seconds to the host's memory
      and back, beside the device's own work. Both are 0 where no rates are given.
    """

    plan: Plan
    kept: int
    flops: float
    altered: int
    seconds: float = 0.0
    transfer: float = 0.0


def options(
    segments: Mapping[str, Segment], actions: Iterable[str] = ("save",), tokens: int = Plan().tokens
) -> list[Option]:
    """The tables worth considering, least recomputation first: none keeps more for no less recomputation.

    Of more than ten names not every subset is looked at: from all of them one after the other is given up, that which
    costs the least recomputation per byte.

    Args:
      segments: of a trace under any plan.
      actions: what may be done with an activation that is not recomputed.
      tokens: of the plans.
    """
    return frontier(tables(segments, actions, tokens), lambda option: option.flops)


def tables(
    segments: Mapping[str, Segment],
    actions: Iterable[str] = ("save",),
    tokens: int = Plan().tokens,
    rates: Rates | None = None,
) -> list[Option]:
    """All tables that `options` chooses from.

    Their seconds are estimates, without a compiler: a product that is computed again takes the larger of the times of
    its work and its bytes; what is kept is written and read once, and what is compressed or offloaded once more.

    Args: as those of `options`.
      rates: of the device whose seconds are wanted.
    """
    actions = tuple(actions)
    names: list[str] = []
    for segment in segments.values():
        programs = segment.programs
        names = list(dict.fromkeys([*names, *(name for name, _ in matmuls(programs, (), programs.names))]))
    # The log-sum-exp is of use only with the output that it belongs to.
    alone = [name for name in names if name.removesuffix("_lse") not in names or not name.endswith("_lse")]
    groups = [tuple(n for n in names if n in (name, f"{name}_lse")) for name in alone]
    found: dict[tuple[float, int], Option] = {}
    for saved in _subsets(segments, groups):
        flops, sizes = _costs(segments, saved, actions)
        again = 0.0 if rates is None else _recomputed(segments, saved, rates.product)
        read = [name for name in names if name in saved and sizes[name]["save"]]
        # With many names they all have one action: a choice for each would be as many as the subsets left out.
        choices = itertools.product(actions, repeat=len(read))
        for choice in choices if len(groups) <= _MOST else ([action] * len(read) for action in actions):
            table = dict(zip(read, choice, strict=True))
            kept = sizes[INPUT]["save"] + sum(sizes[n][a] for n, a in table.items() if a != "offload")
            altered = sum(sizes[n]["save"] for n, a in table.items() if a != "save")
            best = found.get((flops, kept))
            if best is not None and altered >= best.altered:
                continue
            option = Option(Plan("blocks", tuple(table.items()), tokens), kept, flops, altered)
            if rates is not None:
                away = sum(sizes[n]["save"] for n, a in table.items() if a == "offload")
                seconds = again + 2 * (kept + altered) / rates.bandwidth
                option = option._replace(seconds=seconds, transfer=2 * away / rates.host if rates.host else 0.0)
            found[flops, kept] = option
    return list(found.values())


def _recomputed(segments: Mapping[str, Segment], saved: set[str], price: Price) -> float:
    """The price of the products that are computed again where these names are kept."""
    found = 0.0
    for segment in segments.values():
        given = [name for name in segment.programs.names if name[0] in saved]
        found += segment.programs.recompute_flops(given, price) * segment.steps
    return found


def _costs(
    segments: Mapping[str, Segment], saved: set[str], actions: Sequence[str]
) -> tuple[float, dict[str, dict[str, int]]]:
    """(FLOPs that are computed again where these names are kept, {name: {action: bytes of all layers}})."""
    flops, sizes = 0.0, dict.fromkeys((INPUT, *saved), dict.fromkeys(("save", *actions), 0))
    for segment in segments.values():
        given = [name for name in segment.programs.names if name[0] in saved]
        flops += segment.programs.recompute_flops(given) * segment.steps
        inputs = [name for name in segment.shapes if name[0] == INPUT]
        for name in [*segment.programs.work(given)[1], *inputs]:
            before = sizes[name[0]]
            sizes[name[0]] = {a: before[a] + segment.stored_bytes(name, a) for a in before}
    return flops, sizes


def _subsets(segments: Mapping[str, Segment], groups: Sequence[tuple[str, ...]]) -> Iterator[set[str]]:
    """Sets of names to keep: all, or a chain of them."""
    if len(groups) <= _MOST:
        for chosen in itertools.product((False, True), repeat=len(groups)):
            yield {name for group, use in zip(groups, chosen, strict=True) if use for name in group}
        return
    kept = list(groups)

    def cost(left: Sequence[tuple[str, ...]]) -> tuple[float, int]:
        flops, sizes = _costs(segments, {name for group in left for name in group}, ())
        return flops, sum(size["save"] for size in sizes.values())

    yield {name for group in kept for name in group}
    while kept:
        flops, size = cost(kept)
        rates = []
        for n in range(len(kept)):
            more, less = cost(kept[:n] + kept[n + 1 :])
            rates.append((more - flops) / max(size - less, 1))
        del kept[rates.index(min(rates))]
        yield {name for group in kept for name in group}


def frontier(found: Iterable[Option], cost: Callable[[Option], float]) -> list[Option]:
    """Least cost first, then least altered; left out is what keeps no less than one before it."""
    ordered = sorted(found, key=lambda option: (cost(option), option.altered, option.kept))
    frontier: list[Option] = []
    for option in ordered:
        if not frontier or option.kept < frontier[-1].kept:
            frontier.append(option)
    return frontier
