"""What a fine-tuning step needs on a device that need not be here.

The step is the one that `jaxpeft train` runs, made of shapes alone and compiled by the target's own compiler:

    total = arguments + outputs that reuse no argument + temporaries
    arguments = weights + adapters + optimizer state + batch;   temporaries = gradients + activations + workspace

Weights, adapters, optimizer state, gradients and activations are exact sums over arrays; workspace is the rest of what
the compiler sets aside. FLOPs are those of matrix products (see `flops`).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.backward import residuals
from jaxpeft.backward.flops import count_flops, flops_by_name
from jaxpeft.backward.plan import Plan, parse
from jaxpeft.backward.residuals import Segment
from jaxpeft.errors import InputError
from jaxpeft.memory import hlo, targets
from jaxpeft.memory.owners import step_owners
from jaxpeft.memory.targets import Target
from jaxpeft.memory.traffic import Traffic, traffic
from jaxpeft.method import Method, setup
from jaxpeft.model import Model
from jaxpeft.models import family
from jaxpeft.models.labels import SCOPE
from jaxpeft.train.memory import account, activation_bytes, kept_bytes
from jaxpeft.train.optimizer import defaults, make_direction, make_schedule
from jaxpeft.train.state import TrainState, init_state
from jaxpeft.train.step import in_place, make_train_step, objective_of
from jaxpeft.train.task import TASKS, Task, check_head, config_for


class Step(NamedTuple):
    """A train step and the shapes that it takes.

    function: (state, batch) -> (state, metrics); it is compiled as `train.step.in_place`.
    state: TrainState of ShapeDtypeStructs.  batch: {name: ShapeDtypeStruct}.
    base: the base model's paths, without a classifier's.  model: under its memory plan.  plan: that plan.
    accumulate: micro-batches.  task: what it is for.  rows, length: of a batch; the length in tokens.
    backward: whether there is a backward pass.  form: how the plan is carried out.
    """

    function: Callable[..., Any]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    base: frozenset[str]
    model: Model
    plan: Plan
    accumulate: int
    task: Task
    rows: int
    length: int
    backward: bool
    form: residuals.Form = "loops"


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
    task: str = "lm",
    num_labels: int | None = None,
    form: residuals.Form = "loops",
) -> Step:
    """The step of `jaxpeft train` for a model's configuration; nothing is allocated.

    Args:
      config: a parsed config.json.
      method: what to train.
      batch_size: rows of a step.  seq_len: tokens of a row; an image's follow from its size.
      save: the memory plan; None: `residuals.default_plan`.
      dtype: of frozen weights and of the computation.
      packed: whether rows hold several examples (and so come with segment ids).
      accumulate: micro-batches.
      shards: devices over which the rows are divided.
      task: a name of `jaxpeft.train.task.TASKS`.
      num_labels: that rows are classified as; None: those of the configuration, or 2.
      form: how the plan is carried out (see `residuals.remat`).

    Raises:
      InputError: for a configuration, method or plan that cannot be used.
    """
    own, config = TASKS[task], config_for(task, config, num_labels)
    base, method = family(config).from_hf(config, dtype), own.method(method)
    check_head(task, config["model_type"], base, seq_len)
    key = jax.eval_shape(lambda: jax.random.key(0))
    of_base = jax.eval_shape(lambda key: base.init(key, {}), key)
    model, trainable, rest = _set_up(method, base, key, of_base)
    plan = residuals.default_plan(model) if save is None else parse(save)
    model = residuals.remat(model, plan, shards, form, method.changes)
    optimizer = make_direction(defaults(method.specs).direction or "adam")
    state = jax.eval_shape(functools.partial(init_state, method, optimizer, model=model), trainable, rest, key)
    batch = own.shapes(base.config, batch_size, seq_len, packed)
    schedule = make_schedule("cosine", 2e-4, 1000, 10)
    function = make_train_step(model, method, optimizer, own.loss, accumulate, rate=schedule)
    paths = frozenset(path for path in tree.flatten(of_base) if not path.startswith(SCOPE))
    length = seq_len if "tokens" in batch else base.config.num_patches + 1
    backward = objective_of(model, method, state.leaves, own.loss).backward
    return Step(function, state, batch, paths, model, plan, accumulate, own, batch_size, length, backward, form)


def _set_up(method: Method, base: Model, key: Any, params: Any) -> tuple[Model, tree.Flat, tree.Flat]:
    """`setup` on shapes."""
    found: list[Model] = []

    def shapes(key, params):
        model, trainable, rest = setup(method, base, params, key, batches=lambda: ())
        found.append(model)
        return trainable, rest

    trainable, rest = jax.eval_shape(shapes, key, params)
    return found[0], trainable, rest


class Cost(NamedTuple):
    """What a step's trace tells, without a compiler.

    flops: of its matrix products, recomputation included.
    recompute_flops: of products that the backward pass computes again.
    activations: bytes that are kept for the backward pass on the device; host: likewise in the host's memory.
    segments: the layers as they were traced, of one micro-batch; {} under plain autodiff.
    """

    flops: float
    recompute_flops: float
    activations: int
    host: int
    segments: dict[str, Segment]


def cost(step: Step) -> Cost:
    """Traces a step."""
    with residuals.recorded() as segments:
        # A function of its own, which JAX has not traced before.
        flops = count_flops(jax.make_jaxpr(lambda *args: step.function(*args))(step.state, step.batch))
    if not step.backward:
        return Cost(flops, 0.0, 0, 0, {})
    again = step.accumulate * sum(segment.recompute_flops() for segment in segments.values())
    activations = activation_bytes(segments, step.model, step.state, step.batch, step.accumulate, step.task.loss)
    return Cost(flops, again, activations, kept_bytes(segments, "host"), segments)


def products(step: Step, target: Target) -> dict[str, float]:
    """{name stack: FLOPs} of a step's matrix products, of one device."""
    found = flops_by_name(jax.make_jaxpr(lambda *args: step.function(*args))(step.state, step.batch))
    return {name: count / target.chips for name, count in found.items()}


