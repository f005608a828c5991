"""SPT-LoRA: the choice by brute force over thresholds, sensitivities against autodiff, the state's bytes, refusals."""

import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import spt_lora
from tests import tiny

KEY, SITES = jax.random.key(0), ("layers/mlp/up_proj", "layers/mlp/down_proj")
BATCHES = [tiny.batch(rows=2, seed=seed) for seed in (1, 2)]
OPTIONS = {"density": 0.06, "rank": 2, "ratio": 4.0, "targets": ["up_proj", "down_proj"]}
FACTORS = 2 * (32 + 56)


@functools.cache
def start():
    method = jp.spt_lora(**OPTIONS)
    return method, *jp.setup(method, *tiny.model(), KEY, batches=lambda: iter(BATCHES))


@functools.cache
def gradients():
    """{site: dW (L, n, m)} of each batch, by autodiff of the kernels."""
    base, params = tiny.model()
    flat = tree.flatten(params)
    of = lambda own, batch: jp.completion_loss(base, tree.unflatten({**flat, **own}), batch)[0]
    gradient, own = jax.jit(jax.grad(of)), {f"{site}/kernel": flat[f"{site}/kernel"] for site in SITES}
    return [
        {site: np.asarray(gradient(own, batch)[f"{site}/kernel"], np.float64) for site in SITES} for batch in BATCHES
    ]


def chosen(rest):
    """[(site, layer, LoRA or not, entries)] of all matrices."""
    index, found = np.asarray(rest["spt_lora/index"]), []
    for site in SITES:
        at, count, lora = (np.asarray(rest[f"{site}/spt_lora/{part}"]) for part in spt_lora.PARTS)
        for layer in range(len(at)):
            found.append((site, layer, bool(lora[layer]), index[at[layer] :][: count[layer]]))
    return found


@pytest.mark.slow
def test_one_threshold_over_all_matrices():
    """Of sum dW^2: what trains by itself lies above all that does not, in every matrix; LoRA has enough above it."""
    rest, scores = start()[3], {site: sum(g[site] ** 2 for g in gradients()) for site in SITES}
    single = [(scores[site][layer].reshape(-1), own) for site, layer, low, own in chosen(rest) if not low]
    low = [scores[site][layer].reshape(-1) for site, layer, low, _ in chosen(rest) if low]
    assert low and sum(len(own) for _, own in single) > 5
    least = min(s[own].min() for s, own in single if len(own))
    tolerance = 1e-4 * max(s.max() for s in scores.values())
    for s, own in single:
        assert len(set(own.tolist())) == len(own) < FACTORS / 4
        assert np.delete(s, own).max() <= least + tolerance
    for s in low:
        assert np.sum(s >= least - tolerance) >= FACTORS / 4
    total = int(0.06 * 6 * 32 * 56)
    used = len(low) * FACTORS + sum(len(own) for _, own in single)
    assert total - FACTORS < used <= total == len(rest["spt_lora/index"])


def brute(scores, shapes, total):
    """(cost, counts, which are LoRA) of the lowest threshold within the budget: all of them tried."""
    best = (0, [0] * len(scores), [False] * len(scores))
    for t in sorted(set(np.concatenate(scores).tolist()), reverse=True):
        counts = [int(np.sum(s >= t)) for s in scores]
        low = [c >= shape.factors / shape.ratio for c, shape in zip(counts, shapes, strict=True)]
        cost = sum(s.factors if x else c for c, x, s in zip(counts, low, shapes, strict=True))
        if cost > total:
            break
        best = cost, counts, low
    return best


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_choice_by_brute_force_and_no_entry_twice(data):
    shapes = {"a": spt_lora.Matrix(4, 6, 1, 1.0, 2.5), "b": spt_lora.Matrix(5, 3, 2, 1.0, 3.0)}
    total, numbers = data.draw(st.integers(1, 40)), data.draw(st.permutations(range(1, 2 * 24 + 15 + 1)))
    scores = {"a": np.array(numbers[:48], np.float32).reshape(2, 24), "b": np.array(numbers[48:], np.float32)[None]}
    best = {}
    for site, shape in shapes.items():
        order = np.argsort(-scores[site], axis=1)[:, : min(shape.enough, shape.n * shape.m)].astype(np.int32)
        best[site] = (np.take_along_axis(scores[site], order, 1), order)
    found = {path: np.asarray(leaf) for path, leaf in spt_lora.allotted(best, shapes, total).items()}
    rows = [*scores["a"], *scores["b"]]
    cost, counts, low = brute(rows, [shapes["a"], shapes["a"], shapes["b"]], total)
    at, count, lora = (np.concatenate([found[f"{s}/spt_lora/{p}"] for s in "ab"]) for p in spt_lora.PARTS)
    assert lora.tolist() == low and cost <= total
    ends = [0]
    for row, c, x, first, own, shape in zip(
        rows, counts, low, at, count, (*[shapes["a"]] * 2, shapes["b"]), strict=True
    ):
        assert first == ends[-1]  # one after the other, none over another
        ends.append(first + (shape.factors if x else c))
        if not x:
            entries = found["spt_lora/index"][first : first + own]
            assert own == c and len(set(entries.tolist())) == c
            assert set(entries.tolist()) == set(np.argsort(-row)[:c].tolist())
    assert ends[-1] == cost


