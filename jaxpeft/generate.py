"""Decoding with a key-value cache: greedy or sampled, prompts of any lengths in one batch, any adapted model.

A batch of prompts is padded on the left, so that all rows write the same cache slot in each step:

    slots     0 .. P-1 hold the prompts, row b from slot P - len_b on; P, P+1, ... what is generated
    segment   0 in the padding, 1 elsewhere: nothing that counts sees the padding
    position  slot - (P - len_b): each row counts from its own first token

One pass over all prompts fills the cache and chooses the first tokens, then a `lax.while_loop` reads a token per row
and step and chooses the next. It ends early when every row has ended, or after some steps: `stream` shows what there is
and goes on. A row that has ended reads on, and nobody looks at what it says. The cache is carried through all of it and
written in place, one slot per step (`jaxpeft.decoding`). P and the number of slots are
rounded up to a few sizes, from 128 on at most a quarter above, so calls of similar lengths share a compilation.

Prompts of a batch may have different adapters (`jaxpeft.adapters`): a number per row, for which nothing is compiled.

Randomness belongs to a prompt and not to its batch: token t of prompt i is drawn with fold_in(fold_in(key, i), t).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import shares, tree
from jaxpeft.adapters import check_rows
from jaxpeft.errors import InputError, RunError
from jaxpeft.model import Model

_MOMENT = 0.1  # seconds: about what passes between two looks at what `stream` has made


def generate(
    model: Model,
    params: tree.Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos: Sequence[int] | None = None,
    batch_size: int = 32,
    adapters: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      model: a base or adapted model of `jaxpeft.models`.
      params: its nested parameters, adapters included.
      prompts: token ids, at least one per prompt.
      max_new_tokens: the most tokens to add to a prompt; fewer are added where `max_position_embeddings` is reached.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
      top_k: draw among the k likeliest tokens only.
      top_p: draw among the fewest tokens that together have at least this probability (after temperature and top_k).
      key: PRNG key, needed when the temperature is above 0.
      eos: token ids that end a text; None: those of the model's configuration; (): none.
      batch_size: prompts decoded at once. Prompts of similar lengths go together; the result doesn't depend on it.
      adapters: of a model with several, each prompt's (`jaxpeft.adapters.rows`); -1: none. None: none for all.

    Returns:
      The new ids of each prompt, in order, without the prompt and without the end token.

    Raises:
      InputError: for an empty prompt, an id outside the vocabulary, a prompt that leaves no room below
        `max_position_embeddings`, or settings out of range.
      RunError: for a model whose logits are no numbers.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, key, batch_size, adapters)
    if adapters is not None:
        check_rows(params, adapters)
    how = _how(model, temperature, top_k, top_p, key, eos)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        own = None if adapters is None else [adapters[i] for i in chosen]
        state = _first(model, params, how, [prompts[i] for i in chosen], max_new_tokens, chosen, own)
        state = _steps(model, how.kind, params, how.settings, state, np.int32(max_new_tokens))
        _check_numbers(state, chosen)
        new, counts = shares.on_host(state["new"]), shares.on_host(state["count"])
        for i, ids, length in zip(chosen, new, counts, strict=False):
            results[i] = ids[:length].tolist()
    return results


def stream(
    model: Model,
    params: tree.Params,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos: Sequence[int] | None = None,
    adapter: int | None = None,
) -> Iterator[list[int]]:
    """The tokens of `generate` for one prompt as they come: a few of them at a time, about ten times a second.

    Arguments and errors are those of `generate`, `adapter` the prompt's; errors are raised at the call.
    """
    _check(model, [prompt], max_new_tokens, temperature, top_k, top_p, key, 1)
    if adapter is not None:
        check_rows(params, [adapter])
    how = _how(model, temperature, top_k, top_p, key, eos)

    def pieces() -> Iterator[list[int]]:
        state = _first(model, params, how, [prompt], max_new_tokens, [0], None if adapter is None else [adapter])
        shown, until, steps = 0, 0, 1
        finished = False
        while not finished:
            until += steps
            started = time.monotonic()
            state = _steps(model, how.kind, params, how.settings, state, np.int32(until))
            _check_numbers(state, [0])
            count, finished = int(state["count"][0]), bool(state["done"].all())
            if until > 1:  # the first call may compile
                steps = max(1, min(4 * steps, int(steps * _MOMENT / (time.monotonic() - started))))
            if count > shown:
                yield np.asarray(state["new"][0])[shown:count].tolist()
            shown = count

    return pieces()


class _How(NamedTuple):
    """How tokens are chosen: kind (whether the likeliest is taken, whether unlikely ones are left out), and numbers."""

    kind: tuple[bool, bool]
    settings: dict[str, Any]
    key: jax.Array


def _how(model: Model, temperature, top_k, top_p, key, eos) -> _How:
    greedy = temperature == 0
    settings = {
        "temperature": np.float32(temperature or 1),
        "top_k": np.int32(min(top_k or model.config.vocab_size, model.config.vocab_size)),
        "top_p": np.float32(1 if top_p is None else top_p),
        "ends": np.asarray(model.config.eos_token_id if eos is None else tuple(eos), np.int32),
    }
    filtered = not greedy and (top_k is not None or top_p is not None)
    return _How((greedy, filtered), settings, jax.random.key(0) if key is None else key)


def _check(model: Model, prompts, max_new_tokens, temperature, top_k, top_p, key, batch_size, adapters=None) -> None:
    config = model.config
    if model.stack.init_cache is None:
        raise InputError("generate: this model has no key-value cache; use one of the decoders of jaxpeft.models")
    for name, value in {"max_new_tokens": max_new_tokens, "top_k": top_k, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise InputError(f"generate: {name} {value} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"generate: temperature {temperature} must be a finite number of at least 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"generate: top_p {top_p} must be above 0 and at most 1")
    if temperature > 0 and key is None:
        raise InputError("generate: sampling (temperature above 0) needs a PRNG key")
    if adapters is not None and len(adapters) != len(prompts):
        raise InputError(f"generate: {len(adapters)} adapters for {len(prompts)} prompts; give each prompt one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"generate: prompt {i} is empty; give it at least the token that begins a text")
        if len(prompt) >= config.max_position_embeddings:
            raise InputError(
                f"generate: prompt {i} has {len(prompt)} tokens; the model has room for "
                f"{config.max_position_embeddings} (max_position_embeddings), new tokens included"
            )
        if not (min(prompt) >= 0 and max(prompt) < config.vocab_size):
            raise InputError(f"generate: prompt {i} has an id outside the vocabulary of {config.vocab_size}")


def _check_numbers(state: dict[str, Any], prompts: Sequence[int]) -> None:
    """Raises RunError for a text of which a token would have been chosen from what are no numbers."""
    for i, at in zip(prompts, shares.on_host(state["lost"]), strict=False):
        if at >= 0:
            raise RunError(
                f"generate: prompt {i}: the logits of new token {at + 1} are no numbers (NaN); are the weights whole, "
                "and the adapter's scale right?"
            )


def _round_up(length: int) -> int:
    """The size that stands for `length`: a multiple of 32, from 128 on four between a power of two and the next.

    >>> [_round_up(length) for length in (1, 33, 150, 257, 1025)]
    [32, 64, 160, 320, 1280]
    """
    step = max(32, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def _padded(prompts: Sequence[Sequence[int]], max_new_tokens: int, room: int) -> tuple[dict[str, np.ndarray], int]:
    """(batch, slots): the prompts padded on the left, rows to a power of two; how many slots the cache needs.

    `limit` (B,) is how many tokens a row may get; a row of padding gets none.
    """
    longest = max(map(len, prompts))
    width, rows = _round_up(longest), 1 << (len(prompts) - 1).bit_length()
    batch = {name: np.zeros((rows, width), np.int32) for name in ("tokens", "positions", "segment_ids")}
    limit = np.zeros(rows, np.int32)
    for b, prompt in enumerate(prompts):
        first = width - len(prompt)
        batch["tokens"][b, first:] = prompt
        batch["positions"][b, first:] = np.arange(len(prompt))
        batch["segment_ids"][b, first:] = 1
        limit[b] = min(max_new_tokens, room - len(prompt))
    return {**batch, "limit": limit}, _round_up(width + int(limit.max()))


def _first(
    model: Model, params, how: _How, prompts, max_new_tokens: int, numbers: Sequence[int], adapters: Any = None
) -> dict[str, Any]:
    """The state when the prompts have been read and the first tokens chosen; `numbers` are theirs, to draw by.

    t (): tokens chosen.  token (B,): the last, which the model has not read yet.  new (B, slots): all of them, of
    which count (B,) are the text's.  limit (B,): the most it gets.  done (B,).  lengths (B,): of the prompts.
    lost (B,): the first token whose logits were no numbers, which ends the text; -1: none.
    keys (B,).  cache.  beside: {"adapter": (B,)}, or nothing: what each pass is told of the rows.
    """
    batch, slots = _padded(prompts, max_new_tokens, model.config.max_position_embeddings)
    if adapters is not None:
        batch["adapter"] = np.full(len(batch["limit"]), -1, np.int32)
        batch["adapter"][: len(adapters)] = adapters
    rows = np.zeros(len(batch["limit"]), np.int32)
    rows[: len(numbers)] = numbers
    return _read(model, slots, how.kind, params, batch, how.settings, how.key, rows)


@functools.partial(jax.jit, static_argnames=("model", "slots", "kind"))
def _read(model, slots, kind, params, batch, settings, key, rows):
    """One pass over the prompts; see `_first`."""
    batch, limit = dict(batch), batch["limit"]
    del batch["limit"]
    b = len(limit)
    x, cache = model.stack.run(model.stack, params, batch, None, model.stack.init_cache(b, slots))
    state = {
        "t": jnp.zeros((), jnp.int32),
        "done": limit == 0,
        "count": jnp.zeros_like(limit),
        "limit": limit,
        "lost": jnp.full_like(limit, -1),
        "lengths": batch["segment_ids"].sum(1),
        "keys": jax.vmap(lambda row: jax.random.fold_in(key, row))(rows),
        "new": jnp.zeros((b, slots), jnp.int32),
        "cache": cache,
        "beside": {name: batch[name] for name in ("adapter",) if name in batch},
    }
    return _with_token(model, kind, params, settings, state, x)


@functools.partial(jax.jit, static_argnames=("model", "kind"), donate_argnames=("state",))
def _steps(model, kind, params, settings, state, until):
    """The state when `until` tokens have been chosen, or every text has ended."""
    segments = jnp.ones((len(state["token"]), 1), jnp.int32)

    def unfinished(state):
        return ~state["done"].all() & (state["t"] < until)

    def step(state):
        """Reads the token that was chosen and chooses the next."""
        one = {
            "tokens": state["token"][:, None],
            "positions": (state["lengths"] + state["t"] - 1)[:, None],
            "segment_ids": segments,
            **state["beside"],
        }
        x, cache = model.stack.run(model.stack, params, one, None, state["cache"])
        return _with_token(model, kind, params, settings, {**state, "cache": cache}, x)

    return jax.lax.while_loop(unfinished, step, state)


def _with_token(model, kind, params, settings, state, x):
    """The state with one more token, chosen from the last hidden state (B, S, d)."""
    t = state["t"]
    logits = model.head(params, x[:, -1])
    token = _choose(kind, settings, state["keys"], logits, t)
    lost = jnp.where(~state["done"] & jnp.isnan(jnp.max(logits, axis=-1)), t, state["lost"])
    ended = state["done"] | jnp.isin(token, settings["ends"]) | (lost >= 0)
    count = state["count"] + ~ended
    done, new = ended | (count >= state["limit"]), state["new"].at[:, t].set(token)
    return {**state, "t": t + 1, "token": token, "done": done, "count": count, "new": new, "lost": lost}


def _choose(kind, settings, keys, logits, t):
    """The next token of each row, from its logits (B, V); the t-th of its text."""
    greedy, filtered = kind
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / settings["temperature"]
    if filtered:
        logits = keep_likeliest(logits, settings["top_k"], settings["top_p"])
    own = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)
    return jax.vmap(jax.random.categorical)(own, logits).astype(jnp.int32)


def keep_likeliest(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits (B, V) with all but the likeliest tokens at -inf.

    First the `top_k` largest stay; of these the fewest whose probabilities (renormalised) sum to at least `top_p`,
    never none. Tokens as likely as the last one that stays stay too.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    ordered = jnp.where(jnp.arange(ordered.shape[-1]) < top_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    stays = (before < top_p) & (ordered > -jnp.inf)
    threshold = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
