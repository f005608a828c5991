"""What a run is judged by: its validation loss, and the answers that it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpeft.data import Example
from jaxpeft.generate import generate
from jaxpeft.model import Batch, Model
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.report import rouge_l
from jaxpeft.train.state import TrainState


def make_eval_step(model: Model, loss: Callable[..., Any] = completion_loss) -> Callable[..., Any]:
    """A pure (state, batch) -> (sum of the loss over the tokens that count, their weight), without dropout."""

    def step(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        mean, aux = loss(model, state.params, batch, None)
        return mean * aux["weight"], aux["weight"]

    return step


def mean_loss(step: Callable[..., Any], state: TrainState, batches: Iterable[Batch]) -> float:
    """Nats per token over all tokens of the batches that count, each with the same weight."""
    sums = [step(state, batch) for batch in batches]
    total, weight = (sum(float(x) for x in column) for column in zip(*jax.device_get(sums), strict=True))
    return total / weight if weight else float("nan")


class Question(NamedTuple):
    """A validation example as a prompt to answer: its token ids, the text of its own completion, the tokens of that."""

    prompt: list[int]
    reference: str
    length: int


def questions(examples: Sequence[Example], count: int, tokenizer: Any) -> list[Question]:
    """Up to `count` examples, evenly spread, each cut before its first completion; without a prompt it is left out."""
    asked = []
    for example in examples:
        start = int(np.argmax(example.completion))
        if start:
            end = start + int(np.argmin(np.append(example.completion[start:], False)))
            reference = tokenizer.decode(example.ids[start:end].tolist(), skip_special_tokens=True)
            asked.append(Question(example.ids[:start].tolist(), reference.strip(), end - start))
    places = np.linspace(0, len(asked) - 1, min(count, len(asked))).round().astype(int)
    return [asked[i] for i in places]


class Answers(NamedTuple):
    """What the model said to each question, and the mean overlap with what it should have said."""

    texts: list[str]
    overlap: float | None


def answer(
    model: Model, state: TrainState, asked: Sequence[Question], tokenizer: Any, most_tokens: int = 64
) -> Answers:
    """Greedy answers to the questions, scored by `rouge_l`; the overlap is None without questions.

    An answer may be a quarter longer than the longest reference, and has at most `most_tokens`.
    """
    if not asked:
        return Answers([], None)
    params = state.params
    max_new_tokens = min(most_tokens, max(question.length for question in asked) * 5 // 4 + 1)
    room = model.config.max_position_embeddings - max_new_tokens
    prompts = [question.prompt[-max(room, 1) :] for question in asked]  # the end of a prompt that leaves no room
    new = generate(model, params, prompts, max_new_tokens)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]
    scores = [rouge_l(text, question.reference) for text, question in zip(texts, asked, strict=True)]
    return Answers(texts, sum(scores) / len(scores))
