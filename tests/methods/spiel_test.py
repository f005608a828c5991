"""SpIEL: both rules by NumPy, no entry twice, what the state takes, dW of one layer at a time, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpeft as jp
from jaxpeft import entries, sparse, tree
from jaxpeft.methods import spiel
from tests import tiny

KEY, LAYERS, RATE = jax.random.key(0), 3, 1e-2
SITE = "layers/mlp/up_proj"
OWN = f"{SITE}/spiel/"
SHAPE = (32, 56)
SETTINGS = {"density": 0.02, "every": 4, "accumulate": 2, "drop": 0.5, "until": 16, "targets": ["up_proj"]}


def start(method, optimizer, dtype=jnp.float32):
    model, trainable, rest = jp.setup(method, *tiny.model(dtype), KEY)
    return model, jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)


@functools.cache
def trained(grow):
    """(states before each step and after the last, gradients of the merged kernels in each step)."""
    method, optimizer = jp.spiel(grow=grow, **SETTINGS), optax.scale_by_adam()
    model, state = start(method, optimizer)
    step = jax.jit(jp.make_train_step(model, method, optimizer, rate=RATE, accumulate=2))
    base = tiny.model()[0]
    loss = lambda flat, batch: jp.completion_loss(base, tree.unflatten(flat), batch)[0]
    gradient = jax.jit(jax.grad(loss))
    states, gradients = [state], []
    for seed in range(9):
        merged = tree.flatten(method.merge(state.params))
        gradients.append(np.asarray(gradient(merged, tiny.batch(seed=seed))[f"{SITE}/kernel"], np.float64))
        state, _ = step(state, tiny.batch(seed=seed))
        states.append(state)
    return states, [g.reshape(LAYERS, -1) for g in gradients]


def exchanged(index, values, candidates, scores, count):
    """The published selection, by sets: entries, and what is fresh as {entry: number of its candidate}."""
    outgoing = list(np.argsort(np.abs(values), kind="stable")[:count])
    remaining = set(np.delete(index, outgoing).tolist())
    valid = [c for c in range(len(candidates)) if candidates[c] not in remaining and scores[c] > 0]
    best = sorted(valid, key=lambda c: -scores[c])[:count]
    out = {index[t] for t in outgoing}
    incoming = [c for c in best if candidates[c] not in out]
    stay = {candidates[c] for c in best if candidates[c] in out}
    changing = [t for t in outgoing if index[t] not in stay][: len(incoming)]
    left = set(index.tolist()) - {index[t] for t in changing}
    return left, {candidates[c]: c for c in incoming}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_never_an_entry_twice_and_the_published_choice(data):
    """Of any entries, values, candidates that overlap them, and counts; scores differ, so that the choice is unique."""
    n, m, k = 5, 8, 12
    lists = st.lists(st.integers(0, n * m - 1), min_size=k, max_size=k, unique=True)
    index, candidates = (np.array(data.draw(lists), np.int32) for _ in range(2))
    order = st.permutations(range(k))
    values, scores = (np.array(data.draw(order), np.float32) - shift for shift in (3.25, 2.0))
    count = data.draw(st.integers(0, k))
    found, source, fresh = jax.jit(entries.replaced, static_argnums=5)(index, values, candidates, scores, count, (n, m))
    found, fresh = np.asarray(found), np.asarray(fresh)
    assert len(set(found.tolist())) == k and found.min() >= 0 and found.max() < n * m
    left, incoming = exchanged(index, values, candidates, scores, count)
    assert set(found[~fresh].tolist()) == left and set(found[fresh].tolist()) == set(incoming)
    np.testing.assert_array_equal(found[~fresh], index[~fresh])
    for entry, number in zip(found[fresh], np.asarray(source)[fresh], strict=True):
        assert incoming[entry] == number


def by_numpy(grow):
    """Entries and values after each step, {layer: {entry: (value, m, v)}}, of the gradients of the merged model."""
    states, gradients = trained(grow)
    picks = {0: 0, 1: 1, 2: 2, 4: 0, 5: 1, 6: 2, 8: 0}  # step: layer
    (n, m), accumulate, k = SHAPE, SETTINGS["accumulate"], int(SETTINGS["density"] * SHAPE[0] * SHAPE[1])
    index = np.asarray(states[0].moved[f"{OWN}index"])
    active = [dict.fromkeys(index[layer].tolist(), (0.0, 0.0, 0.0)) for layer in range(LAYERS)]
    rows, columns, sums = np.zeros((LAYERS, n)), np.zeros((LAYERS, m)), {}
    for step, of_step in enumerate(gradients):
        fresh = {}
        for layer, g in enumerate(of_step):
            if grow == "moments":
                updates = {e: min(rows[layer, e // m], columns[layer, e % m]) + g[e] ** 2 for e in active[layer]}
                for e, u in updates.items():
                    rows[layer, e // m] = max(rows[layer, e // m], u)
                    columns[layer, e % m] = max(columns[layer, e % m], u)
            elif picks.get(step) == layer:
                candidates = np.argsort(-np.abs(g))[:k]
                sums[layer] = candidates, g[candidates], g[candidates] ** 2
            elif layer in sums:
                candidates, total, squares = sums[layer]
                sums[layer] = candidates, total + g[candidates], squares + g[candidates] ** 2
            if picks.get(step - accumulate + 1) == layer:
                p = 1 if step < 4 else SETTINGS["drop"] * (1 - (step + 1) / SETTINGS["until"])
                if grow == "moments":
                    scores = np.outer(rows[layer], columns[layer]).reshape(-1)
                    scores[list(active[layer])] = -1
                    candidates = np.argsort(-scores, kind="stable")[:k]
                    scores = scores[candidates]
                    seeds = 0 * scores, np.minimum(rows[layer][candidates // m], columns[layer][candidates % m])
                    seeds = seeds[0], seeds[1] / (step + 1)
                else:
                    candidates, total, squares = sums[layer]
                    scores, seeds = np.abs(total), (total / accumulate, squares / accumulate)
                entries = np.array(list(active[layer]))
                values = np.array([active[layer][e][0] for e in entries])
                left, incoming = exchanged(entries, values, candidates, scores, int(p * k))
                fresh[layer] = left, {e: (seeds[0][c], seeds[1][c]) for e, c in incoming.items()}
        for layer, g in enumerate(of_step):
            new = {}
            for e, (value, mean, square) in active[layer].items():
                mean, square = 0.9 * mean + 0.1 * g[e], 0.999 * square + 0.001 * g[e] ** 2
                way = mean / (1 - 0.9 ** (step + 1)) / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
                new[e] = (value - RATE * way if step >= layer + accumulate - 1 else 0.0, mean, square)
            if layer in fresh:
                left, incoming = fresh[layer]
                bias = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
                new = {e: x for e, x in new.items() if e in left}
                new |= {e: (0.0, mean * bias[0], square * bias[1]) for e, (mean, square) in incoming.items()}
            active[layer] = new
        yield step, active


@pytest.mark.parametrize("grow", spiel.GROWTHS)
def test_agrees_with_the_rule(grow):
    """Nine steps of two micro-batches: entries, values and moments, over two choices of each layer."""
    states, _ = trained(grow)
    for step, active in by_numpy(grow):
        state = states[step + 1]
        adam = state.opt_state
        for layer in range(LAYERS):
            index = np.asarray(state.moved[f"{OWN}index"][layer]).tolist()
            assert len(set(index)) == len(index)
            assert set(index) == set(active[layer]), (step, layer)
            for number, leaf in enumerate((state.trainable, adam.mu, adam.nu)):
                expected = np.array([active[layer][e][number] for e in index])
                scale = max(np.abs(expected).max(), 1e-12)
                np.testing.assert_allclose(leaf[f"{OWN}values"][layer], expected, rtol=1e-2, atol=2e-3 * scale)


def test_all_are_chosen_at_first_and_fewer_later():
    """A layer's values are zero until its first choice; from then on entries stay but for a share."""
    states, _ = trained("gradient")
    changed = lambda step, layer: len(
        set(np.asarray(states[step + 1].moved[f"{OWN}index"][layer]).tolist())
        - set(np.asarray(states[step].moved[f"{OWN}index"][layer]).tolist())
    )
    k = states[0].moved[f"{OWN}index"].shape[1]
    assert [[changed(step, layer) > 0 for step in range(9)].index(True) for layer in range(LAYERS)] == [1, 2, 3]
    assert changed(1, 0) > k // 2 and 0 < changed(5, 0) <= k * 0.5 * (1 - 6 / 16)
    for step, state in enumerate(states):
        zero = ~np.any(np.asarray(state.trainable[f"{OWN}values"]), axis=1)
        assert zero.tolist() == [step <= layer + 2 for layer in range(LAYERS)]


