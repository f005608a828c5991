"""What a run is for, `--task`: all that differs between texts that are continued and rows that are classified."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import hf
from jaxpeft import method as contract
from jaxpeft.errors import InputError
from jaxpeft.method import Method
from jaxpeft.methods.full import full
from jaxpeft.model import Model
from jaxpeft.models import for_classification
from jaxpeft.models.labels import SCOPE, names
from jaxpeft.special import special_tokens
from jaxpeft.template import Template, choose, find
from jaxpeft.train import evaluate, several
from jaxpeft.train.loss import classification_loss, completion_loss
from jaxpeft.train.run import Run

if TYPE_CHECKING:  # grain takes long to import, and planning reads no data
    from jaxpeft import data


ROUND_SIZE = 500  # as STAR's
_WIDTH = 64  # a multiple of it are tokens in context, which a mesh may divide


class Source(NamedTuple):
    """The files that a run reads: the checkpoint's folder or hub id, and the examples."""

    model: str
    train: str
    validation: str | None


class InContext(NamedTuple):
    """Validation examples behind those of the training data that a model is shown.

    batches: one pass over them, anew each time.  asked: of them, to answer.
    examples, fewer: how many there are, and before how many not all that is shown has room.
    """

    batches: Callable[[], data.Batches]
    asked: list[evaluate.Question]
    examples: int
    fewer: int

    def held(self, rows: Sequence[int]) -> InContext:
        """The same, of which batches are made of some rows alone."""
        whole = self.batches
        return self._replace(batches=lambda: whole().hold(rows))


class Data(NamedTuple):
    """What was read.

    train: batches from the first on.  validation: one pass over the validation examples, anew each time; None without.
    asked: validation examples to answer.  labels: names of what rows are classified as, () for texts.
    reports: what became of the files' lines.  ends: tokens that end an answer.
    template: what conversations and instructions became text by; None where there are none.
    in_context: positions of the model -> what is evaluated with training examples before it; None without.
    """

    train: data.Batches
    validation: Callable[[], data.Batches] | None
    asked: list[evaluate.Question]
    labels: tuple[str, ...]
    reports: dict[str, data.Report]
    ends: tuple[int, ...] = ()
    template: Template | None = None
    in_context: Callable[[int], InContext] | None = None

    def held(self, rows: Sequence[int]) -> Data:
        """The same, of which batches are made of some rows alone."""
        whole = self.validation
        validation = None if whole is None else lambda: whole().hold(rows)
        shown = self.in_context
        in_context = None if shown is None else lambda most: shown(most).held(rows)
        return self._replace(train=self.train.hold(rows), validation=validation, in_context=in_context)

    def batches(self, count: int = 8) -> Iterator[dict[str, Any]]:
        """The first batches of the training data, for a method that calibrates on some; the position stays."""
        place = self.train.get_state()
        try:
            for _ in range(count):
                yield next(self.train)[0]
        finally:
            self.train.set_state(place)


class Task(NamedTuple):
    """One kind of run.

    read: (args, source, tokenizer, order) -> Data; `order` are the label names that the checkpoint knows.
    method: Method -> Method, with what trains besides.
    loss: (model, params, batch, key) -> (loss, aux).
    eval_step: model -> (state, batch) -> what `scores` adds up.
    scores: (eval step, state, batches, number of labels) -> {"loss": ..., further scores of the validation rows}.
    shapes: (config.json's configuration, rows, tokens, packed) -> {name: ShapeDtypeStruct} of a batch.
    counts: what aux["weight"] counts, as metrics.jsonl calls it.
    unit: of the loss.
    """

    read: Callable[..., Data]
    method: Callable[[Method], Method]
    loss: Callable[..., Any]
    eval_step: Callable[..., Any]
    scores: Callable[..., dict[str, float | None]]
    shapes: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    counts: str
    unit: str


# Texts that are continued.


def _read_texts(args: Run, source: Source, tokenizer: Any, order: Any) -> Data:
    from jaxpeft import data
    from jaxpeft.data import by_adapter

    del order
    assert args.seq_len is not None
    own = several.template_of(args) if args.adapters else args.adapter
    names = tuple(several.read(args.adapters))
    template = choose(args.template, tokenizer, args.template_date, find(own, hf.resolve(source.model)))
    special = special_tokens(source.model, tokenizer)  # after `choose`, which may give the tokenizer another template
    read: dict[str, Any] = {"skip_bad_lines": args.skip_bad_lines, "too_long": args.too_long}
    read |= {"special": special, "template": template, "cache": args.data_cache, "adapters": names}
    layout: dict[str, Any] = {"pack": args.pack, "buckets": args.buckets}
    examples, report = data.load_examples(source.train, tokenizer, args.seq_len, **read)
    make = lambda some, seed: data.make_batches(some, args.batch_size, args.seq_len, seed, **layout)
    train: data.Batches
    if names:
        part = lambda some, rows: data.make_batches(some, rows, args.seq_len, args.seed, **layout)
        train = by_adapter.make(examples, names, args.batch_size, args.pack, part, source.train)
    elif args.rounds is None:
        train = make(examples, args.seed)
    else:
        train = data.Rounds(examples, make, args.rounds, args.round_size or ROUND_SIZE, args.seed)
    used = template if report.templated else None
    if not source.validation:
        return Data(train, None, [], (), {"data": report}, special.ends, used)
    held_out, other = data.load_examples(source.validation, tokenizer, args.seq_len, **read)
    asked = evaluate.questions(held_out, args.samples, tokenizer, bool(names))
    evaluation = by_adapter.evaluation if names else data.eval_batches
    validation = functools.partial(evaluation, held_out, args.batch_size, args.seq_len, **layout)
    reports = {"data": report, "eval_data": other}
    if not args.shots:
        return Data(train, validation, asked, (), reports, special.ends, used)
    chat = used is not None and used.kind == "chat"
    blank = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    before = data.shown(examples, args.shots, args.seed, special, blank, whole=chat)
    in_context = functools.partial(_in_context, args, tokenizer, held_out, before, special)
    return Data(train, validation, asked, (), reports, special.ends, used, in_context)


