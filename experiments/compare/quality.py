"""What each method learns of the same data in the same number of steps: real data, real pretrained models.

    task        model, data                                                           steps           scored by
    e2e_nlg     stories260K; E2E NLG, rows of at most 256 tokens, packed              120 of 4 x 256  nats a token
    induction   SmolLM2-135M-Instruct; 20 tasks of Instruction Induction, packed      48 of 4 x 64    nats, exact match
    sentiment   the same model; one of these tasks, positive or negative, packed      48 of 4 x 64    exact match, nats
    banking77   all-MiniLM-L6-v2, its pooler and a new classifier; 10 rows an intent  2 epochs of 16  accuracy
    qnli        the same model; the first 1,000 rows                                  2 epochs of 16  accuracy
    mnli        the same model; the first 1,500 rows                                  2 epochs of 16  accuracy

The first is for every method, the others, which are dearer, for some (FEW): the first alone has some 650 runs.

One grid of rates for all, quarters of decades: the search begins at a method's default rate (else 0.003, full
fine-tuning 0.0003) and walks downhill in the loss on held-out rows of seed 0, first two grid points at a time, then one
(e2e_nlg, banking77; the others two alone), until both neighbours of the best are worse. On qnli and mnli, where a low
default rate leaves an adapter at chance and nothing leads a walk away, another begins at 0.003, and the better end
counts. A rate that is worse than one before it is not tested further. Seeds 0, 1, 2 (induction and sentiment: 0, 1) at
the best rate differ in order of data and in what the method draws; at the same seed all methods see the same batches.
AdamW without weight decay (a method's own direction where it has one), clipped at norm 1, 10 % warm-up, then linearly
to zero; float32.

Induction's rows have the headings of `instruction_prompt`; its test rows are every fourth of the test file (sentiment:
all 50), and a greedy answer of at most 16 tokens counts where it is the reference. `base` is the model as it was, `icl`
the same with 8 training rows before each question, drawn anew for each seed; `probe` trains a new classifier alone, of
sentiment in place of the model's head, on the last token of the prompt: its loss is a row's.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from experiments import lora_fa_quality
from experiments.compare import contestants
from experiments.memory import common
from experiments.tuning import place, rate, search
from jaxpeft import assets, data, tree
from jaxpeft.errors import InputError
from jaxpeft.hf import load_tokenizer
from jaxpeft.method import Method
from jaxpeft.special import special_tokens
from jaxpeft.template import choose
from jaxpeft.train import evaluate
from jaxpeft.train.compiled import Compiled
from jaxpeft.train.optimizer import defaults, make_direction, make_schedule
from jaxpeft.train.task import TASKS

FIRST, FULL = 3e-3, 3e-4  # where the search for a rate begins without a default; of full fine-tuning
SENTIMENT = "ii_sentiment"  # what the rows of that task are called
SHOTS, MOST = 8, 2048  # rows in context, and tokens of a row with them
QUESTIONS, ANSWER = 256, 16  # test rows that are answered at most, and tokens of an answer


class Protocol(NamedTuple):
    """How a task is learned.

    kind: a name of jaxpeft.train.task.TASKS.
    model: stories260K, SmolLM2-135M or MiniLM.
    rows: of the training file, the first; of each label where `per_label`; None: all.
    batch, tokens: rows of a batch, tokens of a row.
    steps: of the optimizer; None: `epochs` over the rows.
    scores: what the table shows, keys of the figures; the first is drawn.
    minutes: of one core for a run, measured with LoRA, for `--count`.
    seeds: of the runs at the best rate.
    strides: of the search for it, in grid points.
    starts: rates at which the search of an adapter begins as well as at its own.
    """

    kind: str
    model: str
    rows: int | None
    batch: int
    tokens: int
    steps: int | None
    scores: tuple[str, ...]
    minutes: float
    epochs: int = 2
    per_label: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    strides: tuple[int, ...] = (2, 1)
    starts: tuple[float, ...] = ()


DATA = {
    "e2e_nlg": Protocol("lm", "stories260K", None, 4, 256, 120, ("loss",), 0.3),
    "induction": Protocol("lm", "SmolLM2-135M", None, 4, 64, 48, ("loss", "exact"), 3.5, seeds=(0, 1), strides=(2,)),
    "sentiment": Protocol("lm", "SmolLM2-135M", None, 4, 64, 48, ("exact", "loss"), 4.7, seeds=(0, 1), strides=(2,)),
    "banking77": Protocol("classify", "MiniLM", 10, 16, 32, None, ("accuracy",), 0.5, per_label=True),
    "qnli": Protocol("classify", "MiniLM", 1000, 16, 64, None, ("accuracy",), 1.0, strides=(2,), starts=(FIRST,)),
    "mnli": Protocol("classify", "MiniLM", 1500, 16, 64, None, ("accuracy",), 1.3, strides=(2,), starts=(FIRST,)),
}
BETTER = {"loss": "less", "exact": "more", "accuracy": "more"}  # of a score
# Whom a task is for where CPU hours are dear. All others: every method.
CLASSIFIERS = ("probe", "full", "lora", "lora_fa", "dora", "ia3", "bitfit", "ln_tuning", "pfeiffer", "prefix", "vqt")
FEW = {
    **dict.fromkeys(("banking77", "qnli", "mnli"), CLASSIFIERS),
    "induction": ("base", "full", "lora", "lora_fa", "dora", "ia3", "prefix", "lst"),
    "sentiment": ("base", "icl", "probe", "lora", "mezo", "mezo+lora", "sparse_mezo"),
}


class Rows(NamedTuple):
    """train, tune, test: examples; no prompt of one is in another.  labels: names of what rows are classified as."""

    train: list[Any]
    tune: list[Any]
    test: list[Any]
    labels: tuple[str, ...] = ()


def shared() -> Path:
    """The folder of the data and of stories260K."""
    return Path(os.environ.get("JAXPEFT_DATA", "../shared/data"))


def place_of(model: str) -> Path:
    """Where a model lies."""
    own = {"SmolLM2-135M": assets.smollm2, "MiniLM": assets.minilm}
    return own[model]() if model in own else shared() / "checkpoints" / model


@functools.cache
def rows_of(task: str) -> Rows:
    """The rows of a task; every tenth of what may be trained on tunes the rate."""
    protocol = DATA[task]
    if task in ("induction", "sentiment"):
        return _induction(protocol, task == "sentiment")
    if protocol.kind == "lm":
        found = lora_fa_quality.read_data(task, lora_fa_quality.Quality(data_root=shared(), seq_len=protocol.tokens))
        return Rows(found["train"], found["tune"], found["test"])
    folder, tokenizer = shared() / "classify", load_tokenizer(assets.minilm())
    train, labels, _ = data.load_rows(folder / f"{task}.train.jsonl", tokenizer, protocol.tokens)
    taken: dict[Any, int] = {}
    few = []
    for row in train:
        group = row.label if protocol.per_label else None
        taken[group] = taken.get(group, 0) + 1
        few += [row] if taken[group] <= (protocol.rows or math.inf) else []
    test, _, _ = data.load_rows(folder / f"{task}.test.jsonl", tokenizer, protocol.tokens, labels)
    return Rows([row for i, row in enumerate(few) if i % 10], few[::10], test, labels.names)


def _induction(protocol: Protocol, sentiment: bool) -> Rows:
    found = {}
    for part in ("train", "test"):
        file = shared() / f"instruct/instruction_induction.{part}.jsonl"
        examples = data.load_examples(file, too_long="drop", **_reading(protocol))[0]
        names = [json.loads(line)["task"] for line in file.read_text().splitlines()]
        found[part] = [row for row in examples if not sentiment or names[row.line - 1] == SENTIMENT]
    return Rows(*lora_fa_quality.hold_out(found["train"], 10), found["test"][:: 1 if sentiment else 4])


def _reading(protocol: Protocol) -> dict[str, Any]:
    """How rows with an instruction are read."""
    model = assets.smollm2()
    tokenizer = load_tokenizer(model)
    special = special_tokens(model, tokenizer)
    return {
        "tokenizer": tokenizer,
        "seq_len": protocol.tokens,
        "special": special,
        "template": choose("alpaca", tokenizer),
        "cache": False,
    }


def in_context(task: str, seed: int) -> Rows:
    """The rows of a task, those that test with SHOTS of the training rows before them."""
    rows, reading = rows_of(task), _reading(DATA[task])
    blank = reading["tokenizer"]("\n\n", add_special_tokens=False)["input_ids"]
    before = data.shown(rows.train, SHOTS, seed, reading["special"], blank, whole=False)
    behind = lambda some: data.in_context(some, before, MOST, reading["special"]).examples
    return rows._replace(tune=behind(rows.tune), test=behind(rows.test))


def prompts(task: str) -> Rows:
    """The rows of a task with an instruction as what is to be classified: prompts, and their answers as labels."""
    tokenizer, rows = load_tokenizer(place_of(DATA[task].model)), rows_of(task)
    asked = lambda some: evaluate.questions(some, len(some), tokenizer)
    names = tuple(sorted({question.reference for question in asked(rows.train)}))

    def labelled(some: list[Any]) -> list[data.Row]:
        return [
            data.Row(ids := np.array(q.prompt, np.int32), np.zeros_like(ids), names.index(q.reference), row.line)
            for q, row in zip(asked(some), some, strict=True)
        ]

    return Rows(labelled(rows.train), labelled(rows.tune), labelled(rows.test), names)


class Runner:
    """One task and one method, compiled once: a step is told its rate with its batch.

    method, direction: in the place of the contestant's and the method's own.
    """

    def __init__(self, name: str, words: str, method: Method | None = None, direction: Any = None):
        self.protocol, self.rows = DATA[name], rows_of(name)
        if words == contestants.PROBE and self.protocol.kind == "lm":
            self.protocol, self.rows = self.protocol._replace(kind="classify"), prompts(name)
        self.task = TASKS[self.protocol.kind]
        length = self.protocol.tokens
        if self.protocol.kind == "lm":
            self.layout: dict[str, Any] = {"pack": True}
        else:
            self.layout = {"buckets": tuple(range(16, length + 1, 16)), "collate": data.collate_rows}
        self.name, self.trains = name, words not in (contestants.BASE, contestants.ICL)
        self.shows = words == contestants.ICL
        self.method = self.task.method(method or contestants.make(words, self.protocol.model))
        per_epoch = len(self.rows.train) / self.protocol.batch
        self.steps = self.protocol.steps or math.ceil(self.protocol.epochs * per_epoch)
        self.direction = make_direction(direction or defaults(self.method.specs).direction or "adam")
        self.model, *_ = self.setup(0)
        self.step, self.eval_step = Compiled(self.told, steps=True), Compiled(self.task.eval_step(self.model))
        self.least = math.inf  # loss on held-out rows of the rates that `measure` has tried

    def told(self, state: jp.TrainState, batch: Mapping[str, Any]) -> Any:
        """A step of a batch with its "rate", which is the method's too, of what it moves without gradients."""
        told, rows = batch["rate"], {name: leaf for name, leaf in batch.items() if name != "rate"}
        step = jp.make_train_step(self.model, self.method, self.direction, self.task.loss, rate=lambda count: told)
        return step(state, rows)

    def train(self, lr: float, seed: int, trainable: tree.Flat, frozen: tree.Flat, steps: int) -> jp.TrainState:
        """The state after so many steps, at rates that rise to `lr` and fall to zero."""
        key, schedule = jax.random.key(200 + seed), make_schedule("linear", lr, steps, steps // 10)
        state = jp.init_state(self.method, self.direction, trainable, frozen, key, model=self.model)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32)
        for now, batch in zip(rates, self.batches(seed, steps), strict=True):
            state, _ = self.step(state, {**batch, "rate": now})
        return state

    def batches(self, seed: int, steps: int) -> Any:
        made = data.make_batches(self.rows.train, self.protocol.batch, self.protocol.tokens, seed, **self.layout)
        return (batch for batch, _ in itertools.islice(made, steps))

    def setup(self, seed: int) -> Any:
        if self.protocol.kind == "lm":
            base, params = jp.load_pretrained(place_of(self.protocol.model), "float32")
        else:
            new = {"labels": self.rows.labels, "key": jax.random.key(seed)}
            base, params = jp.load_pretrained(place_of(self.protocol.model), "float32", **new)
        some = lambda: self.batches(seed, min(8, self.steps))
        return jp.setup(self.method, base, params, jax.random.key(100 + seed), batches=some)

    def scores(self, state: Any, rows: list[Any]) -> dict[str, Any]:
        width = max([self.protocol.tokens, *(row.positions for row in rows if self.shows)])
        batches = (batch for batch, _ in data.eval_batches(rows, 8 if self.shows else 64, width, **self.layout))
        return self.task.scores(self.eval_step, state, batches, len(self.rows.labels))

    def exact(self, state: Any, rows: list[Any]) -> float:
        """Per cent of rows whose greedy answer is the reference."""
        tokenizer = load_tokenizer(place_of(self.protocol.model))
        asked = evaluate.questions(rows, QUESTIONS, tokenizer)
        ends = special_tokens(place_of(self.protocol.model), tokenizer).ends
        said = evaluate.answer(self.model, state, asked, tokenizer, ends, ANSWER).texts
        return 100 * sum(text == q.reference for text, q in zip(said, asked, strict=True)) / len(asked)

    def __call__(self, lr: float, seed: int, steps: int | None = None, least: float = math.inf) -> common.Row:
        """A run; steps: in the place of the protocol's; it is not tested where its loss on held-out rows is over
        `least`.
        """
        began = time.process_time()
        _, trainable, frozen = self.setup(seed)
        own = {path: leaf for path, leaf in trainable.items() if not path.startswith("classifier/")}
        state = self.train(lr, seed, trainable, frozen, (steps or self.steps) if self.trains else 0)
        rows = in_context(self.name, seed) if self.shows else self.rows
        tuned = self.scores(state, rows.tune)
        found = {"tune_loss": tuned["loss"], "trained": tree.size(own) if self.trains else 0}
        if "accuracy" in tuned:
            found["tune_accuracy"] = 100 * tuned["accuracy"]
        if not tuned["loss"] > least:
            found |= self.test(state, rows.test)
        return {**found, "cpu_seconds": round(time.process_time() - began, 1)}

    def test(self, state: Any, rows: list[Any]) -> dict[str, Any]:
        """The scores that the table shows, and the loss."""
        tested = self.scores(state, rows)
        found = {"loss": tested["loss"]}
        if "accuracy" in tested:
            found["accuracy"] = 100 * tested["accuracy"]
        if "exact" in self.protocol.scores:
            found["exact"] = found["accuracy"] if "accuracy" in found else self.exact(state, rows)
        return found


