"""What a fine-tuning step needs on a device that need not be here, and the plan that fits a budget.

The step is the one that `jaxpeft train` runs, made of shapes alone and compiled by the target's own compiler:

    total = arguments + outputs that reuse no argument + temporaries
    arguments = weights + adapters + optimizer state + batch;   temporaries = gradients + activations + workspace

Weights, adapters, optimizer state, gradients and activations are exact sums over arrays; workspace is the rest of what
the compiler sets aside. FLOPs are those of matrix products (see `flops`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.memory import residuals, targets
from jaxpeft.memory.flops import count_flops
from jaxpeft.memory.plan import INPUT, Plan, parse
from jaxpeft.memory.programs import matmuls
from jaxpeft.memory.residuals import Segment
from jaxpeft.memory.targets import Memory, Target
from jaxpeft.method import Method, as_master
from jaxpeft.model import Model
from jaxpeft.models import family
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.optimizer import make_optimizer, make_schedule
from jaxpeft.train.state import TrainState, init_state
from jaxpeft.train.step import make_train_step

CATEGORIES = ("weights", "adapters", "optimizer", "gradients", "activations", "workspace")


class Step(NamedTuple):
    """A train step and the shapes that it takes.

    function: (state, batch) -> (state, metrics); the state is donated.
    state: TrainState of ShapeDtypeStructs.  batch: {name: ShapeDtypeStruct}.
    base: the base model's paths.  model: under its memory plan.  plan: that plan.
    """

    function: Callable[..., Any]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    base: frozenset[str]
    model: Model
    plan: Plan


def make_step(
    config: Mapping[str, Any],
    method: Method,
    batch_size: int,
    seq_len: int,
    save: str | Plan | None = None,
    dtype: Any = jnp.bfloat16,
    packed: bool = True,
    accumulate: int = 1,
    shards: int = 1,
) -> Step:
    """The step of `jaxpeft train` for a model's configuration; nothing is allocated.

    Args:
      config: a parsed config.json.
      method: what to train.
      batch_size: rows of a step.  seq_len: tokens of a row.
      save: the memory plan; None: `residuals.default_plan`.
      dtype: of frozen weights and of the computation.
      packed: whether rows hold several examples (and so come with segment ids).
      accumulate: micro-batches.
      shards: devices over which the rows are divided.

    Raises:
      InputError: for a configuration, method or plan that cannot be used.
    """
    base = family(config).from_hf(config, dtype)
    model = method.forward(base)
    plan = residuals.default_plan(model) if save is None else parse(save)
    model = residuals.remat(model, plan, shards)
    key = jax.eval_shape(lambda: jax.random.key(0))
    of_base = jax.eval_shape(lambda key: base.init(key, {}), key)
    params = jax.eval_shape(lambda key, params: model.init(key, method.prepare(params)), key, of_base)
    trainable, frozen = tree.split(params, method.trainable)
    if not trainable:
        raise InputError(f"{', '.join(spec.name for spec in method.specs)}: no parameter is trainable")
    trainable = jax.eval_shape(lambda leaves: {path: as_master(leaf) for path, leaf in leaves.items()}, trainable)
    optimizer = make_optimizer(make_schedule("cosine", 2e-4, 1000, 10))
    state = jax.eval_shape(functools.partial(init_state, method, optimizer), trainable, frozen, key)
    shape = (batch_size, seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets", "positions")}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if packed:
        batch["segment_ids"] = jax.ShapeDtypeStruct(shape, jnp.int32)
    function = make_train_step(model, method, optimizer, accumulate=accumulate)
    return Step(function, state, batch, frozenset(tree.flatten(of_base)), model, plan)


class Cost(NamedTuple):
    """What a step's trace tells, without a compiler.

    flops: of its matrix products, recomputation included.
    recompute_flops: of products that the backward pass computes again, the loss's head included.
    activations: bytes that are kept for the backward pass on the device; host: likewise in the host's memory.
    segments: the layers as they were traced.
    """

    flops: float
    recompute_flops: float
    activations: int
    host: int
    segments: list[Segment]


def cost(step: Step) -> Cost:
    """Traces a step."""
    with residuals.recorded() as found:
        # A function of its own: what JAX has traced before it would not trace, and not record, again.
        flops = count_flops(jax.make_jaxpr(lambda *args: step.function(*args))(step.state, step.batch))
    params = jax.eval_shape(lambda state: state.params, step.state)
    rows, length = step.batch["tokens"].shape
    x = jax.eval_shape(lambda params, batch: step.model.hidden(params, batch), params, step.batch)
    flat = jax.ShapeDtypeStruct((rows * length, x.shape[-1]), x.dtype)
    head = count_flops(jax.make_jaxpr(step.model.head)(params, flat))
    # Differentiation may trace a segment several times; the last one is what runs.
    segments = found[-len(tree.segments(params)) :] if found else []
    if step.plan.preset == "everything":
        return Cost(flops, head, autodiff_bytes(step.model, step.state, step.batch), 0, segments)
    again = sum(segment.recompute_flops() for segment in segments)
    return Cost(flops, head + again, kept_bytes(segments), kept_bytes(segments, "host"), segments)


def kept_bytes(segments: Iterable[Segment], where: str = "device") -> int:
    """Bytes of all activations that layers keep on the device, or in the host's memory."""
    return sum(sum(segment.kept_bytes()[where].values()) for segment in segments)


