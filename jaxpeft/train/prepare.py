"""Everything that a run needs before its first step, made from its `Run`.

Whatever can be refused is refused here, before anything is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxpeft import checkpoint, hf, sharding, shares, template, tree, unused_rows
from jaxpeft.backward import residuals
from jaxpeft.backward.plan import parse
from jaxpeft.data.records import ADAPTER
from jaxpeft.data.sources import find, is_named
from jaxpeft.errors import InputError
from jaxpeft.method import Method, setup
from jaxpeft.model import Model
from jaxpeft.models.labels import SCOPE, names
from jaxpeft.peft import adapter_labels, import_adapter
from jaxpeft.special import check_vocabulary
from jaxpeft.train import config, host_state, in_backward, several
from jaxpeft.train.base import load
from jaxpeft.train.optimizer import Direction, direction_of, make_direction, make_schedule
from jaxpeft.train.progress import say
from jaxpeft.train.run import Run
from jaxpeft.train.state import TrainState, init_state
from jaxpeft.train.step import objective_of
from jaxpeft.train.task import TASKS, Data, Source, Task, check_head
from jaxpeft.unused_rows import TABLE


class Job(NamedTuple):
    """A run that is ready to begin.

    state: before the first step.
    own: the frozen leaves that the base checkpoint doesn't hold.
    base: the base's paths and shapes, `{path: ShapeDtypeStruct}`; a classifier of rows is no part of it.
    mesh: that the state lies on; None: one device.
    rows: of a batch, those that this process holds; None: all of them.
    pruned: the embedding table's rows; None: all are in the state.
    adapters: the several that the run trains; None: one, or none.
    """

    source: Source
    task: Task
    data: Data
    model: Model
    method: Method
    direction: Direction
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    weight_decay: float
    tokenizer: Any
    state: TrainState
    own: tree.Flat
    base: Mapping[str, jax.ShapeDtypeStruct]
    document: dict[str, Any]
    mesh: Mesh | None = None
    rows: shares.Rows | None = None
    pruned: unused_rows.Pruned | None = None
    adapters: several.Adapters | None = None

    def whole(self, state: TrainState) -> TrainState:
        """A state with all rows of the embedding table, on its devices."""
        if self.pruned is None:
            return state
        table = jnp.asarray(unused_rows.filled(self.pruned.table, self.pruned.ids, state.leaves[TABLE]))
        if self.mesh is not None:
            table = shares.placed(table, sharding.of_leaves(self.mesh, {TABLE: table}, {TABLE})[TABLE])
        if TABLE in state.trainable:
            return state._replace(trainable={**state.trainable, TABLE: table})
        return state._replace(frozen={**state.frozen, TABLE: table})


def prepare(args: Run, continued: bool = False) -> Job:
    """Loads the model and the data, and puts the method on the model.

    Args:
      args: the run, settled.
      continued: whether the state is going to be a checkpoint's. What a method calculates from data for its start is
        not calculated again then, and leaves of that have the right shapes alone.

    Raises:
      InputError: for arguments or files that cannot be used.
    """
    if args.task == "lm" and args.template_date is None:  # written down: a run resumed tomorrow has the same texts
        args = dataclasses.replace(args, template_date=template.today())
    assert args.seq_len is not None and args.lr is not None
    source, task, method = sources(args), TASKS[args.task], asked_method(args)
    plan = None if args.save is None else parse(args.save)
    asked = args.mesh
    if asked == "auto":
        asked = sharding.auto(jax.device_count(), args.batch_size, args.seq_len, args.accumulate)
        say(f"--mesh auto: {asked}")
    mesh = shares.make_mesh(asked)
    sharding.check_rows(mesh, args.batch_size, args.accumulate, args.seq_len)
    check_given(source)
    tokenizer = hf.load_tokenizer(source.model)
    order = names(hf.load_config(source.model)) if args.adapter is None else adapter_labels(args.adapter)
    data = task.read(args, source, tokenizer, order)
    if args.adapter is not None:
        _check_labels(args.adapter, order, source.train, data.labels)
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    classifier_key = jax.random.fold_in(init_key, 0)
    away = lambda path: method is not None and method.role(path).host
    how = (data.labels, classifier_key, args.rope_scaling, shares.placement(mesh, away))
    base, params, model_digest = load(source.model, jnp.dtype(args.dtype), method, *how)
    check_head(args.task, source.model, base, args.seq_len)
    check_vocabulary(source.model, tokenizer, base.config.vocab_size)
    flat = tree.flatten(params)
    own_of_base = {path: leaf for path, leaf in flat.items() if not path.startswith(SCOPE)}
    added: tree.Flat = {}
    adapters = several.made(args) if args.adapters else None
    if method is None and args.adapters:
        adapters, added = several.going_on(args, base, params)
        method = adapters.method
    elif method is None:
        assert args.adapter is not None
        method, added = import_adapter(args.adapter, base.config, params)
        method = task.method(method)
    content = {
        "model": model_digest,
        "adapter": config.digest(added) if added else None,
        "data": data.train.get_state()["identity"],
        "eval_data": data.validation().get_state()["identity"] if data.validation else None,
        "template": data.template.digest() if data.template else None,
    }
    pruned = _pruned(args, method, base, params, data) if args.prune_embeddings else None
    if pruned is not None:
        base = pruned.model
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        batches = (lambda: ()) if continued else functools.partial(shares.whole_batches, mesh, data.batches)
        model, trainable, rest = setup(method, base, tree.unflatten({**flat, **added}), init_key, batches)
    if pruned is not None:  # what the method started from is the whole table
        trainable, rest = pruned.cut(trainable), pruned.cut(rest)
        flat[TABLE] = rest.get(TABLE, flat[TABLE])
    if plan is None:
        backward = objective_of(model, method, {**rest, **trainable}, task.loss).backward
        plan = residuals.default_plan(model, backward)
    model = residuals.remat(model, plan, sharding.num_shards(mesh), args.remat, method.changes)
    if args.optimizer_memory == "host":
        host_state.check_device(jax.devices()[0])
    if args.update_in_backward:
        in_backward.check(model, method, args.accumulate, trainable)
    schedule = make_schedule(args.schedule, args.lr, args.steps, args.warmup)
    direction = direction_of(method.specs, args.optimizer)
    optimizer = make_direction(direction, args.clip, args.optimizer_memory)
    if args.optimizer_memory == "host":
        host_state.check(model, method, optimizer, {**rest, **trainable})
    state = init_state(method, optimizer, trainable, rest, run_key, model)
    objective_of(model, method, state.leaves, task.loss)  # refuses what would have no effect
    if mesh is not None:
        state = shares.placed(state, sharding.of_state(mesh, state, own_of_base))
    rows = shares.rows_of(mesh, args.batch_size)
    if plan.actions:
        _check_names(task, model, state, args.batch_size // args.accumulate, args.seq_len, bool(args.adapters))
    return Job(
        source=source,
        task=task,
        data=data if rows is None else data.held(rows.here.tolist()),
        model=model,
        method=method,
        direction=direction,
        optimizer=optimizer,
        schedule=schedule,
        weight_decay=args.weight_decay or 0.0,
        tokenizer=tokenizer,
        state=state,
        own=checkpoint.not_in_base(state.frozen, flat),
        base=jax.eval_shape(lambda: own_of_base),
        document=config.describe(
            args,
            method.specs if adapters is None else adapters.specs,
            content,
            data.labels,
            data.template,
            None if pruned is None else unused_rows.spelt(pruned.ids),
            None if adapters is None else adapters.document(),
        ),
        mesh=mesh,
        rows=rows,
        pruned=pruned,
        adapters=adapters,
    )


def _pruned(args: Run, method: Method, base: Model, params: tree.Params, data: Data) -> unused_rows.Pruned:
    """The base with the rows of its table that the data name.

    Raises:
      InputError: for a base without such a table, and where rows that leave would not have stayed as they were.
    """
    unused_rows.check_still(method, direction_of(method.specs, args.optimizer), args.weight_decay)
    parts = [data.train.used(), *([data.validation().used()] if data.validation else [])]
    if data.in_context is not None:  # what is put between examples need not be in one
        parts.append(data.in_context(base.config.max_position_embeddings).batches().used())
    pruned = unused_rows.prune_embeddings(base, params, np.unique(np.concatenate(parts)))
    say(f"--prune-embeddings: {len(pruned.ids)} of {len(pruned.table)} rows of {TABLE} are used by the data")
    return pruned


def _check_names(task: Task, model: Model, state: TrainState, rows: int, length: int, several: bool) -> None:
    """Traces the loss, which refuses a plan that names an unknown activation."""
    value = lambda trainable, rest, batch: task.loss(model, tree.combine(trainable, rest), batch)[0]
    batch = task.shapes(model.config, rows, length) | (
        {ADAPTER: jax.ShapeDtypeStruct((rows,), jnp.int32)} if several else {}
    )
    jax.eval_shape(jax.grad(value), state.trainable, {**state.frozen, **state.moved}, batch)


def sources(args: Run) -> Source:
    """The files that the arguments name, the embedded ones where they name none."""
    if args.model is not None and args.data is not None:
        return Source(args.model, args.data, args.eval_data)
    from jaxpeft import assets

    validation = args.eval_data if args.data is not None or args.eval_data is not None else str(assets.VALIDATION)
    return Source(args.model or str(assets.MODEL), args.data or str(assets.TRAIN), validation)


def check_given(source: Source) -> None:
    """Raises InputError for a file of rows that is not there or of no kind that is read, before anything is loaded."""
    for given in (source.train, source.validation):
        if given is not None and (os.path.exists(given) or is_named(Path(given))):
            find(given)


def asked_method(args: Run) -> Method | None:
    """The method that the run names, with what its task trains besides; None where an adapter brings its own.

    Raises:
      InputError: for an unknown name, or an argument that no factory takes or that one refuses.
    """
    method = args.make_method()
    return None if method is None else TASKS[args.task].method(method)


def _check_labels(adapter: Path, known: Sequence[str], path: str, found: Sequence[str]) -> None:
    """Refuses rows whose labels are not those of the adapter, unless it does not name its own."""
    named = [name for i, name in enumerate(known) if name != f"LABEL_{i}"]
    if known and (len(known) != len(found) or (named and set(known) != set(found))):
        theirs, ours = (", ".join(labels[:8]) + ", ..." * (len(labels) > 8) or "none" for labels in (known, found))
        raise InputError(f"--adapter {adapter}: has the labels {theirs}; {path} has {ours}")
