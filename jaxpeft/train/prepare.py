"""Everything that a run needs before its first step, made from its arguments.

Whatever can be refused is refused here, before anything is written.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import checkpoint, data, hf, tree
from jaxpeft.errors import InputError
from jaxpeft.memory import residuals
from jaxpeft.memory.plan import parse
from jaxpeft.method import Method, module, setup
from jaxpeft.model import Model
from jaxpeft.peft import import_adapter
from jaxpeft.train import config
from jaxpeft.train.evaluate import Question, questions
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.optimizer import make_optimizer, make_schedule
from jaxpeft.train.state import TrainState, init_state


class Source(NamedTuple):
    """The files that a run reads: the checkpoint's folder or hub id, and the examples."""

    model: str
    train: str
    validation: str | None


class Job(NamedTuple):
    """A run that is ready to begin.

    state: before the first step.
    own: the frozen leaves that the base checkpoint doesn't hold.
    base: the base's paths and shapes, `{path: ShapeDtypeStruct}`.
    train: batches from the first on.  validation: one pass over the validation examples, anew each time; None without.
    asked: validation examples to answer.  reports: what became of the files' lines.
    """

    source: Source
    model: Model
    method: Method
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    tokenizer: Any
    state: TrainState
    own: tree.Flat
    base: Mapping[str, jax.ShapeDtypeStruct]
    train: data.Batches
    validation: Any
    asked: list[Question]
    reports: dict[str, data.Report]
    document: dict[str, Any]


def prepare(args: Any) -> Job:
    """Loads the model and the data, and puts the method on the model.

    Args:
      args: the dataclass of the train command, settled.

    Raises:
      InputError: for arguments or files that cannot be used.
    """
    from jaxpeft.cli.arguments import method_settings

    source = sources(args)
    method = make_method(args.method, method_settings(args)) if args.adapter is None else None
    tokenizer = hf.load_tokenizer(source.model)
    read = {"skip_bad_lines": args.skip_bad_lines, "too_long": args.too_long}
    layout = {"pack": args.pack, "buckets": args.buckets}
    examples, report = data.load_examples(source.train, tokenizer, args.seq_len, **read)
    train = data.make_batches(examples, args.batch_size, args.seq_len, args.seed, **layout)
    reports = {"data": report}
    validation, asked, eval_identity = None, [], None
    if source.validation:
        held_out, report = data.load_examples(source.validation, tokenizer, args.seq_len, **read)
        reports["eval_data"] = report
        asked = questions(held_out, args.samples, tokenizer)
        validation = functools.partial(data.eval_batches, held_out, args.batch_size, args.seq_len, **layout)
        eval_identity = validation().get_state()["identity"]

    base, params = hf.load_pretrained(source.model, jnp.dtype(args.dtype))
    _check_vocabulary(source.model, tokenizer, base)
    flat = tree.flatten(params)
    added: tree.Flat = {}
    if method is None:
        method, added = import_adapter(args.adapter, base.config, params)
    content = {
        "model": config.digest(flat),
        "adapter": config.digest(added) if added else None,
        "data": train.get_state()["identity"],
        "eval_data": eval_identity,
    }
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    model, trainable, frozen = setup(method, base, tree.unflatten({**flat, **added}), init_key)
    plan = residuals.default_plan(model) if args.save is None else parse(args.save)
    model = residuals.remat(model, plan)
    schedule = make_schedule(args.schedule, args.lr, args.steps, args.warmup)
    optimizer = make_optimizer(schedule, args.weight_decay, args.clip)
    state = init_state(method, optimizer, trainable, frozen, run_key)
    if plan.actions:
        _check_names(model, state, args.batch_size // args.accumulate, args.seq_len)
    return Job(
        source=source,
        model=model,
        method=method,
        optimizer=optimizer,
        schedule=schedule,
        tokenizer=tokenizer,
        state=state,
        own=checkpoint.not_in_base(frozen, flat),
        base=jax.eval_shape(lambda: flat),
        train=train,
        validation=validation,
        asked=asked,
        reports=reports,
        document=config.describe(args, method.specs, content),
    )


def _check_names(model: Model, state: TrainState, rows: int, length: int) -> None:
    """Traces the loss, which refuses a plan that names an unknown activation."""
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("tokens", "targets")}
    batch["loss_weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    value = lambda trainable, frozen, batch: completion_loss(model, tree.combine(trainable, frozen), batch)[0]
    jax.eval_shape(jax.grad(value), state.trainable, state.frozen, batch)


def sources(args: Any) -> Source:
    """The files that the arguments name, the embedded ones where they name none."""
    if args.model is not None and args.data is not None:
        return Source(args.model, args.data, args.eval_data)
    from jaxpeft import assets

    validation = args.eval_data if args.data is not None or args.eval_data is not None else str(assets.VALIDATION)
    return Source(args.model or str(assets.MODEL), args.data or str(assets.TRAIN), validation)


def make_method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of a name, with the arguments of its factory.

    Raises:
      InputError: for an unknown name, an argument that the factory doesn't take, or one that it refuses.
    """
    factory = getattr(module(name), name)
    known = list(inspect.signature(factory).parameters)
    for setting in settings:
        if setting not in known:
            raise InputError(f"method {name} takes no {setting}; it takes {', '.join(known)}")
    try:
        return factory(**settings)
    except (TypeError, AttributeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise InputError(f"method {name}: {error} (given {given})") from error


def _check_vocabulary(path: str | Path, tokenizer: Any, model: Model) -> None:
    if len(tokenizer) > model.config.vocab_size:
        size = model.config.vocab_size
        raise InputError(f"{path}: the tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size {size}")