def autodiff_bytes(model: Model, state: TrainState, batch: Mapping[str, Any]) -> int:
    """Bytes that plain autodiff keeps, counted on the vjp's closure without the parameters."""

    def pull(trainable, frozen, batch):
        value = lambda trainable: completion_loss(model, tree.combine(trainable, frozen), batch)[0]
        return jax.vjp(value, trainable)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, state.trainable, state.frozen, batch))
    given = [(x.shape, x.dtype) for x in jax.tree.leaves((state.trainable, state.frozen, batch))]
    total = 0
    for x in kept:
        if (x.shape, x.dtype) in given:
            given.remove((x.shape, x.dtype))
        else:
            total += tree.num_bytes(x)
    return total


def account(memory: Memory, state: TrainState, base: Iterable[str], activations: int) -> dict[str, int]:
    """Bytes of one step by owner: CATEGORIES, then arguments, temporaries and total.

    Args:
      memory: what the compiler says.
      state: of the shapes that it was compiled for.
      base: the base model's paths.
      activations: bytes kept for the backward pass.
    """
    known = set(base)
    leaves = {**state.frozen, **state.trainable}
    weights = tree.num_bytes({path: leaf for path, leaf in leaves.items() if tree.canonical(path) in known})
    gradients = min(tree.num_bytes(state.trainable), memory.temporaries)
    # A compiler may keep less than autodiff asks for, where fusing lets it compute an array twice.
    activations = min(activations, memory.temporaries - gradients)
    return {
        "weights": weights,
        "adapters": tree.num_bytes(leaves) - weights,
        "optimizer": tree.num_bytes(state.opt_state),
        "gradients": gradients,
        "activations": activations,
        "workspace": memory.temporaries - gradients - activations,
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "total": memory.total,
    }