def _in_context(
    args: Run, tokenizer: Any, held_out: Sequence[Any], before: Sequence[Any], special: Any, most: int
) -> InContext:
    from jaxpeft import data

    answered = evaluate.questions(held_out, args.samples, tokenizer)
    examples, fewer = data.in_context(held_out, before, most - evaluate.new_tokens(answered), special)
    longest = max(example.positions for example in examples)
    length = min(-(-longest // _WIDTH) * _WIDTH, most)
    batches = functools.partial(data.eval_batches, examples, args.batch_size, length)
    return InContext(batches, evaluate.questions(examples, args.samples, tokenizer), len(examples), fewer)


def _text_shapes(config: Any, rows: int, length: int, packed: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    del config
    names = ("tokens", "targets", "positions", "example_ids", *(("segment_ids",) if packed else ()))
    shapes = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}
    shapes["sources"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return {**shapes, "loss_weights": jax.ShapeDtypeStruct((rows, length), jnp.float32)}


def _text_scores(step: Any, state: Any, batches: Any, labels: int) -> dict[str, float | None]:
    del labels
    return evaluate.losses(step, state, batches)


# Rows that are classified.


def _read_rows(args: Run, source: Source, tokenizer: Any, order: Any) -> Data:
    from jaxpeft import data

    assert args.seq_len is not None
    read: dict[str, Any] = {"skip_bad_lines": args.skip_bad_lines, "too_long": args.too_long}
    rows, labels, report = data.load_rows(source.train, tokenizer, args.seq_len, order=order, **read)
    collate = functools.partial(data.collate_rows, regression=isinstance(rows[0].label, float))
    layout: dict[str, Any] = {"buckets": args.buckets, "collate": collate}
    train = data.make_batches(rows, args.batch_size, args.seq_len, args.seed, **layout)
    if not source.validation:
        return Data(train, None, [], labels.names, {"data": report})
    held_out, _, other = data.load_rows(source.validation, tokenizer, args.seq_len, labels, **read)
    validation = functools.partial(data.eval_batches, held_out, args.batch_size, args.seq_len, **layout)
    return Data(train, validation, [], labels.names, {"data": report, "eval_data": other})


def _with_classifier(method: Method) -> Method:
    classifier = full(f"^{SCOPE}")
    return method if classifier.specs[0] in method.specs else contract.chain(contract.settled(method), classifier)


def _row_shapes(config: Any, rows: int, length: int, packed: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    del packed
    kind = jnp.float32 if config.num_labels == 1 else jnp.int32
    by_row = {"labels": kind, "weights": jnp.float32, "example_ids": jnp.int32, "sources": jnp.int32}
    shapes = {name: jax.ShapeDtypeStruct((rows,), dtype) for name, dtype in by_row.items()}
    if hasattr(config, "image_size"):
        pixels = (rows, config.image_size, config.image_size, config.num_channels)
        return {**shapes, "pixels": jax.ShapeDtypeStruct(pixels, jnp.float32)}
    names = ("tokens", "positions", "segment_ids", "token_types")
    return {**shapes, **{name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}}


TASKS = {
    "lm": Task(
        read=_read_texts,
        method=lambda method: method,
        loss=completion_loss,
        eval_step=evaluate.make_eval_step,
        scores=_text_scores,
        shapes=_text_shapes,
        counts="target_tokens",
        unit="nats per token",
    ),
    "classify": Task(
        read=_read_rows,
        method=_with_classifier,
        loss=classification_loss,
        eval_step=evaluate.make_classification_eval_step,
        scores=evaluate.classification_scores,
        shapes=_row_shapes,
        counts="rows",
        unit="per row",
    ),
}


def config_for(task: str, config: Mapping[str, Any], num_labels: int | None = None) -> Mapping[str, Any]:
    """A parsed config.json with the head that the task needs.

    Args:
      task: a name of TASKS.
      config: of any family.
      num_labels: for rows that are classified; None: the configuration's own, or 2.
    """
    if task == "lm" or (num_labels is None and names(config)):
        return config
    return for_classification(config, [f"LABEL_{i}" for i in range(num_labels or 2)])


def check_head(task: str, path: str, model: Model, seq_len: int) -> None:
    """Raises InputError if a model is none for the task, or has no positions for so many tokens."""
    if task == "lm" and (model.config.num_labels or model.stack.init_cache is None):
        raise InputError(f"{path}: continues no text; add --task classify")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None or seq_len <= most:
        return
    if not hasattr(model.config, "rope_theta"):
        remedy = ", which are learned: no scaling makes room"
    elif model.config.rope_scaling:
        remedy = ", and scales them already"
    else:
        remedy = f"; --rope-scaling yarn={math.ceil(seq_len / most)} (or linear, dynamic) makes room"
    raise InputError(f"--seq-len {seq_len}: {path} has {most} positions{remedy}")