@pytest.mark.parametrize("grow", spiel.GROWTHS)
def test_the_state_is_what_the_formula_says(grow):
    """16 bytes of an entry, and 12 of a candidate or 4 of each row and column; k = floor(density n m)."""
    method = jp.spiel(0.03, grow=grow)
    _, state = start(method, optax.scale_by_adam())
    kernels = {path: leaf.shape for path, leaf in state.frozen.items() if path.endswith("_proj/kernel")}
    assert len(kernels) == 7
    expected = 0
    for layers, n, m in kernels.values():
        k = int(0.03 * n * m)
        expected += layers * (16 * k + (12 * k if grow == "gradient" else 4 * (n + m)))
    counters = 2 * 4  # Adam's and the method's
    assert tree.num_bytes((state.trainable, state.moved, state.opt_state)) == expected + counters


@pytest.mark.parametrize("save", ["everything", "matmuls"])
def test_no_stack_of_gradients_exists(save):
    """Of kernels in bf16, float32 arrays of a kernel's shape are one layer's; there is no stack of them."""
    method = jp.spiel(targets=["up_proj"])
    model, state = start(method, optax.scale_by_adam(), jnp.bfloat16)
    step = jp.make_train_step(jp.remat(model, save), method, optax.scale_by_adam(), rate=RATE)
    text = jax.jit(step).lower(state, tiny.batch()).as_text()
    assert "tensor<3x32x56xbf16>" in text
    assert "tensor<32x56xf32>" in text and "x32x56xf32>" not in text