def row(step: Step, target: Target, traced: Cost | None = None, dump: Any = None) -> dict[str, Any]:
    """A row of the plan: the step compiled for a target. On a slice, rows are divided over its devices.

    Returns:
      {"target", "save", "batch_size", "seq_len", "bytes": {...}, "host_bytes", "device_bytes", "fits", "flops",
      "recompute_flops", "jax"}; bytes are those of one device, FLOPs those of all.

    Raises:
      InputError: for a slice whose devices do not divide the rows.
    """
    traced = cost(step) if traced is None else traced
    compiled = targets.compile(target, step.function, *placed(step, target), donate_argnums=0, dump=dump)
    rows, length = step.batch["tokens"].shape
    return {
        "target": target.name,
        "save": str(step.plan),
        "batch_size": rows,
        "seq_len": length,
        "bytes": account(compiled.memory, step.state, step.base, traced.activations // target.chips),
        "host_bytes": compiled.memory.host,
        "device_bytes": target.memory_bytes,
        "fits": compiled.fits,
        "flops": traced.flops,
        "recompute_flops": traced.recompute_flops,
        "jax": jax.__version__,
    }


def placed(step: Step, target: Target) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """(state, batch) on a target's devices: everything on the only one; on a slice, the batch divided by rows."""
    if target.chips == 1:
        return step.state, step.batch
    rows = step.batch["tokens"].shape[0]
    if rows % target.chips:
        raise InputError(f"batch size {rows}: must be a multiple of the {target.chips} devices of {target.name}")
    mesh = jax.sharding.Mesh(np.asarray(targets.devices(target)), ("data",))

    def on(spec):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    everywhere, by_row = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    return jax.tree.map(on(everywhere), step.state), jax.tree.map(on(by_row), step.batch)


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
    known = {start: total(start)}
    for _ in range(compiles - 1):
        low = max((n for n, size in known.items() if size <= room), default=0)
        high = min((n for n, size in known.items() if size > room), default=None)
        if high == low + quantum or (most is not None and low + quantum > most):
            break
        (n1, s1), (n2, s2) = (
            ([(0, 0), *sorted(known.items())])[-2:]
            if high is None
            else (
                (low, known.get(low, 0)),
                (high, known[high]),
            )
        )
        line = n1 + (room - s1) * (n2 - n1) / max(s2 - s1, 1)
        guess = int(min(max(line, low + quantum), 8 * max(n2, quantum))) // quantum * quantum
        guess = max(guess, low + quantum)
        if high is not None:
            guess = min(guess, high - quantum)
        if most is not None:
            guess = min(guess, most // quantum * quantum)
        if guess in known or guess <= 0:
            break
        known[guess] = total(guess)
    return max((n for n, size in known.items() if size <= room), default=0)


# A budget.


class Option(NamedTuple):
    """A table of actions, and what it costs.

    kept: bytes on the device.  flops: recomputed.  altered: bytes that are compressed or in the host's memory.
    """

    plan: Plan
    kept: int
    flops: float
    altered: int


def options(
    segments: Sequence[Segment], actions: Iterable[str] = ("save",), tokens: int = Plan().tokens
) -> list[Option]:
    """The tables worth considering, least recomputation first: none keeps more for no less recomputation.

    Args:
      segments: of a trace under any plan.
      actions: what may be done with an activation that is not recomputed.
      tokens: of the plans.
    """
    names: list[str] = []
    for segment in segments:
        programs = segment.programs
        names = list(dict.fromkeys([*names, *(name for name, _ in matmuls(programs, (), programs.names))]))
    # The log-sum-exp is of use only with the output that it belongs to.
    groups = [tuple(n for n in names if n in (name, f"{name}_lse")) for name in names if not name.endswith("_lse")]
    found: dict[tuple[float, int], Option] = {}
    for chosen in itertools.product((False, True), repeat=len(groups)):
        saved = {name for group, use in zip(groups, chosen, strict=True) if use for name in group}
        flops, sizes = 0.0, dict.fromkeys((INPUT, *saved), dict.fromkeys(("save", *actions), 0))
        for segment in segments:
            given = [name for name in segment.programs.names if name[0] in saved]
            flops += segment.programs.recompute_flops(given) * segment.steps
            for name in [*segment.programs.work(given)[1], (INPUT, 0)]:
                before = sizes[name[0]]
                sizes[name[0]] = {a: before[a] + segment.stored_bytes(name, a) for a in before}
        read = [name for name in names if name in saved and sizes[name]["save"]]
        for choice in itertools.product(actions, repeat=len(read)):
            table = dict(zip(read, choice, strict=True))
            kept = sizes[INPUT]["save"] + sum(sizes[n][a] for n, a in table.items() if a != "offload")
            altered = sum(sizes[n]["save"] for n, a in table.items() if a != "save")
            option = Option(Plan("blocks", tuple(table.items()), tokens), kept, flops, altered)
            best = found.get((flops, kept))
            if best is None or option.altered < best.altered:
                found[flops, kept] = option
    return _frontier(found.values())


def _frontier(found: Iterable[Option]) -> list[Option]:
    """Least recomputation first, then least altered; left out is what keeps no less than one before it."""
    ordered = sorted(found, key=lambda option: (option.flops, option.altered, option.kept))
    frontier: list[Option] = []
    for option in ordered:
        if not frontier or option.kept < frontier[-1].kept:
            frontier.append(option)
    return frontier


def fit(
    make: Callable[[Plan], Step],
    target: Target,
    budget: int,
    actions: Iterable[str] = ("save",),
    report: Callable[[str], None] = lambda text: None,
    most_compiles: int = 8,
) -> tuple[Step, dict[str, Any]]:
    """The plan with the least recomputation whose compiled total fits the budget, and its row.

    What a step needs besides the kept arrays is learned from the compiler: first with nothing kept but the layers'
    inputs, then from each plan that is tried.

    Args:
      make: plan -> step.
      target: to compile for.
      budget: bytes of one device.
      actions: what may be done with activations besides recomputing them: "save", "compress", "offload".
      report: is told what is tried.
      most_compiles: where the search ends.

    Raises:
      InputError: for a budget below the arguments, or one that no plan fits.
    """
    smallest = make(Plan("blocks"))
    traced = cost(smallest)
    arguments = tree.num_bytes((smallest.state._replace(key=None), smallest.batch))
    if budget <= arguments:
        raise InputError(
            f"--budget {_gib(budget)}: the arguments alone (weights, adapters, optimizer state, batch) take "
            f"{_gib(arguments)}"
        )

    def compiled(plan):
        step = make(plan)
        made = row(step, target)
        report(f"{target.name}: {plan}: {_gib(made['bytes']['total'])}")
        return step, made

    step, best = compiled(Plan("blocks"))
    length = smallest.batch["tokens"].shape[1]
    if best["bytes"]["total"] > budget and Plan().tokens > length:
        step, best = compiled(Plan("blocks", tokens=length))
    if best["bytes"]["total"] > budget:
        raise InputError(f"--budget {_gib(budget)}: the plan that keeps least needs {_gib(best['bytes']['total'])}")
    choice = step
    candidates = options(traced.segments, actions, step.plan.tokens)
    overhead = best["bytes"]["total"] - traced.activations
    for _ in range(most_compiles - 1):
        option = next((option for option in candidates if option.kept + overhead <= budget), None)
        if option is None or option.plan == choice.plan:
            break
        step, made = compiled(option.plan)
        overhead = made["bytes"]["total"] - option.kept
        if made["bytes"]["total"] <= budget:
            choice, best = step, made
            candidates = candidates[: candidates.index(option)]  # only what recomputes less is of interest now
        else:
            candidates = candidates[candidates.index(option) + 1 :]
    return choice, best


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