runner = functools.lru_cache(maxsize=1)(Runner)


def measure(key: common.Row) -> common.Row:
    """One run: losses, and accuracies of rows that are classified; of a rate that was not the best so far what tunes
    alone. {"refused": why} of a method that the model has no place for.
    """
    try:
        own, first = runner(key["task"], key["method"]), key["seed"] == 0
        found = own(key["lr"], key["seed"], least=own.least if first else math.inf)
    except InputError as error:
        return {"refused": str(error)}
    own.least = min(own.least, found["tune_loss"]) if first else own.least
    return found


def asked(task: str, words: str, **more: Any) -> common.Row:
    """The key of a figure: the method, and the options that it has on the task's model."""
    given = contestants.options(words, DATA[task].model)
    return {"task": task, "method": words, **({"options": list(given)} if given else {}), **more}


def is_for(task: str, words: str) -> bool:
    """Whether a method is tried on a task."""
    if task in FEW:
        return words in FEW[task]
    return words != contestants.ICL and contestants.is_for(words, DATA[task].kind == "classify")


def seeds(task: str, words: str) -> tuple[int, ...]:
    """Of the runs that count; the model as it was has one."""
    return (0,) if words == contestants.BASE else DATA[task].seeds


def tune(figures: common.Figures, task: str, words: str) -> float | None:
    """The best rate of the grid; None for a method that the task's model refuses."""
    if words in (contestants.BASE, contestants.ICL):
        return 0.0
    own = contestants.default_rate(words, DATA[task].model) or (FULL if words == "full" else FIRST)
    starts = [place(lr) for lr in (own, *(DATA[task].starts if words != "full" else ()))]
    if "refused" in figures(**asked(task, words, lr=rate(starts[0]), seed=0)):
        return None

    def loss(index: int) -> float:
        return figures(**asked(task, words, lr=rate(index), seed=0))["tune_loss"]

    for stride in DATA[task].strides:
        starts = [search(loss, start, stride) for start in starts]
    return rate(min(starts, key=lambda index: (not math.isfinite(loss(index)), loss(index))))


