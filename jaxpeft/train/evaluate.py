"""What a run is judged by: its validation loss and scores, and the answers that it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxpeft import shares
from jaxpeft.adapters import FIELD
from jaxpeft.generate import generate
from jaxpeft.model import Batch, Model
from jaxpeft.train import scores
from jaxpeft.train.loss import completion_loss, row_losses
from jaxpeft.train.report import rouge_l
from jaxpeft.train.state import TrainState

if TYPE_CHECKING:  # grain takes long to import, and planning reads no data
    from jaxpeft.data import Example

MOST_TOKENS = 64  # of an answer


def make_eval_step(model: Model, loss: Callable[..., Any] = completion_loss) -> Callable[..., Any]:
    """A pure (state, batch) -> (sum of the loss over the tokens that count, their weight), without dropout."""

    def step(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        mean, aux = loss(model, state.params, batch, None)
        return mean * aux["weight"], aux["weight"]

    return step


def mean_loss(step: Callable[..., Any], state: TrainState, batches: Iterable[Batch]) -> float:
    """Nats per token over all tokens of the batches that count, each with the same weight."""
    return _mean(jax.device_get([step(state, batch) for batch in batches]))


def losses(step: Callable[..., Any], state: TrainState, batches: Iterable[Batch]) -> dict[str, float | None]:
    """{"loss": `mean_loss`}, and "loss/g" of adapter g where each batch is of one of several."""
    whose, sums = [], []
    for batch in batches:
        whose.append(int(batch[FIELD][0]) if FIELD in batch else None)
        sums.append(step(state, batch))
    found = jax.device_get(sums)
    own = sorted({g for g in whose if g is not None})
    of = {f"loss/{g}": _mean([x for x, other in zip(found, whose, strict=True) if other == g]) for g in own}
    return {"loss": _mean(found), **of}


def _mean(sums: Sequence[tuple[Any, Any]]) -> float:
    total, weight = (sum(float(x) for x in column) for column in zip(*sums, strict=True))
    return total / weight if weight else float("nan")


def make_classification_eval_step(model: Model) -> Callable[..., Any]:
    """A pure (state, batch) -> {"loss" (B,), "said" (B,), "labels" (B,), "weights" (B,)}, without dropout.

    "said" is the likeliest label, or the value of a regression.
    """

    def step(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        logits = model.classify(state.params, batch)
        said = logits[:, 0] if logits.shape[-1] == 1 else logits.argmax(axis=-1)
        return {
            "loss": row_losses(logits, batch["labels"]),
            "said": said,
            "labels": batch["labels"],
            "weights": batch["weights"],
        }

    return step


def classification_scores(
    step: Callable[..., Any], state: TrainState, batches: Iterable[Batch], labels: int
) -> dict[str, float | None]:
    """{"loss", "accuracy", "f1"} over the rows of all batches; for a single label {"loss", "mse", correlations}."""
    found = shares.all_on_host([step(state, batch) for batch in batches])
    rows = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    counted = rows.pop("weights") > 0
    loss, said, true = (rows[name][counted] for name in ("loss", "said", "labels"))
    mean = float(loss.mean(dtype=np.float64))
    if labels == 1:
        return {"loss": mean, "mse": mean, **scores.correlations(true, said)}
    return {"loss": mean, **scores.accuracy_and_f1(scores.confusion(true, said, labels))}


class Question(NamedTuple):
    """A validation example as a prompt to answer: its token ids, the text of its own completion, the tokens of that.

    adapter: its number, of several; None: there are not several.
    """

    prompt: list[int]
    reference: str
    length: int
    adapter: int | None = None


def questions(examples: Sequence[Example], count: int, tokenizer: Any, several: bool = False) -> list[Question]:
    """Up to `count` examples, evenly spread, each cut before its first completion; without a prompt it is left out.

    With `several` an example's source is the number of its adapter, from 1.
    """
    prompted = [i for i, example in enumerate(examples) if not example.completion[0]]
    places = np.linspace(0, len(prompted) - 1, min(count, len(prompted))).round().astype(int)
    asked = []
    for example in (examples[prompted[i]] for i in places):
        start = int(np.argmax(example.completion))
        end = start + int(np.argmin(np.append(example.completion[start:], False)))
        reference = tokenizer.decode(example.ids[start:end].tolist(), skip_special_tokens=True)
        whose = example.source - 1 if several else None
        asked.append(Question(example.ids[:start].tolist(), reference.strip(), end - start, whose))
    return asked


class Answers(NamedTuple):
    """What the model said to each question, and the means over all: overlap with what it should have said, and 1 where
    it said that.
    """

    texts: list[str]
    overlap: float | None
    exact: float | None


def new_tokens(asked: Sequence[Question], most_tokens: int = MOST_TOKENS) -> int:
    """How many tokens an answer to one of them may have; 0 without questions."""
    return min(most_tokens, max(question.length for question in asked) * 5 // 4 + 1) if asked else 0


def answer(
    model: Model,
    state: TrainState,
    asked: Sequence[Question],
    tokenizer: Any,
    ends: Sequence[int] | None = None,
    most_tokens: int = MOST_TOKENS,
) -> Answers:
    """Greedy answers to the questions, scored by `rouge_l` and by equality; scores are None without questions.

    An answer may be a quarter longer than the longest reference, and has at most `most_tokens`; `ends` are the tokens
    that end it, by default those of the model's configuration.
    """
    if not asked:
        return Answers([], None, None)
    params = state.params
    max_new_tokens = new_tokens(asked, most_tokens)
    room = model.config.max_position_embeddings - max_new_tokens
    prompts = [question.prompt[-max(room, 1) :] for question in asked]  # the end of a prompt that leaves no room
    own = None if asked[0].adapter is None else [question.adapter for question in asked]
    new = generate(model, params, prompts, max_new_tokens, eos=ends, adapters=own)  # type: ignore[arg-type]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]
    said = [(text, question.reference) for text, question in zip(texts, asked, strict=True)]
    mean = lambda scores: sum(scores) / len(said)
    return Answers(texts, mean([rouge_l(*pair) for pair in said]), mean([a == b for a, b in said]))