def moved(step: Step, target: Target, dump: Path) -> Traffic:
    """What a step moves whose compilation for a target filled the folder `dump`."""
    metrics = jax.eval_shape(step.function, step.state, step.batch)[1]
    owners = step_owners(step.state, step.batch, step.base, metrics)
    return traffic(hlo.read(dump), owners, target=target, flops=products(step, target))


def moving(step: Step, target: Target, traced: Cost | None = None) -> dict[str, Any]:
    """A row of the plan (`row`) with what the step moves: the totals of `Traffic.to_json` as "traffic"."""
    with tempfile.TemporaryDirectory(prefix="jaxpeft-plan-") as dump:
        made = row(step, target, traced, dump)
        found = moved(step, target, Path(dump)).to_json(0)
    return {**made, "traffic": {name: value for name, value in found.items() if not isinstance(value, list)}}


def row(step: Step, target: Target, traced: Cost | None = None, dump: Any = None) -> dict[str, Any]:
    """A row of the plan: the step compiled for a target. On a slice, rows are divided over its devices.

    Returns:
      {"target", "save", "remat", "batch_size", "seq_len", "bytes": {...}, "host_bytes", "device_bytes", "fits",
      "flops", "recompute_flops", "jax"}; bytes are those of one device, FLOPs those of all; device_bytes is what a
      run may take of the device's memory.

    Raises:
      InputError: for a slice whose devices do not divide the rows.
    """
    traced = cost(step) if traced is None else traced
    state, batch = placed(step, target)
    compiled = targets.compile(target, in_place(step.function), *state.parted, batch, donate_argnums=0, dump=dump)
    return {
        "target": target.name,
        "save": str(step.plan),
        "remat": step.form,
        "batch_size": step.rows,
        "seq_len": step.length,
        "bytes": account(compiled.memory, step.state, step.base, traced.activations // target.chips, step.backward),
        "host_bytes": compiled.memory.host,
        "device_bytes": target.usable_bytes,
        "fits": compiled.fits,
        "flops": traced.flops,
        "recompute_flops": traced.recompute_flops,
        "jax": jax.__version__,
    }


def placed(step: Step, target: Target) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """(state, batch) on a target's devices: everything on the only one; on a slice, the batch divided by rows."""
    if target.chips == 1:
        return step.state, step.batch
    if step.rows % target.chips:
        raise InputError(f"batch size {step.rows}: must be a multiple of the {target.chips} devices of {target.name}")
    mesh = jax.sharding.Mesh(np.asarray(targets.devices(target)), ("data",))

    def on(spec):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    everywhere, by_row = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    return jax.tree.map(on(everywhere), step.state), jax.tree.map(on(by_row), step.batch)