def collect(figures: common.Figures, words: Iterable[str], tasks: Iterable[str]) -> None:
    """Tunes and repeats what is missing, task by task."""
    for task, name in itertools.product(tasks, list(words)):
        if is_for(task, name) and (lr := tune(figures, task, name)) is not None:
            for seed in seeds(task, name):
                figures(**asked(task, name, lr=lr, seed=seed))


def at_best(rows: Iterable[common.Row], task: str, words: str) -> list[common.Row]:
    """The runs at the best rate of seed 0, one per seed; [] where not every seed has run."""
    key = asked(task, words)
    own = [row for row in rows if all(row.get(x) == y for x, y in key.items()) and "refused" not in row]
    tried = [row for row in own if row["seed"] == 0 and math.isfinite(row["tune_loss"])]
    if not tried:
        return []
    lr = min(tried, key=lambda row: (row["tune_loss"], row["lr"]))["lr"]
    runs = {row["seed"]: row for row in own if row["lr"] == lr}
    needed = seeds(task, words)
    return [runs[seed] for seed in needed] if set(needed) <= runs.keys() else []


def hours(rows: Iterable[common.Row], words: Iterable[str], tasks: Iterable[str], runs: int = 9) -> dict[str, float]:
    """CPU hours that each task still needs: `runs` for each method that has none at its best rate, fewer where the
    protocol has fewer seeds and strides.
    """
    rows, left = list(rows), {}
    for task in tasks:
        own = [row["cpu_seconds"] for row in rows if row["task"] == task and "cpu_seconds" in row]
        each = sum(own) / len(own) if own else 60 * DATA[task].minutes
        refused = {row["method"] for row in rows if row["task"] == task and "refused" in row}
        missing = [
            name for name in words if is_for(task, name) and name not in refused and not at_best(rows, task, name)
        ]
        fewer = 3 - len(DATA[task].seeds) + 2 * (2 - len(DATA[task].strides))
        left[task] = (runs - fewer) * each * len(missing) / 3600
    return left
