"""What a fine-tuning step needs on a device that need not be here.

The step is the one that `jaxpeft train` runs, made of shapes alone and compiled by the target's own compiler:

    total = arguments + outputs that reuse no argument + temporaries
    arguments = weights + adapters + optimizer state + batch;   temporaries = gradients + activations + workspace

Weights, adapters, optimizer state, gradients and activations are exact sums over arrays; workspace is the rest of what
the compiler sets aside. FLOPs are those of matrix products (see `flops`).

On a mesh of a target's devices it is the step that `jaxpeft train --mesh` runs there; bytes are those of one device.
What the devices send each other, and how long that takes, is in `pods`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxpeft import compilation, host, sharding, tree, unused_rows
from jaxpeft.adapters import FIELD
from jaxpeft.backward import residuals
from jaxpeft.backward.flops import count_flops, flops_by_name
from jaxpeft.backward.plan import Plan, parse
from jaxpeft.backward.segments import Segment, recorded
from jaxpeft.errors import InputError
from jaxpeft.hf import quantized
from jaxpeft.memory import aot, hlo, targets
from jaxpeft.memory.owners import Owners, step_owners
from jaxpeft.memory.targets import Target
from jaxpeft.memory.traffic import Traffic, traffic
from jaxpeft.method import Method, setup
from jaxpeft.model import Model
from jaxpeft.models import family
from jaxpeft.models.labels import SCOPE
from jaxpeft.train import host_state, in_backward
from jaxpeft.train.memory import account, activation_bytes, gradient_bytes, kept_bytes, on_device
from jaxpeft.train.optimizer import Memory, direction_of, make_direction, make_schedule
from jaxpeft.train.state import TrainState, init_state
from jaxpeft.train.step import in_place, make_train_step, objective_of
from jaxpeft.train.task import TASKS, Task, check_head, config_for
from jaxpeft.unused_rows import TABLE
from pallas_kernels.platform import tracing_for


class Step(NamedTuple):
    """A train step and the shapes that it takes.

    function: (state, batch) -> (state, metrics); it is compiled as `train.step.in_place`.
    state: TrainState of ShapeDtypeStructs.  batch: {name: ShapeDtypeStruct}.
    base: the base model's paths, without a classifier's.  model: under its memory plan.  plan: that plan.
    accumulate: micro-batches.  task: what it is for.  rows, length: of a batch; the length in tokens.
    backward: whether there is a backward pass.  form: how the plan is carried out.
    mesh: of the devices that it runs on; None: one device.
    update_in_backward: whether layers are updated inside the backward pass.
    prune_embeddings: rows of the embedding table that are there; None: all.
    optimizer_memory: "device" or "host".
    away: for each array of the state, whether it lies in the host's memory (`jaxpeft.host`).
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
    mesh: Mesh | None = None
    update_in_backward: bool = False
    prune_embeddings: int | None = None
    optimizer_memory: str = "device"
    away: Any = None

    @property
    def host(self) -> frozenset[str]:
        """The paths of the moved leaves that lie in the host's memory."""
        return frozenset(path for path, leaf in self.away.moved.items() if any(jax.tree.leaves(leaf)))

    @property
    def shards(self) -> int:
        """Devices over which the rows are divided."""
        return sharding.num_shards(self.mesh)