def test_gradients_are_those_of_the_kernels_entries_and_of_the_factors():
    """dv = dW[idx]; dB = s A^T dW, and dA = s dW B^T = 0 at the start; what is left over has none."""
    _, model, trainable, rest = start()
    loss = lambda trainable: jp.completion_loss(model, jp.combine(trainable, rest), BATCHES[0])[0]
    found = np.asarray(jax.jit(jax.grad(loss))(trainable)["spt_lora/values"])
    expected, values = np.zeros_like(found), np.asarray(trainable["spt_lora/values"])
    for site, layer, low, own in chosen(rest):
        first, g = int(rest[f"{site}/spt_lora/at"][layer]), gradients()[0][site][layer]
        n = g.shape[0]
        if low:
            a = values[first : first + 2 * n].reshape(n, 2)
            assert a.std() > 0 and abs(a).max() <= n**-0.5 and not values[first + 2 * n : first + FACTORS].any()
            expected[first + 2 * n : first + FACTORS] = (a.T @ g).reshape(-1)
        else:
            expected[first : first + len(own)] = g.reshape(-1)[own]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * abs(expected).max())


def test_the_state_is_16_bytes_of_a_number_and_9_of_a_matrix():
    method, model, trainable, rest = start()
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    own = {path: leaf for path, leaf in state.frozen.items() if "spt_lora/" in path}
    counter = 4
    total = int(0.06 * 6 * 32 * 56)
    assert tree.num_bytes((state.trainable, own, state.opt_state)) == 16 * total + 9 * 6 + counter


def test_merged_after_a_change_of_every_number():
    """Of factors and of entries, also over packed kernels; the conformance test's few steps leave A as it is nearly."""
    method, model, trainable, rest = start()
    changed = {"spt_lora/values": jax.random.normal(KEY, trainable["spt_lora/values"].shape)}
    params = jp.combine(changed, rest)
    merged = method.merge(params)
    base, original = tiny.model()
    np.testing.assert_allclose(base.apply(merged, BATCHES[0]), model.apply(params, BATCHES[0]), rtol=1e-3, atol=1e-3)
    for site, layer, low, own in chosen(rest):
        change = np.asarray(tree.flatten(merged)[f"{site}/kernel"] - tree.flatten(original)[f"{site}/kernel"])[layer]
        if low:
            assert np.linalg.matrix_rank(change, tol=1e-3) == 2
        else:
            assert set(np.flatnonzero(change).tolist()) == set(own.tolist())


def test_a_plan_needs_no_data_and_what_is_there_stays():
    """Shapes are the start's; an adapter's leaves are taken as they are."""
    base, params = tiny.model()
    method, _, trainable, rest = start()
    planned = jax.eval_shape(lambda p: jp.setup(method, base, p, KEY, batches=lambda: ())[1:], params)
    shapes = lambda leaves: {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    assert tuple(map(shapes, planned)) == tuple(map(shapes, (trainable, rest)))
    own = {path: leaf for path, leaf in {**trainable, **rest}.items() if "spt_lora/" in path}
    own["spt_lora/values"] = own["spt_lora/values"] + 1

    def read(**changed):
        given = tree.unflatten({**tree.flatten(params), **own, **changed})
        return jp.setup(method, base, given, KEY, batches=lambda: ())

    again = read()
    for path, leaf in own.items():
        np.testing.assert_array_equal({**again[1], **again[2]}[path], leaf)
    with pytest.raises(jp.InputError, match="spt_lora: layer . of .* numbers at .*, which are not its own"):
        read(**{"spt_lora/index": own["spt_lora/index"] + 32 * 56})
    with pytest.raises(jp.InputError, match=r"spt_lora/index have \(645, 7\) numbers, where this base has 645"):
        read(**{"spt_lora/index": own["spt_lora/index"][:7]})


def test_a_budget_of_no_factors_trains_single_weights_alone():
    base, params = tiny.model()
    method = jp.spt_lora(0.001, rank=8, metric="magnitude", targets=["up_proj"])
    model, trainable, rest = jp.setup(method, base, params, KEY)
    assert len(trainable["spt_lora/values"]) == math.floor(0.001 * 3 * 32 * 56) < 8 * (32 + 56)
    assert not np.any(rest["layers/mlp/up_proj/spt_lora/lora"])
    loss = lambda trainable: jp.completion_loss(model, jp.combine(trainable, rest), BATCHES[0])[0]
    assert np.all(jax.jit(jax.grad(loss))(trainable)["spt_lora/values"] != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "spt_lora: density 0.0 must be above 0 and at most 0.5"),
        ({"density": 1e-6}, "spt_lora: density 1e-06 leaves nothing to train: less than one number"),
        ({"rank": 0}, "spt_lora: rank 0 must be at least 1"),
        ({"rank": 99}, "spt_lora: rank 99 is above the smaller side of layers/mlp/down_proj, a kernel of 56 x 32"),
        ({"ratio": 0.5}, "spt_lora: ratio 0.5 must be a finite number of at least 1"),
        ({"alpha": 0.0}, "spt_lora: alpha 0.0 must be a finite number above 0"),
        ({"metric": "fisher"}, "spt_lora: metric 'fisher' is not one of gradient, magnitude"),
        ({"metric": "gradient"}, "spt_lora: metric 'gradient' starts from data: setup(..., batches=...)"),
        ({"targets": ["qqq"]}, "targets 'qqq': matches no linear site"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=re.escape(message)):
        jp.setup(jp.spt_lora(**{"metric": "magnitude", **options}), *tiny.model(), KEY)