def test_turns_are_each_layers_once_a_period():
    values = {f"layers/a{spiel.VALUES}": jnp.zeros((5, 2)), f"head{spiel.VALUES}": jnp.zeros(2)}
    turns = entries.turns(values, spiel.VALUES)
    now = [turns.now(jnp.int32(step), 7) for step in range(-2, 21)]
    places = [int(at["layers/a"]) for at in now]
    assert places[:9] == [-1, -1, 0, 1, 2, 3, 4, -1, -1]
    assert places[9:16] == places[16:23] == [0, 1, 2, -1, 3, 4, -1]
    assert [step for step, at in zip(range(-2, 21), now, strict=True) if at["head"] == 0] == [0, 7, 14]


def test_large_kernels_have_different_entries_to_their_ends():
    index = np.asarray(sparse.flat_draw(KEY, 46340, 46340, 1000)).astype(np.int64)
    assert (np.diff(index) > 0).all() and index[-1] > 0.99 * 46340**2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density 0 must be above 0 and at most 0.5"),
        ({"density": 0.6}, "density 0.6 must be above 0"),
        ({"accumulate": 0}, "accumulate 0 must be at least 1"),
        ({"every": 3}, "every 3 must be at least accumulate, 5"),
        ({"every": 2, "accumulate": 1}, "every 2 must be at least 3: that many layers take turns"),
        ({"drop": 0}, "drop 0 must be above 0 and at most 1"),
        ({"until": -1}, "until -1 must be at least 0"),
        ({"grow": "random"}, "grow 'random' is not one of gradient, moments"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=f"spiel: {re.escape(message)}"):
        jp.setup(jp.spiel(**options), *tiny.model(), KEY)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: jp.lisa(1), "spiel.lisa: spiel's values are differentiated whole, and .* would be moved"),
        (jp.mezo, "spiel.mezo: spiel chooses by gradients, and mezo has no backward pass"),
    ],
)
def test_chains_that_do_not_differentiate_the_values_are_refused(other, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.chain(jp.spiel(targets=["up_proj"]), other()), *tiny.model(), KEY)