def make_step(
    config: Mapping[str, Any],
    method: Method,
    batch_size: int,
    seq_len: int,
    save: str | Plan | None = None,
    dtype: Any = jnp.bfloat16,
    packed: bool = True,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    task: str = "lm",
    num_labels: int | None = None,
    form: residuals.Form = "loops",
    optimizer: str | None = None,
    update_in_backward: bool = False,
    prune_embeddings: int | None = None,
    optimizer_memory: Memory = "device",
    several: bool = False,
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
      mesh: of the devices that it runs on (`sharding.make_mesh`); None: one device.
      task: a name of `jaxpeft.train.task.TASKS`.
      num_labels: that rows are classified as; None: those of the configuration, or 2.
      form: how the plan is carried out (see `residuals.remat`).
      optimizer: of `jaxpeft.train.optimizer.Direction`; None: the method's own.
      update_in_backward: whether layers are updated inside the backward pass.
      prune_embeddings: rows of the embedding table that are there; None: all.
      optimizer_memory: where the optimizer's state of matrices lies, "device" or "host".
      several: whether the method is of several adapters, and the batch says whose each row is.

    Raises:
      InputError: for a configuration, method or plan that cannot be used, or rows that the mesh does not divide.
    """
    sharding.check_rows(mesh, batch_size, accumulate, seq_len)
    own, config = TASKS[task], config_for(task, config, num_labels)
    base, method = family(config).from_hf(config, dtype), own.method(method)
    check_head(task, config["model_type"], base, seq_len)
    key = jax.eval_shape(lambda: jax.random.key(0))
    plain = tree.flatten(jax.eval_shape(lambda key: base.init(key, {}), key))
    of_base = tree.unflatten(quantized.shapes_of(config, base.config, plain))
    if prune_embeddings is not None:
        base = _with_rows(prune_embeddings, base, tree.flatten(of_base), method, optimizer)
    model, trainable, rest = _set_up(method, base, key, of_base)
    if prune_embeddings is not None:
        trainable, rest = _cut(trainable, prune_embeddings), _cut(rest, prune_embeddings)
    backward = objective_of(model, method, {**rest, **trainable}, own.loss).backward
    plan = residuals.default_plan(model, backward) if save is None else parse(save)
    model = residuals.remat(model, plan, sharding.num_shards(mesh), form, method.changes)
    if update_in_backward:
        in_backward.check(model, method, accumulate, trainable)
    clip = {"clip": None} if update_in_backward else {}
    direction = make_direction(direction_of(method.specs, optimizer), **clip, memory=optimizer_memory)
    if optimizer_memory == "host":
        host_state.check(model, method, direction, {**rest, **trainable})
    state, away = _first_state(method, direction, model, trainable, rest, key)
    batch = own.shapes(base.config, batch_size, seq_len, packed)
    if several:
        batch = {**batch, FIELD: jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    schedule = make_schedule("cosine", 2e-4, 1000, 10)
    moving: dict[str, Any] = {"rate": schedule, "update_in_backward": update_in_backward}
    function = make_train_step(model, method, direction, own.loss, accumulate, **moving)
    paths = frozenset(path for path in tree.flatten(of_base) if not path.startswith(SCOPE))
    length = seq_len if "tokens" in batch else base.config.num_patches + 1
    objective_of(model, method, state.leaves, own.loss)  # refuses a plan that would have no effect
    rows = (accumulate, own, batch_size, length)
    made = Step(function, state, batch, paths, model, plan, *rows, backward, form, mesh, update_in_backward)
    return made._replace(prune_embeddings=prune_embeddings, optimizer_memory=optimizer_memory, away=away)


def _with_rows(count: int, base: Model, shapes: tree.Flat, method: Method, optimizer: str | None) -> Model:
    """The base with so many rows of its embedding table, as `train --prune-embeddings` has it."""
    unused_rows.check_still(method, direction_of(method.specs, optimizer))
    unused_rows.check(base, shapes)
    if count > (total := shapes[TABLE].shape[0]):
        raise InputError(f"--prune-embeddings {count}: {TABLE} has {total} rows")
    return unused_rows.with_rows(base, np.arange(count), total)


def _cut(leaves: tree.Flat, count: int) -> tree.Flat:
    """Shapes of leaves, of the embedding table of so many rows."""
    if TABLE not in leaves:
        return leaves
    table = leaves[TABLE]
    return {**leaves, TABLE: jax.ShapeDtypeStruct((count, *table.shape[1:]), table.dtype)}


def _first_state(
    method: Method, direction: Any, model: Model, trainable: tree.Flat, rest: tree.Flat, key: Any
) -> tuple[TrainState, Any]:
    """`init_state` on shapes, and which of its arrays lie in the host's memory."""
    found: list[Any] = []

    def make(trainable, rest, key):
        state = init_state(method, direction, trainable, rest, key, model)
        found.append(jax.tree.map(host.holds, state))
        return state

    return jax.eval_shape(make, trainable, rest, key), found[0]


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
    with recorded() as segments, on_mesh(step):
        # A function of its own, which JAX has not traced before.
        flops = count_flops(jax.make_jaxpr(lambda *args: step.function(*args))(step.state, step.batch))
    if not step.backward:
        return Cost(flops, 0.0, 0, 0, {})
    again = step.accumulate * sum(segment.recompute_flops() for segment in segments.values())
    activations = activation_bytes(segments, step.model, step.state, step.batch, step.accumulate, step.task.loss)
    return Cost(flops, again, activations, kept_bytes(segments, "host"), segments)


def on_mesh(step: Step) -> contextlib.AbstractContextManager[Any]:
    """What is traced in it is traced for the step's mesh."""
    return contextlib.nullcontext() if step.mesh is None else jax.set_mesh(step.mesh)


def products(step: Step, target: Target) -> dict[str, float]:
    """{name stack: FLOPs} of a step's matrix products, of one device."""
    with on_mesh(step):
        found = flops_by_name(jax.make_jaxpr(lambda *args: step.function(*args))(step.state, step.batch))
    return {name: count / target.chips for name, count in found.items()}


def owners(step: Step) -> Owners:
    """Of the arguments and results of a step."""
    with on_mesh(step):
        metrics = jax.eval_shape(step.function, step.state, step.batch)[1]
    return step_owners(step.state, step.batch, step.base, metrics)


def moved(step: Step, target: Target, dump: Path) -> Traffic:
    """What a step moves whose compilation for a target filled the folder `dump`."""
    return traffic(hlo.read(dump), owners(step), target=target, flops=products(step, target))


def moving(step: Step, target: Target, traced: Cost | None = None) -> dict[str, Any]:
    """A row of the plan (`row`) with what the step moves: the totals of `Traffic.to_json` as "traffic"."""
    with tempfile.TemporaryDirectory(prefix="jaxpeft-plan-") as dump:
        made = row(step, target, traced, dump)
        found = moved(step, target, Path(dump)).to_json(0)
    return {**made, "traffic": totals(found)}


def totals(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a document about traffic, what a row of the plan tells."""
    return {name: value for name, value in found.items() if not isinstance(value, list)}


def row(step: Step, target: Target, traced: Cost | None = None, dump: Any = None) -> dict[str, Any]:
    """A row of the plan: the step compiled for a target.

    Args:
      step: with a mesh of the target's devices where there are several.
      target: to compile for.
      traced: the step's `cost`, where it is known.
      dump: a folder for XLA's files.

    Returns:
      {"target", "save", "remat", "update_in_backward", "optimizer_memory", "batch_size", "seq_len", "bytes": {...},
      "host_bytes", "device_bytes", "fits", "flops", "recompute_flops", "jax"}; bytes are those of one device, FLOPs
      those of all; device_bytes is what a run may take of the device's memory.

    Raises:
      ValueError: for a target of several devices and a step without a mesh of them.
      InputError: for a parameter of the base that no rule of the mesh's names.
    """
    devices = 1 if step.mesh is None else step.mesh.size
    if devices != target.chips:
        raise ValueError(f"a step of {devices} device(s), and {target.name} has {target.chips}: give it their mesh")
    traced = cost(step) if traced is None else traced
    compiled = aot.compile_lowered(target, lowered(step, target), dump, compilation.options(target.platform))
    state, _ = local(step)
    gradients = gradient_bytes(state.trainable, step.update_in_backward) if step.backward else 0
    state = on_device(state, step.away)
    return {
        "target": target.name,
        "save": str(step.plan),
        "remat": step.form,
        "update_in_backward": step.update_in_backward,
        "optimizer_memory": step.optimizer_memory,
        "batch_size": step.rows,
        "seq_len": step.length,
        "bytes": account(compiled.memory, state, step.base, traced.activations // step.shards, gradients),
        "host_bytes": compiled.memory.host,
        "device_bytes": target.usable_bytes,
        "fits": compiled.fits,
        "flops": traced.flops,
        "recompute_flops": traced.recompute_flops,
        "jax": jax.__version__,
        **({} if step.prune_embeddings is None else {"prune_embeddings": step.prune_embeddings}),
    }


def lowered(step: Step, target: Target) -> Any:
    """The step as a run lowers it, for a target's devices: what changes takes the place, and lies, as what it was."""
    with tracing_for(target.platform, targets.devices(target)[0]):
        if step.mesh is None:
            device = SingleDeviceSharding(targets.devices(target)[0])
            changing, *rest = aot.abstract((*step.state.parted, step.batch), device)
            some = any(jax.tree.leaves(step.away))
            if target.platform == "tpu":  # a described GPU shows no memories; the step itself puts arrays there
                changing = jax.tree.map(_lying, changing, step.away._replace(frozen={}))
            options: dict[str, Any] = {"donate_argnums": 0, "keep_unused": some}
            lowered = jax.jit(in_place(step.function), **options).lower(changing, *rest)
            return aot.in_host_memory(lowered) if some else lowered
        state, batch = placed(step)
        if target.platform == "tpu":
            lying = jax.tree.map(_lying, state._replace(frozen={}), step.away._replace(frozen={}))
            state = lying._replace(frozen=state.frozen)
        there = jax.tree.map(lambda x: x.sharding, state.parted[0])
        with on_mesh(step):
            function = jax.jit(in_place(step.function), donate_argnums=0, out_shardings=(there, None))
            lowered = function.lower(*state.parted, batch)
            return aot.in_host_memory(lowered) if any(jax.tree.leaves(step.away)) else lowered


def _lying(x: jax.ShapeDtypeStruct, away: bool) -> jax.ShapeDtypeStruct:
    """An array, in its host's memory if it lies away."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host.of(x.sharding)) if away else x


def placed(step: Step) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """(state, batch) as they lie on the step's mesh."""
    mesh = step.mesh
    if mesh is None:
        return step.state, step.batch
    shardings = sharding.of_state(mesh, step.state, step.base), sharding.of_batch(mesh, step.batch)
    on = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(on, (step.state, step.batch), shardings)


def local(step: Step) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """(state, batch) as one device has them."""
    if step.mesh is None:
        return step.state, step.batch
    own = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    return jax.tree.map(own, placed(step))
