"""What fits a device: the best plan under a budget, the largest batch, the longest sequence.

A plan's kept bytes and recomputation follow from the trace (`jaxpeft.backward.options`); what a step needs besides is
learned from the compiler, and whatever is returned has been compiled and fits. The best plan is that with the least
recomputation, or with the least time by the traffic of the compiled step (`jaxpeft.memory.traffic`):

    time of a plan ~ max(rest + products computed again + what is kept, written and read,    to the host and back)

where the rest is what the compiled step that keeps least takes beside these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

from jaxpeft import tree
from jaxpeft.backward.options import Option, Rates, frontier, tables
from jaxpeft.backward.plan import Plan
from jaxpeft.errors import InputError
from jaxpeft.memory import pods
from jaxpeft.memory.planner import Cost, Step, cost, local, moving, row
from jaxpeft.memory.targets import Target


def rates(target: Target, actions: Collection[str] = ()) -> Rates:
    """What a target does in a second, all its devices together.

    Raises:
      InputError: for a target of which that is not known.
    """
    if target.bandwidth is None or target.flops is None:
        raise InputError(f"--by time: bandwidth and rate of {target.name} are not known; use --by flops")
    if "offload" in actions and target.host_bandwidth is None:
        raise InputError(f"--by time: the bandwidth between {target.name} and its host is not known; leave offload out")
    host = target.host_bandwidth
    return Rates(target.flops * target.chips, target.bandwidth * target.chips, host and host * target.chips)


def fit(
    make: Callable[[Plan], Step],
    target: Target,
    budget: int,
    actions: Iterable[str] = ("save",),
    report: Callable[[str], None] = lambda text: None,
    most_compiles: int = 8,
    by: Literal["flops", "time"] = "flops",
) -> tuple[Step, dict[str, Any]]:
    """The plan with the least recomputation, or the least time, whose compiled total fits the budget, and its row.

    What a step needs besides the kept arrays is learned from the compiler: first with nothing kept but the layers'
    inputs, then from each plan that is tried.

    Args:
      make: plan -> step, with a mesh for a target of several devices.
      target: to compile for.
      budget: bytes of one device.
      actions: what may be done with activations besides recomputing them: "save", "compress", "compress12",
        "compress4", "prune", "offload".
      report: is told what is tried.
      most_compiles: where a search ends.
      by: what the best plan has the least of. "time": plans are estimated, those tried have what they move in their
        rows ("traffic"), and of these the one whose bound there ("bound_s") is least is returned; those that a search
        by recomputation tries are among them.

    Raises:
      InputError: for a budget below the arguments, or one that no plan fits; by time, for a target whose bandwidth and
        rate are not known.
    """
    actions = tuple(actions)
    speed = rates(target, actions) if by == "time" else None
    step = make(Plan("blocks"))
    state, batch = local(step)
    arguments = tree.num_bytes((state._replace(key=None), batch))
    if budget <= arguments:
        raise InputError(
            f"--budget {_gib(budget)}: the arguments alone (weights, adapters, optimizer state, batch) take "
            f"{_gib(arguments)}"
        )

    def compiled(step: Step) -> tuple[Cost, dict[str, Any]]:
        traced = cost(step)
        measure = pods.row if step.mesh is not None else row if speed is None else moving
        made = measure(step, target, traced)
        time = f", {1e3 * _seconds(made):.1f} ms at least" if speed else ""
        report(f"{target.name}: {step.plan}: {_gib(made['bytes']['total'])}{time}")
        return traced, made

    traced, best = compiled(step)
    if best["bytes"]["total"] > budget and step.plan.tokens > step.length:  # one row at a time
        step = make(Plan("blocks", tokens=step.length))
        traced, best = compiled(step)
    if best["bytes"]["total"] > budget:
        raise InputError(f"--budget {_gib(budget)}: the plan that keeps least needs {_gib(best['bytes']['total'])}")
    found = tables(traced.segments, actions, step.plan.tokens, speed)
    tried = {step.plan: (step, best)}

    def walk(candidates: list[Option]) -> list[Plan]:
        """The plans that fit, each costing less than the one before; the first is the one that keeps least."""
        fit, overhead = [step.plan], best["bytes"]["total"] - traced.activations // step.shards
        for _ in range(most_compiles - 1):
            option = next((option for option in candidates if option.kept // step.shards + overhead <= budget), None)
            if option is None or option.plan == fit[-1]:
                break
            if option.plan not in tried:
                own = make(option.plan)
                tried[option.plan] = own, compiled(own)[1]
            total = tried[option.plan][1]["bytes"]["total"]
            overhead = total - option.kept // step.shards
            at = candidates.index(option)
            fit += [option.plan] if total <= budget else []
            candidates = candidates[:at] if total <= budget else candidates[at + 1 :]
        return fit

    least = walk(frontier(found, lambda option: option.flops))
    if speed is None:
        return tried[least[-1]]
    plans = walk(_by_time(found, best, step.accumulate)) + least
    return min((tried[plan] for plan in plans), key=lambda one: _seconds(one[1]))


def _by_time(found: list[Option], least: dict[str, Any], accumulate: int) -> list[Option]:
    """Plans by their time, of which that of the plan that keeps least is known from its row.

    accumulate: micro-batches of a step; the plans' costs are those of one.
    """
    own = next(option for option in found if not option.plan.actions)
    rest = least["traffic"]["least_by_module_s"] - accumulate * own.seconds
    return frontier(found, lambda option: max(rest + accumulate * option.seconds, accumulate * option.transfer))


def _seconds(made: dict[str, Any]) -> float:
    """The bound of a row with what it moves, or with what several devices do."""
    return made["bound"]["step_s"] if made.get("bound") else made["traffic"]["bound_s"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def largest(
    total: Callable[[int], int], room: int, start: int, quantum: int = 1, most: int | None = None, compiles: int = 12
) -> int:
    """The largest multiple of `quantum` whose total fits, 0 if none; each guess follows the line through two others.

    Args:
      total: n -> bytes, which grow with n.
      room: bytes.
      start: the first n, a multiple of quantum.
      most: the largest n of interest.
      compiles: how often `total` may be asked; then the largest n that was seen to fit is returned.
    """
    before = fits = (0, 0)  # (n, bytes) of the two largest that fit
    beyond: tuple[int, int] | None = None  # of the smallest that doesn't
    n = start
    for _ in range(compiles):
        size = total(n)
        if size > room:
            beyond = (n, size)
        else:
            before, fits = fits, (n, size)
        (n1, s1), (n2, s2) = (fits, beyond) if beyond else (before, fits)
        line = n1 + (room - s1) * (n2 - n1) / max(s2 - s1, 1)
        n = int(min(line, 8 * n2)) // quantum * quantum  # far from what is known, a line is no guide
        n = max(n, fits[0] + quantum)
        n = min(n, beyond[0] - quantum) if beyond else n
        n = min(n, most // quantum * quantum) if most is not None else n
        if n <= fits[0]:
            break
    return fits[0]
